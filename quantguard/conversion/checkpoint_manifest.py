"""Write a plan to the manifest of a .qg file, and read it back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import nn

from ..core.errors import LoadError
from ..core.specs import InputSpec, QuantSpec
from ..nn.activation_kinds import described, rebuilt
from .plan import Plan
from .runtime_recorder import Intercepted
from .sites import find_sites


def site_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return the sites of a plan as plain JSON types."""
    rows = []
    for s in plan.sites:
        row: dict[str, Any] = {"name": s.name, "kind": s.kind, "reason": s.reason,
                               "spec": asdict(s.spec) if s.spec else None}
        if s.intercepted:  # found by running the model; loading does not run it
            row["call"] = {
                "owner": s.owner, "identity": list(s.identity), "form": s.form,
                "target": s.target, "where": s.where, "argument": s.argument,
                "inplace": s.inplace, "function": described(s.function),
                "parts": [list(part) for part in s.parts]}
        rows.append(row)
    return rows


def recorded_calls(rows: list[dict[str, Any]]) -> dict[str, list[Intercepted]]:
    """Return the calls that were found by running the model, by the module that makes them."""
    known: dict[str, list[Intercepted]] = {}
    for row in rows:
        if "call" in row:
            c = row["call"]
            key, place, number = c["identity"]
            known.setdefault(c["owner"], []).append(Intercepted(
                (key, place, number), row["kind"], c["form"], c["target"],
                rebuilt(c["function"]), c["where"], c["argument"], c["inplace"], row["reason"],
                tuple((k, p, n) for k, p, n in c["parts"])))
    return known


def read_plan(manifest: dict[str, Any], model: nn.Module, where: str) -> Plan | None:
    """Return the plan of the manifest, applied to the sites of model.

    Raises:
        LoadError: the model has other sites than the manifest.
    """
    if manifest["sites"] is None:
        return None
    saved = {row["name"]: row for row in manifest["sites"]}
    found = find_sites(model, known=recorded_calls(manifest["sites"]), unread=manifest["unread"])
    names = {site.name for site in found.sites}
    if names != set(saved):
        different = sorted(names ^ set(saved))
        raise LoadError(f"{where} was made from another model than this {type(model).__name__}",
                        why=f"Activation sites differ: {', '.join(different[:5])}.")
    spec = manifest.get("input")  # missing in files of the first versions
    return replace(found, input=None if spec is None else InputSpec(**spec), sites=tuple(
        replace(site, reason=saved[site.name]["reason"],
                spec=QuantSpec(**saved[site.name]["spec"]) if saved[site.name]["spec"] else None)
        for site in found.sites))
