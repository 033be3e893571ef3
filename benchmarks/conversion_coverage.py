"""Conversion of every model of other libraries, and what stays float in it.

    python benchmarks/conversion_coverage.py torchvision  # every model, with weights: timed
    python benchmarks/conversion_coverage.py timm  # every architecture, without weights if possible
    python benchmarks/conversion_coverage.py families  # after `timm`: one of each family, run
    python benchmarks/conversion_coverage.py huggingface  # every image classifier of transformers
    python benchmarks/conversion_coverage.py peft  # wrapped by PEFT
    python benchmarks/conversion_coverage.py smp  # encoders of segmentation_models_pytorch
    python benchmarks/conversion_coverage.py open_clip  # its vision encoders

Each prints a row per model and a closing line, and writes benchmarks/results/coverage_<what>.json.
Rows in that file are not measured again: an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import pickle
import platform
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import small_models
import torch
from torch import nn

import quantguard as qg
from quantguard.attacks import logits_of
from quantguard.conversion.apply_plan import apply_plan
from quantguard.conversion.audit import audit
from quantguard.conversion.example_input import find_example
from quantguard.conversion.planning import make_plan
from quantguard.core.file_io import write_text
from quantguard.core.model_calls import accepts
from quantguard.core.model_loading.load_model import build_arch

HERE = Path(__file__).parent / "results"
# Architectures without any activation of the target kinds: the expected result is one error.
NOTHING = "has no activations to convert"


def counts(plan: qg.Plan) -> dict[str, Any]:
    return {"sites": len(plan.sites), "converted": len(plan.converted),
            "intercepted": sum(site.intercepted for site in plan.sites),
            "kept": dict(Counter(site.reason for site in plan.excluded))}


def measured(name: str) -> dict[str, Any]:
    """Convert one model with its weights, and time all but the audit."""
    torch.manual_seed(0)  # an untrained detector spends most of its time on detections in noise
    model = build_arch(f"torchvision:{name}").eval()
    begin = time.perf_counter()
    plan = qg.inspect(model)
    inspected = time.perf_counter() - begin
    begin = time.perf_counter()
    done = qg.convert(model).quantguard
    seconds = time.perf_counter() - begin
    assert done.audit is not None, "no input found"
    return {**counts(plan), "device": "cpu", "ran": len(done.audit.ran), "left": done.audit.left,
            "identical": done.audit.identical, "inspect_seconds": inspected,
            "convert_seconds": seconds - done.audit.seconds, "audit_seconds": done.audit.seconds}


def structure(name: str) -> dict[str, Any]:
    """Plan one timm architecture, carry the plan out and audit it, on the meta device."""
    import timm

    begin = time.perf_counter()
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception:  # some need real numbers to be built
        model = timm.create_model(name)
    device = next(model.parameters()).device.type
    row: dict[str, Any] = {"device": device, "family": family(name),
                           "parameters": sum(p.numel() for p in model.parameters())}
    example = find_example(model.eval())
    if example is None:
        raise RuntimeError("no input found")
    plan = make_plan(model, example=example)
    found = audit(model, apply_plan(model, plan), plan, example)
    return {**row, **counts(plan), "ran": len(found.ran), "left": found.left,
            "seconds": time.perf_counter() - begin}


def family(name: str) -> str:
    found = re.match(r"[a-z]+", name)
    return found[0] if found else name


def used(name: str) -> dict[str, Any]:
    """Convert one model with weights; forward, backward, and train mode and back."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    converted = qg.convert(model)
    done = converted.quantguard
    example = find_example(model)
    with torch.no_grad():
        before = _first(_call(converted, example))
    converted.train()
    _first(_call(converted, example)).float().square().mean().backward()
    gradients = [p.grad for p in converted.parameters() if p.grad is not None]
    for path, module in converted.named_modules():  # undo the training step's changes
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.load_state_dict(model.get_submodule(path).state_dict())
    converted.eval()
    with torch.no_grad():
        after = _first(_call(converted, example))
    return {**counts(done.plan), "device": "cpu", "family": family(name),
            "left": done.audit.left, "identical": done.audit.identical,
            "gradients": len(gradients), "finite": all(bool(g.isfinite().all()) for g in gradients),
            "same_after_training_mode": bool(torch.equal(before, after)),
            "parameters": sum(p.numel() for p in model.parameters())}


