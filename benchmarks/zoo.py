"""Our ZOO: its speed against ART's, its strength against PGD, and the effect of its step h.

A LeNet trained for one epoch on Fashion-MNIST, undefended, and two made from it, with 2-bit and
1-bit quantizers, trained for one more. L2 eps 1.5 in pixels from 0 to 1; the first test images that
are classified correctly. 112 coordinates a step, so that seven steps see each of the 784 pixels
once. Three parts:

- speed: our ZOO and ART's on the same network and images. CPU seconds of this process on one
  thread; queries and forward passes are counted at the model. First with equal queries, interleaved
  (ours with an eps at which nothing is broken, ART's without early stopping): the cost of a query,
  and the gain of having all of them in one forward pass. On a GPU, where a pass costs more than its
  content, the pass counts tell the gain; that was not measured. Then with an equal budget: ours
  leaves an image once it is broken within eps. ART's continues to look for a smaller change, until
  the budget is spent or (its default) until it makes no progress. ART's is another attack (it
  minimises a norm); its constant and rate are the best of three pairs tried on six images. What it
  breaks shows only that it works.
- share: of the images that L2 PGD-100 breaks (cross-entropy, margin, and their union), how many
  ZOO with h = 1e-4 breaks, and in how many queries; NES beside it.
- reach: survivors of ZOO with h = 1e-4, eps / 4, eps / 2, eps, on float, 2 bits and 1 bit, and of
  PGD-100 (margin) through the ramp and through the softened model. Differences of exactly 0 are a
  property of h, not of robustness.

    python benchmarks/zoo.py [--parts share reach] [--images 100]
    PYTHONPATH=FOLDER python benchmarks/zoo.py --parts speed   # FOLDER: where ART is

All parts share one JSON, written as each is done. Trained networks are saved for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fashion_lenet import lenet
from foolbox.criteria import Misclassification
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import PGD, FoolboxModel
from quantguard.attacks.nes import NES
from quantguard.attacks.zoo import ZOO
from quantguard.cli.demo import train_clean
from quantguard.core.file_io import write_text
from quantguard.data.loader import load_data

HERE = Path(__file__).parent / "results"
EPS, SEED, COORDINATES = 1.5, 0, 112
ROWS = {"float": 32, "2-bit": 2, "1-bit": 1}
REACHES: dict[str, dict[str, float]] = {
    "1e-4": {}, "eps/4": {"rel_h": 0.25}, "eps/2": {"rel_h": 0.5}, "eps": {"rel_h": 1.0}}


def network(row: str) -> nn.Module:
    """Return a network, trained once; the quantized ones start from the float one."""
    path = HERE / "zoo" / "work" / f"{row}.qg"
    if path.exists():
        return qg.load(path).eval()
    data = load_data("fashion-mnist", "train", batch_size=128)
    torch.manual_seed(SEED)
    model: nn.Module = lenet() if row == "float" else \
        qg.convert(network("float"), bits=ROWS[row], data=data)
    train_clean(model, data, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    qg.save(model, path)
    return model.eval()


@torch.no_grad()
def images(model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Return the first count test images that model gets right, and their labels."""
    x, y = next(iter(load_data("fashion-mnist", "test", batch_size=2 * count + 20)))
    right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:count]
    return x[right], y[right]


