"""The activation sites of a model, and the plan that says what each one becomes."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..core.errors import SpecError
from ..core.specs import FLOAT_BITS, InputSpec, QuantSpec
from .activation_calls import Identity


@dataclass(frozen=True)
class Site:
    """One call of an activation.

    Attributes:
        name: full name of its quantizer in the converted model.
        owner: full name of the module whose forward makes the call ("" is the model itself).
        kind: ``relu``, ``gelu``, ...
        form: ``module``, ``function`` or ``method``; ``spelled`` if the activation is written out
            in arithmetic, which still runs before the quantizer; ``attribute`` if a function in an
            attribute is replaced; ``opaque`` if an activation module is replaced although no call
            of it was seen.
        target: name of the called module or attribute within owner.
        call: number of this call among those of the same kind or module in owner's forward.
        identity: identifies the call in every graph of owner's forward.
        where: file and line of the call.
        function: the float activation as a module.
        inplace: whether the overwritten input may be read later.
        statistics: full names of the BatchNorms whose outputs, added, are the input; empty if the
            input comes from elsewhere.
        axis: channel dimension of the input.
        spec: its quantizer; None if the site is excluded.
        reason: why the site is excluded.
        intercepted: whether the call is found at run time, since owner's forward cannot be traced.
        argument: index of the argument that an intercepted spelled-out activation is a function of.
        parts: activation calls that are only parts of an intercepted spelled-out activation.
    """

    name: str
    owner: str
    kind: str
    form: str
    target: str
    call: int
    identity: Identity
    where: str
    function: nn.Module = field(repr=False, compare=False)
    inplace: bool = False
    statistics: tuple[str, ...] = ()
    axis: int = 1
    spec: QuantSpec | None = None
    reason: str = ""
    intercepted: bool = False
    argument: int | None = None
    parts: tuple[Identity, ...] = ()

    @property
    def converted(self) -> bool:
        """Return whether the site gets a quantizer."""
        return self.spec is not None


@dataclass(frozen=True)
class Plan:
    """Every activation site of a model, converted or excluded and why; prints as a table."""

    sites: tuple[Site, ...]
    unread: Mapping[str, str] = field(default_factory=dict)
    """Modules whose forward torch.fx cannot trace, and why."""
    example: Any = field(default=None, repr=False, compare=False)
    """The input that was run to find the calls in those modules, if any."""
    input: InputSpec | None = None
    """The input quantizer, if any."""

    @property
    def converted(self) -> tuple[Site, ...]:
        """Return the sites that get a quantizer."""
        return tuple(site for site in self.sites if site.converted)

    @property
    def excluded(self) -> tuple[Site, ...]:
        """Return the sites that stay float."""
        return tuple(site for site in self.sites if not site.converted)

    def to_dict(self) -> dict[str, Any]:
        """Return sites, forwards that could not be traced, and the input, as plain JSON types."""
        sites = [{"name": s.name, "kind": s.kind, "form": s.form, "call": s.call,
                  "where": s.where, "bits": s.spec.bits if s.spec else FLOAT_BITS,
                  "dynamic": bool(s.spec and s.spec.dynamic),
                  "per_channel": bool(s.spec and s.spec.per_channel), "reason": s.reason}
                 for s in self.sites]
        spec = self.input
        return {"sites": sites, "unread": dict(self.unread),
                "input": None if spec is None else {
                    "bits": spec.bits, "low": list(spec.low), "high": list(spec.high)}}

    def __str__(self) -> str:
        summary = f"{len(self.converted)} of {len(self.sites)} activation sites to convert"
        if self.excluded:
            summary += f"; excluded: {self.excluded_by_reason()}"
        return self.table(summary)

    def table(self, summary: str) -> str:
        """Return the table of sites, a summary, the input quantizer and untraceable modules."""
        rows = [("site", "kind", "call", "at", "becomes")]
        for s in self.sites:
            if s.spec is None:
                becomes = f"excluded: {s.reason}"
            else:
                becomes = (f"{s.spec.bits}-bit {'dynamic' if s.spec.dynamic else 'fixed'}"
                           f"{' per channel' if s.spec.per_channel else ''}")
            if s.intercepted:
                becomes += ", by interception"
            rows.append((s.name, s.kind, str(s.call), s.where, becomes))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row[:4], widths, strict=True)), row[4]])
                 for row in rows]
        lines.append(summary)
        if self.input is not None:
            lows, highs = ("/".join(f"{v:.4g}" for v in values)
                           for values in (self.input.low, self.input.high))
            lines.append(f"the input becomes {self.input.bits}-bit, from {lows} to {highs}")
        for name, why in self.unread.items():
            lines.append(f"not traceable, {name or 'the model itself'}: {why}")
        return "\n".join(lines)

    def excluded_by_reason(self) -> str:
        """Return the number of excluded sites for each reason."""
        counts = Counter(site.reason for site in self.excluded)
        return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))


def join(path: str, name: str) -> str:
    """Return the full name of a child."""
    return f"{path}.{name}" if path else name


Bits = int | QuantSpec | Mapping[str, int | QuantSpec]


def assign(plan: Plan, model: nn.Module, bits: Bits, dynamic: bool, per_channel: bool,
           exclude: Iterable[str | type[nn.Module]], gates: bool) -> Plan:
    """Give each site its spec, or the reason why it is excluded.

    ``first`` and ``last`` in ``bits`` and ``exclude`` are the ends of the list of sites.

    Raises:
        SpecError: a pattern of ``bits`` or ``exclude`` that matches nothing.
    """
    exclude = [exclude] if isinstance(exclude, (str, type)) else list(exclude)
    used: set[Any] = set()
    table = dict(bits) if isinstance(bits, Mapping) else {"*": bits}
    free = [s.name for s in plan.sites if not s.reason or (gates and s.reason.startswith("gate"))]
    ends = {"first": free[:1], "last": free[-1:]}
    decided = []
    for site in plan.sites:
        reason = site.reason
        if gates and reason.startswith("gate"):
            reason = ""
        for pattern in exclude:
            if _matches(site, pattern, model, ends):
                used.add(pattern)
                reason = reason or "exclude="
        spec: QuantSpec | None = None
        for pattern, value in table.items():
            if _matches(site, pattern, model, ends):
                used.add(pattern)
                spec = value if isinstance(value, QuantSpec) else \
                    QuantSpec(value, dynamic, per_channel)
        if spec is None:
            reason = reason or "no pattern of bits= matches it"
        elif spec.is_float:
            reason = reason or "32 bits"
        decided.append(replace(site, spec=None if reason else spec, reason=reason))
    for pattern in [*exclude, *table]:
        if pattern not in used and pattern != "*":
            names = [s.name for s in plan.sites] + sorted({s.kind for s in plan.sites})
            near = difflib.get_close_matches(str(pattern), names, 1)
            raise SpecError(f"{pattern!r} matches no activation site",
                            fix=f"Did you mean {near[0]!r}?" if near else
                            "See quantguard.inspect(model), or quantguard inspect MODEL.")
    return replace(plan, sites=tuple(decided))


def _matches(site: Site, pattern: str | type[nn.Module], model: nn.Module,
             ends: Mapping[str, list[str]]) -> bool:
    """Return whether a pattern matches a site's name, kind or position, or a class around it."""
    if isinstance(pattern, type):
        above = site.owner.split(".") if site.owner else []
        around = [model.get_submodule(".".join(above[:i])) for i in range(1, len(above) + 1)]
        return isinstance(site.function, pattern) or any(isinstance(m, pattern) for m in around)
    return (fnmatch.fnmatchcase(site.name, pattern) or site.kind == pattern
            or site.name.startswith(pattern + ".") or site.name in ends.get(pattern, ()))