def elsewhere(build: Callable[[], nn.Module], evaluated: bool) -> dict[str, Any]:
    """Convert one small model of another library without an example input; save it, and load it.

    Args:
        evaluated: whether to run one attack on two images, too.
    """
    torch.manual_seed(0)
    model = build()
    begin = time.process_time()
    converted = qg.convert(model)
    seconds = time.process_time() - begin
    done = converted.quantguard
    assert done.audit is not None, "no input found"
    example = find_example(model)
    [image] = example.values() if isinstance(example, dict) else [example]
    pixels = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    if accepts(model, pixels[..., :64, :64]):  # equivalent, and faster
        pixels = pixels[..., :64, :64]
    with torch.no_grad():
        labels = logits_of(converted(pixels)).argmax(1)
    attacked = qg.evaluate(converted, [(pixels, labels)], qg.Threat(eps=8 / 255), progress=False,
                           suite=[qg.attacks.PGD(steps=2)]).images if evaluated else 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qg"
        qg.save(converted, path)
        loaded = qg.load(path, model=build())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    with torch.no_grad():
        before = logits_of(converted(pixels))
        same = [bool(torch.equal(before, logits_of(other(pixels)))) for other in (loaded, copied)]
    return {**counts(done.plan), "shape": list(image.shape), "ran": len(done.audit.ran),
            "left": done.audit.left, "identical": done.audit.identical,
            "attacked": attacked, "same_when_loaded": same[0],
            "same_when_copied": same[1], "convert_cpu_seconds": seconds,
            "parameters": sum(p.numel() for p in model.parameters())}


def _call(model: nn.Module, example: Any) -> Any:
    return model(**example) if isinstance(example, dict) else model(example)


def _first(output: Any) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


# Small random models of other libraries: a builder for each, by name.
SMALL = {"huggingface": small_models.huggingface, "peft": small_models.peft,
         "smp": small_models.smp, "open_clip": small_models.open_clip}
LIBRARIES = {"huggingface": "transformers", "peft": "peft", "smp": "segmentation_models_pytorch",
             "open_clip": "open_clip_torch"}


def names(what: str) -> list[str]:
    if what in SMALL:
        return list(SMALL[what]())
    if what == "torchvision":
        from torchvision.models import list_models
        return list(list_models())
    import timm
    if what == "timm":
        return list(timm.list_models())
    rows = json.loads((HERE / "coverage_timm.json").read_text())["rows"]
    smallest: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("parameters", 0) and row["parameters"] < smallest.get(
                row["family"], {"parameters": 2**62})["parameters"]:
            smallest[row["family"]] = row
    return [row["name"] for row in smallest.values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["torchvision", "timm", "families", *SMALL])
    parser.add_argument("--only", default="", help="a pattern of names")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    path = HERE / f"coverage_{options.what}.json"
    HERE.mkdir(exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {row["name"] for row in rows}
    measure: Callable[[str], dict[str, Any]] = {
        "torchvision": measured, "timm": structure, "families": used}.get(
            options.what, lambda name: elsewhere(SMALL[options.what]()[name],
                                             options.what == "huggingface"))
    for name in names(options.what):
        if name in done or not re.search(options.only, name):
            continue
        row: dict[str, Any] = {"name": name}
        try:
            row |= measure(name)
        except qg.ConversionError as error:
            row["nothing" if NOTHING in str(error) else "error"] = str(error)
        except ImportError as error:  # models that the library itself cannot build here
            row["not_built"] = str(error).strip().splitlines()[0]
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        gc.collect()
        print(" ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}"
                       for k, v in row.items()), flush=True)
        write_text(path, json.dumps({
            "rows": rows, "python": platform.python_version(), "torch": version("torch"),
            "torchvision": version("torchvision"), "timm": version("timm"),
            **{package: version(package) for package in [LIBRARIES.get(options.what, "timm")]},
            "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "machine": platform.machine()}))
    print(summary(rows))


def summary(rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if "sites" in row]
    lines = [f"{len(rows)} models: {len(good)} converted, "
             f"{sum('nothing' in row for row in rows)} with nothing to convert, "
             f"{sum('error' in row for row in rows)} exceptions, "
             f"{sum('not_built' in row for row in rows)} not built; "
             f"{sum(row['sites'] for row in good)} sites, "
             f"{sum(row['converted'] for row in good)} converted, "
             f"{sum(len(row['left']) for row in good)} left over; kept: "
             + ", ".join(f"{n} {reason}" for reason, n in sum(
                 (Counter(row["kept"]) for row in good), Counter()).most_common())]
    lines += [f"  {row['name']}: {row.get('error') or row['left']}" for row in rows
              if "error" in row or row.get("left")]
    lines += [f"  {row['name']}: {row['nothing'].splitlines()[0]}" for row in rows
              if "nothing" in row]
    lines += [f"  {row['name']}: {row['not_built']}" for row in rows if "not_built" in row]
    for key in ("convert_seconds", "convert_cpu_seconds", "inspect_seconds", "audit_seconds",
                "seconds"):
        slow = sorted((row for row in good if key in row), key=lambda row: -row[key])[:4]
        if slow:
            lines.append(f"  {key}: {sum(row.get(key, 0) for row in good):.0f} in all, slowest "
                         + ", ".join(f"{row['name']} {row[key]:.1f}" for row in slow))
    for key in ("identical", "finite", "same_after_training_mode", "same_when_loaded",
                "same_when_copied"):
        if any(key in row for row in good):
            bad = [row["name"] for row in good if not row.get(key, True)]
            lines.append(f"  {key}: all but {bad}" if bad else f"  {key}: all")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