def fooled(model: nn.Module, found: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return which images are broken within eps."""
    with torch.no_grad():
        wrong = model(found).argmax(1) != y
    return wrong & ((found - x).flatten(1).norm(dim=1) <= EPS * (1 + 1e-5))


def measured(model: nn.Module, attack: Callable[[FoolboxModel], Tensor],
             ) -> tuple[Tensor, dict[str, Any]]:
    """Return the adversarials of an attack and its cost."""
    fmodel, passes = FoolboxModel(model), []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    cpu, wall = time.process_time(), time.perf_counter()
    found = attack(fmodel)
    cost = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall,
            "queries": fmodel.module.queries, "passes": len(passes)}
    hook.remove()
    return found, cost


def ours(attack: Any, model: nn.Module, x: Tensor, y: Tensor,
         eps: float = EPS) -> tuple[Tensor, dict[str, Any]]:
    return measured(model, lambda fmodel: attack.run(fmodel, x, Misclassification(y), epsilon=eps))


def arts(model: nn.Module, x: Tensor, y: Tensor, steps: int,
         stop: bool) -> tuple[Tensor, dict[str, Any]]:
    from art.attacks.evasion import ZooAttack
    from art.estimators.classification import PyTorchClassifier

    def attack(fmodel: FoolboxModel) -> Tensor:
        np.random.seed(SEED)  # source of its random coordinates
        classifier = PyTorchClassifier(fmodel.module, nn.CrossEntropyLoss(), tuple(x.shape[1:]),
                                       10, clip_values=(0.0, 1.0), device_type="cpu")
        zoo = ZooAttack(classifier, learning_rate=1e-2, initial_const=1.0, binary_search_steps=1,
                        max_iter=steps, nb_parallel=COORDINATES, variable_h=1e-4, batch_size=1,
                        use_resize=False, use_importance=False, abort_early=stop, verbose=False)
        return torch.from_numpy(zoo.generate(x.numpy(), y.numpy()))
    return measured(model, attack)


def speed(count: int) -> dict[str, Any]:
    model = network("float")
    x, y = images(model, count)
    few, steps, budget, more = 6, 7, 40, 20
    equal: dict[str, list[dict[str, Any]]] = {"ours": [], "art": []}
    for _ in range(5):
        attack = ZOO("l2", steps, coordinates=COORDINATES, seed=SEED)
        equal["ours"].append(ours(attack, model, x[:few], y[:few], eps=1e-3)[1])
        equal["art"].append(arts(model, x[:few], y[:few], steps, stop=False)[1])

    def hourly(record: dict[str, Any], number: int) -> float:
        return 3600 * number / record["cpu_seconds"]
    rates = {name: statistics.median(hourly(r, few) for r in runs)
             for name, runs in equal.items()}
    said = [f"{name} {r[0]['queries']} queries in {r[0]['passes']} passes, {rates[name]:.0f} "
            "images an hour" for name, r in equal.items()]
    print(f"equal queries, {few} images: {'; '.join(said)}; "
          f"{rates['ours'] / rates['art']:.1f} times", flush=True)
    used: dict[str, Any] = {}
    x, y = x[:more], y[:more]
    for name, run in {
            "ours": lambda: ours(ZOO("l2", budget, coordinates=COORDINATES, seed=SEED), model,
                                 x, y),
            "art": lambda: arts(model, x, y, budget, stop=False),
            "art, stopping early": lambda: arts(model, x, y, budget, stop=True)}.items():
        found, cost = run()
        used[name] = {**cost, "images": len(x), "broken": int(fooled(model, found, x, y).sum()),
                      "images_an_hour": hourly(cost, len(x))}
        print(f"equal budget, {len(x)} images, at most {budget * (2 * COORDINATES + 1) + 1} "
              f"queries each: {name}: {hourly(cost, len(x)):.0f} images an hour, "
              f"{cost['queries'] / len(x):.0f} queries an image, {used[name]['broken']} broken",
              flush=True)
    return {"equal_queries": {"images": few, "steps": steps, "runs": equal,
                              "images_an_hour": rates},
            "equal_budget": {"steps": budget, **used},
            "art": version("adversarial-robustness-toolbox")}


def share(count: int) -> dict[str, Any]:
    model = network("float")
    x, y = images(model, count)
    pgd = torch.zeros(len(x), dtype=torch.bool)
    for loss in ("ce", "margin"):
        pgd |= fooled(model, ours(PGD(loss, 100, norm="l2", seed=SEED), model, x, y)[0], x, y)
    record: dict[str, Any] = {"images": len(x), "pgd_broken": int(pgd.sum())}
    for name, attack in {
            "ZOO": ZOO("l2", 40, coordinates=COORDINATES, seed=SEED),
            "NES": NES("l2", 100, seed=SEED)}.items():
        found, cost = ours(attack, model, x, y)
        broken = fooled(model, found, x, y)
        record[name] = {"settings": vars(attack), **cost, "broken": int(broken.sum()),
                        "of_pgds": int((broken & pgd).sum()),
                        "queries_an_image": cost["queries"] / len(x)}
        most = attack.steps * (2 * getattr(attack, "coordinates", getattr(attack, "samples", 0))
                               + 1) + 1
        print(f"{name}: {int((broken & pgd).sum())} of the {int(pgd.sum())} images that PGD-100 "
              f"breaks, {int((broken & ~pgd).sum())} more, of {len(x)}; "
              f"{cost['queries'] / len(x):.0f} queries an image, at most {most}", flush=True)
    return record


def reach(count: int) -> dict[str, Any]:
    few, steps = min(count, 20), 14
    record: dict[str, Any] = {"images": few, "steps": steps}
    print(f"standing of {few} images, eps {EPS}, at most {steps * (2 * COORDINATES + 1) + 1} "
          "queries each; upper bounds")
    for row in ROWS:
        model = network(row)
        x, y = images(model, few)
        test = next(iter(load_data("fashion-mnist", "test", batch_size=2000)))
        with torch.no_grad():
            clean = float((model(test[0]).argmax(1) == test[1]).float().mean())
        attacks: dict[str, Any] = {f"ZOO {name}": ZOO("l2", steps, coordinates=COORDINATES,
                                                      seed=SEED, **options)
                                   for name, options in REACHES.items()}
        attacks["PGD-100"] = PGD("margin", 100, norm="l2", seed=SEED)
        attacks["softened-100"] = PGD(
            "margin", 100, norm="l2", sharpness=(2, 16), rel_step=0.4, decay=True, seed=SEED
        )
        cells, worst = {}, torch.ones(len(x), dtype=torch.bool)
        for name, attack in attacks.items():
            found, cost = ours(attack, model, x, y)
            stands = ~fooled(model, found, x, y)
            worst &= stands | (not name.startswith("ZOO"))
            cells[name] = {"standing": int(stands.sum()), "untouched": int(
                (found == x).flatten(1).all(1).sum()), **cost}
        record[row] = {"clean_accuracy_of_2000": clean, "cells": cells,
                       "standing_worst_h": int(worst.sum())}
        print(f"{row:6} clean {clean:.1%}  " + "  ".join(
            f"{name}: {c['standing']}" for name, c in cells.items()) +
            f"  worst h: {int(worst.sum())}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=("speed", "share", "reach"),
                        default=["speed", "share", "reach"])
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = HERE / "zoo.json"
    for part in args.parts:
        result = {"speed": speed, "share": share, "reach": reach}[part](args.images)
        # read again: another part may have run meanwhile
        record = json.loads(target.read_text()) if target.exists() else {}
        record[part] = {**result, "eps": EPS, "seed": SEED, "coordinates": COORDINATES,
                        "python": platform.python_version(), "torch": version("torch"),
                        "cores": os.cpu_count(), "threads": 1, "machine": platform.machine()}
        HERE.mkdir(exist_ok=True)
        write_text(target, json.dumps(record))


if __name__ == "__main__":
    main()
