"""Text and HTML of a certificate."""

from __future__ import annotations

import html

from ..core.progress import duration
from ..core.rendering import Cell, as_html, as_text, sample_text, table
from .certificate import Certificate

LOWER_BOUND = ("Certified accuracy is a lower bound of the true robust accuracy of the float32 "
               "model that runs.\nIntervals are 95 % Wilson and cover the sampling of images only.")


@as_text.register
def certificate_text(certificate: Certificate) -> str:
    """Return the text of a certificate."""
    cell = Cell(int(certificate.certified.sum()), certificate.images)
    low, high = cell.interval
    lines = [f"Robust accuracy >= {100 * cell.share:.1f} % (95 % interval {100 * low:.1f}-"
             f"{100 * high:.1f}; {cell.count} of {cell.n} images are proven to withstand every "
             "attack).",
             f"Clean accuracy {Cell(int(certificate.correct.sum()), cell.n)} %. Threat: "
             f"{certificate.threat}; method {certificate.method}, "
             f"{duration(certificate.seconds)}{sample_text(certificate.sample)}."]
    if certificate.skipped:
        lines.append(f"{certificate.skipped} images were left out for lack of time and count as "
                     "not certified.")
    if certificate.sites:
        rows = [["quantizer", "intervals on one level"],
                *([name, f"{100 * share:.1f} %"] for name, share in certificate.sites.items())]
        lines += ["", table(rows), ""]
    return "\n".join([*lines, LOWER_BOUND])


@as_html.register
def certificate_html(certificate: Certificate) -> str:
    """Return an HTML fragment for a notebook."""
    return f"<pre>{html.escape(certificate_text(certificate))}</pre>"
