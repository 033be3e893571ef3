"""Branch and bound certifies all robust images of small networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bounded_nets import (
    images,
    quantizer,
    true_margin,
)
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import Noise
from quantguard.certification import branch_and_bound as branching
from quantguard.certification import image_bounds
from quantguard.certification.certificate import Certificate
from quantguard.certification.graph.graph import model_graph
from quantguard.cli.demo import train_clean


def quantized_inputs(seed: int) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    """Return a network of three inputs with eight levels each, images, labels, true margins."""
    g = torch.Generator().manual_seed(seed)
    levels = qg.QuantActivation.from_thresholds([i / 8 for i in range(1, 8)], 0.2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = 12 if seed == 2 else 0
        model = nn.Sequential(levels, nn.Linear(3, 12), quantizer(2, g, channels),
                              nn.Linear(12, 12), quantizer(2, g, channels, seed == 1),
                              nn.Linear(12, 3)).eval()
    x = images(100, seed, (3,))
    with torch.no_grad():
        model[-1].bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    return model, x, y, np.array([true_margin(model, levels, image, int(label), 0.15)
                                  for image, label in zip(x, y, strict=True)])


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_branch_and_bound_certifies_all_that_is_robust(seed: int) -> None:
    model, x, y, truth = quantized_inputs(seed)
    whole, split = (qg.certify(model, [(x, y)], qg.Threat(eps=0.15), splits=splits, progress=False)
                  for splits in (0, 2000))
    assert whole.certified.sum() < split.certified.sum() == (truth > 1e-3).sum()
    assert (split.certified == (truth > 0)).all() and (split.lower <= truth).all()


def test_dropping_half_of_each_split_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, truth = quantized_inputs(0)
    split = branching._BoundedBoxes.split
    monkeypatch.setattr(branching._BoundedBoxes, "split", lambda self, row: split(self, row)[:1])
    # and without an attack on the other half
    monkeypatch.setattr(image_bounds, "PGD", lambda *args, **settings: Noise("linf", 1))
    found = qg.certify(model, [(x, y)], qg.Threat(eps=0.15), splits=2000, progress=False)
    assert (found.certified & (truth <= 0)).any()


@pytest.mark.parametrize(("axis", "shape"), [
    (1, (3,)), (-1, (3,)), (1, (3, 2)), (-1, (2, 3)), (2, (2, 3)), (1, (3, 2, 2)), (-1, (2, 2, 3)),
    (-3, (3, 2, 2))])
def test_a_split_is_at_the_thresholds_of_its_channel(axis: int, shape: tuple[int, ...]) -> None:
    levels = qg.QuantActivation(qg.QuantSpec(2, per_channel=True), channels=3, axis=axis)
    thresholds = (torch.arange(9.0).reshape(3, 3) + 1) / 10
    levels.set_thresholds(thresholds, 0.2)
    many = int(np.prod(shape))
    model = nn.Sequential(nn.Unflatten(1, shape), levels, nn.Flatten(), nn.Linear(many, 2)).eval()
    graph = model_graph(model, qg.Threat(), None, torch.zeros(1, many))
    whole = branching._Box(torch.zeros(1, many), torch.ones(1, many), {}, 0.0)
    bounded = branching._BoundedBoxes(graph, [whole], torch.zeros(1, dtype=torch.long))
    (node,) = bounded.inputs
    rows = torch.arange(3).reshape([-1 if d == axis % (len(shape) + 1) - 1 else 1
                                    for d in range(len(shape))]).expand(shape).flatten()
    for element, row in enumerate(rows.tolist()):
        assert torch.equal(bounded._thresholds_inside(0, node, element), thresholds[row].double())
    x = torch.rand(8, many, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    qg.certify(model, [(x, y)], qg.Threat(eps=0.05), splits=20, progress=False)


def test_splits_close_the_bracket_of_a_net_of_few_inputs(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(400, 4, generator=g)
    y = ((x[:, 0] - 0.5) * (x[:, 1] - 0.5) > 0).long() + (x[:, 2] > 0.6).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                              nn.Linear(32, 3))
        train_clean(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 50),
                    40, progress=False)
    loader, threat = [(x[:100], y[:100])], qg.Threat(eps=0.05)
    attacked = qg.evaluate(model, loader, threat, suite="quick", progress=False)
    whole, split = (qg.certify(model, loader, threat, splits=splits, progress=False)
                  for splits in (0, 5000))
    assert whole.certified.sum() < split.certified.sum()
    assert (split.certified <= attacked.survived).all()
    assert split.certified.sum() >= attacked.survived.sum() - 1
    assert Certificate.from_dict(split.to_dict()).splits == 5000
    again = qg.certify(model, loader, threat, splits=5000, progress=False, run_dir=tmp_path)
    more = qg.certify(model, loader, threat, splits=5000, progress=False, run_dir=tmp_path)
    assert (again.certified == split.certified).all() and (more.lower == again.lower).all()
    none = qg.certify(model, loader, threat, splits=5000, progress=False, budget=1e-6)
    assert (none.certified <= split.certified).all()
    for threat, splits in ((qg.Threat("l2", 0.1), 3), (qg.Threat(), -1)):
        with pytest.raises(qg.SpecError, match="splits"):
            qg.certify(model, loader, threat, splits=splits)
