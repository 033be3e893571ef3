"""Results as HTML: fragments for notebooks, and one self-contained page."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from ...core.rendering import Cell, as_html, as_page, sample_text
from ..comparison import Comparison
from ..results import Evaluation
from .text import (
    BOUNDS,
    UPPER_BOUND,
    all_columns,
    attack_rows,
    bounds_of,
    columns,
    flag_lines,
    headline,
    paired_lines,
    raised_flags,
    side_lines,
)

_STYLE = """
.qg { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 62rem }
.qg h1 { font-size: 1.6rem; margin: 0 0 .2rem } .qg h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
.qg table { border-collapse: collapse; width: 100%; margin: .6rem 0 }
.qg th, .qg td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #dfe3ea;
  vertical-align: top; font-variant-numeric: tabular-nums }
.qg th { font-weight: 600; color: #55607a; font-size: .85rem }
.qg small { color: #55607a } .qg td small { display: block; white-space: nowrap }
.qg .bar { position: relative; height: .5rem; background: #eceff4;
  border-radius: .25rem; margin-top: .25rem; min-width: 5rem }
.qg .fill { position: absolute; left: 0; top: 0; bottom: 0; border-radius: .25rem;
  background: #5b7fc7 } .qg .worst .fill { background: #c2543f }
.qg .certified .fill { background: #3f8f5f }
.qg .whisker { position: absolute; top: -.1rem; bottom: -.1rem; border: solid #1c2330;
  border-width: 0 1px; background: rgba(28,35,48,.18) }
.qg .flag { border-left: .25rem solid #c2543f; padding: .3rem .8rem; margin: .4rem 0;
  background: #fbf1ef } .qg .flag.undecided { border-color: #b58a1b; background: #fbf6e8 }
.qg .flag.masked { border-color: #7a5bb5; background: #f4f0fa }
.qg .head { padding: .7rem 1rem; background: #eef3fb; border-radius: .4rem; margin: .8rem 0 }
.qg pre { overflow: auto; background: #f5f6f9; padding: .8rem; font-size: .8rem }
"""


def _cell(cell: Cell, name: str) -> str:
    low, high = (100 * v for v in cell.interval)
    share = 100 * cell.share
    kind = name.split()[0] if name in ("worst case", "certified") else ""
    return (f'<td class="{kind}">{share:.1f} % '
            f"<small>[{low:.1f}–{high:.1f}]</small>"
            f'<div class="bar"><div class="fill" style="width:{share:.2f}%"></div>'
            f'<div class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>'
            "</div></td>")


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
                   for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _flags(evaluation: Evaluation) -> str:
    flags, few = raised_flags(evaluation)
    body = "".join(f'<div class="flag {flag.kind}"><b>{html.escape(flag.kind)}: '
                   f"{html.escape(flag.name)}.</b> {html.escape(flag.reason)}<br>"
                   f"<small>{html.escape(flag.test)}</small></div>" for flag in flags)
    if few:
        body += f'<div class="flag undecided"><b>undecided:</b> {html.escape(few)}</div>'
    return body


def _comparison(comparison: Comparison) -> str:
    first = next(iter(comparison.rows.values()))
    names = all_columns(comparison)
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ["model", *names, "conclusion"])
    body = ""
    for name, evaluation in comparison.rows.items():
        cells = columns(evaluation)
        body += f"<tr><td><b>{html.escape(name)}</b></td>" + "".join(
            _cell(cells[c], c) if c in cells else "<td>-</td>" for c in names)
        body += f"<td>{evaluation.conclusion}<small>{evaluation.verdict}</small></td></tr>"
    lines = [*paired_lines(comparison), *(f"Note: {n}." for n in comparison.notes)]
    return (f"<p>{first.images} images; {html.escape(str(first.threat))}; suite "
            f"{html.escape(first.suite)}, seed {first.seed}{sample_text(first.sample)}. Per cent "
            "of images that are still classified correctly, with 95 % intervals.</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            + "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
            + f"<p><small>{html.escape(bounds_of(comparison))}</small></p>")


def _bounds(evaluation: Evaluation) -> str:
    return UPPER_BOUND if evaluation.certificate is None else BOUNDS


def _evaluation(evaluation: Evaluation) -> str:
    notes = "".join(f"<p><small>{html.escape(line)}</small></p>"
                    for line in side_lines(evaluation))
    return (f'<div class="head">{html.escape(headline(evaluation))}</div>{_flags(evaluation)}'
            f"{_table(attack_rows(evaluation))}{_curve(evaluation)}{notes}")


def _curve(evaluation: Evaluation) -> str:
    """Return accuracy over eps as an SVG plot, with the interval of each point."""
    points = evaluation.curve
    if not points:
        return ""
    left, top, high, gap = 44, 12, 120, 70
    marks = []
    for number, point in enumerate(points):
        cell = Cell(point.survivors, point.images)
        x, y = left + gap * number, top + high * (1 - cell.share)
        low, up = (top + high * (1 - v) for v in cell.interval)
        own = point.eps == evaluation.threat.eps
        marks.append(
            f'<line x1="{x}" x2="{x}" y1="{low:.1f}" y2="{up:.1f}" stroke="#9aa6bd"/>'
            f'<circle cx="{x}" cy="{y:.1f}" r="{5 if own else 3}" '
            f'fill="{"#c2543f" if own else "#5b7fc7"}"/>'
            f'<text x="{x}" y="{top + high + 18}" text-anchor="middle">{point.eps:.4g}</text>'
            f'<text x="{x + 7}" y="{y - 5:.1f}">{100 * cell.share:.0f}</text>')
    path = " ".join(f"{left + gap * i},{top + high * (1 - p.survivors / p.images):.1f}"
                    for i, p in enumerate(points))
    width = left + gap * len(points)
    axis = "".join(
        f'<text x="{left - 12}" y="{top + high * (1 - share) + 4:.1f}" text-anchor="end">'
        f'{100 * share:.0f}</text><line x1="{left - 8}" x2="{width - gap + 8}" '
        f'y1="{top + high * (1 - share):.1f}" y2="{top + high * (1 - share):.1f}" '
        'stroke="#eceff4"/>' for share in (0.0, 0.5, 1.0))
    return (f'<svg viewBox="0 0 {width} {top + high + 26}" width="{width}" role="img" '
            'style="max-width:100%" font-size="11" fill="#1c2330" '
            'aria-label="Accuracy over eps">'
            f'{axis}<polyline points="{path}" fill="none" stroke="#5b7fc7"/>{"".join(marks)}</svg>'
            f"<p><small>Per cent of survivors over eps, {points[0].images} of {evaluation.images} "
            "images, upper bounds with 95 % intervals; the threat's own eps is red.</small></p>")


def _framed(body: str) -> str:
    return f'<style>{_STYLE}</style><div class="qg">{body}</div>'


@as_html.register
def evaluation_html(evaluation: Evaluation) -> str:
    """Return an evaluation as a fragment for a notebook."""
    return _framed(_evaluation(evaluation)
                   + f"<p><small>{html.escape(_bounds(evaluation))}</small></p>")


@as_html.register
def comparison_html(comparison: Comparison) -> str:
    """Return a comparison as a fragment for a notebook."""
    flags = "".join(f"<h2>{html.escape(name)}</h2>{_flags(e)}"
                    for name, e in comparison.rows.items() if flag_lines(e))
    return _framed(_comparison(comparison) + flags)


@as_page.register
def page(comparison: Comparison) -> str:
    """Return a self-contained page: no script, font or image is loaded."""
    alone = next(iter(comparison.rows)) if len(comparison.rows) == 1 else ""
    title = f"Robustness of {alone}" if alone else "Robustness before and after"
    body = f"<h1>{html.escape(title)}</h1>" + _comparison(comparison)
    for name, evaluation in comparison.rows.items():
        body += f"<h2>{html.escape(name)}</h2>" + _evaluation(evaluation)
    first = next(iter(comparison.rows.values()))
    details = {**({"settings": comparison.settings} if comparison.settings else {}),
            "threat": first.threat.to_dict(), "environment": first.environment,
            "images": first.image_hash}
    again = "<code>--replay FILE</code> runs it" if alone else "the same command runs it"
    body += ("<h2>How to reproduce this</h2><p>The JSON of the same result "
             "(<code>--json FILE</code>, <code>save(\"FILE.json\")</code>) has every "
             f"hyper-parameter of each attack and the images that it broke; {again} again.</p>"
             f"<pre>{html.escape(json.dumps(details, indent=1))}</pre>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>quantguard: {html.escape(title)}</title>"
            "<style>body { margin: 2rem auto; padding: 0 1rem; max-width: 64rem }</style></head>"
            f"<body>{_framed(body)}</body></html>\n")
