"""Threats: an eps in wrong units is refused, and the default depends on the bounds."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.core.errors import SpecError
from quantguard.core.specs import Threat
from quantguard.data.batches import from_pixels
from quantguard.evaluation.results import Evaluation
from quantguard.training.certified import CertifiedObjective

Digits = tuple[Tensor, Tensor]
QUICK: dict[str, Any] = {"suite": [PGD("ce", 5)], "progress": False, "images": 60}


class Scaled(nn.Module):
    """A network for pixels from ``low`` to ``high``, around one for pixels from 0 to 1."""

    def __init__(self, net: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.net, self.low, self.width = net, low, high - low

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.low) / self.width)  # type: ignore[no-any-return]


@pytest.mark.parametrize("bounds", [(0, 1), (0, 255), (-1, 1), (-3, 3), (0, 16), (0, 65535)])
def test_the_default_is_8_of_255_levels_whatever_the_bounds(bounds: tuple[float, float]) -> None:
    threat = Threat(bounds=bounds)
    assert threat.eps == pytest.approx(8 / 255 * (bounds[1] - bounds[0]), rel=1e-12)
    assert ("8 of 255 grey levels" in str(threat)) == (bounds != (0, 1))
    assert Threat(**json.loads(json.dumps(threat.to_dict()))) == threat
    assert pickle.loads(pickle.dumps(threat)) == threat
    assert dataclasses.replace(threat, norm="linf") == threat
    assert Threat() == Threat(eps=8 / 255)


@pytest.mark.parametrize("bounds", [(0, 255), (-1, 1), (-2, 5)])
def test_the_same_model_in_other_pixels_is_as_robust(bounds: tuple[int, int], cnn: nn.Module,
                                                     digits: Digits) -> None:
    with torch.no_grad():  # the images with the smallest margins
        two = cnn(digits[0]).topk(2).values
    rows = (two[:, 0] - two[:, 1]).argsort()[:60]
    x, y = digits[0][rows], digits[1][rows]
    low, high = bounds
    plain = qg.evaluate(cnn, [(x, y)], Threat(), **QUICK)
    other = qg.evaluate(Scaled(cnn, low, high), [(low + x * (high - low), y)],
                        Threat(bounds=bounds), **QUICK)
    assert plain.robust_accuracy < plain.clean_accuracy
    assert abs(int(plain.survived.sum()) - int(other.survived.sum())) <= 1
    assert "8 of 255 grey levels" in str(other)


@pytest.mark.parametrize(("options", "meant"), [
    ({"eps": 8 / 255, "bounds": (0, 255)}, "eps=8 "),
    ({"eps": 0.1, "bounds": (0, 255)}, "eps=25.5"),
    ({"eps": 0.3, "bounds": (0, 255)}, "eps=76.5"), ({"eps": 8 / 255, "bounds": (0, 16)}, "0.502"),
    ({"eps": 0.5, "bounds": (0, 255), "norm": "l2"}, "127.5"),
    ({"eps": 3, "bounds": (0, 255), "norm": "l2"}, "eps=765"),
    ({"eps": 8}, r"eps=0.03137 \(8/255\)"), ({"eps": 8, "bounds": (-1, 1)}, r"eps=0.06275 \(8/255"),
    ({"eps": 300, "bounds": (0, 255)}, "within the range")])
def test_a_radius_in_other_units_is_refused_with_a_suggestion(options: dict[str, Any],
                                                                meant: str) -> None:
    with pytest.raises(SpecError, match=meant):
        Threat(**options)


@pytest.mark.parametrize("options", [
    {"eps": 0}, {"eps": 1e-6}, {"eps": 1e-3}, {"eps": 1}, {"eps": 1e-4, "norm": "l2"},
    {"eps": 0, "bounds": (0, 255)}, {"eps": 1, "bounds": (0, 255)},
    {"eps": 255, "bounds": (0, 255)}, {"eps": 128, "bounds": (0, 255), "norm": "l2"},
    {"eps": 1e-3, "bounds": (-1, 1)},
    {"eps": 8 / 255, "bounds": (-1, 1)}, {"eps": 1e-3, "bounds": (-3, 3)},
    {"eps": 0, "norm": "l2"}])
def test_radii_of_papers_are_accepted(options: dict[str, Any]) -> None:
    assert Threat(**options).eps == options["eps"]


def test_a_suggestion_for_small_radii_is_the_same_threat() -> None:
    with pytest.raises(SpecError) as caught:
        Threat(eps=0.5, bounds=(-100, 155))
    written = str(caught.value).split("use pixels from 0 to 1: ")[1].rstrip(".")
    other = eval(written, {"Threat": Threat})  # the code in the message
    x = torch.rand(50)
    assert torch.allclose(from_pixels(x[:, None], other)[:, 0], x * 255 - 100, atol=0.1)
    assert other.eps == pytest.approx(0.5 / 255, rel=1e-2)


def test_radii_below_a_grey_level_are_marked() -> None:
    assert "less than a grey level" in str(Threat(eps=0.001))
    assert "grey" not in str(Threat(eps=0)) + str(Threat(eps=1 / 255)) + str(Threat(eps=0.1))


def test_other_pixels_are_the_same_input() -> None:
    threat = Threat("linf", 4, (0, 255), (123.7, 116.3, 103.5), (58.4, 57.1, 57.4))
    unit = threat.in_pixels_of(0, 1)
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(from_pixels(x, unit), from_pixels(x * 255, threat), atol=1e-5)
    assert unit.eps == pytest.approx(4 / 255)
    back = unit.in_pixels_of(0, 255)
    assert back.eps == pytest.approx(4) and back.mean == pytest.approx(threat.mean)
    assert Threat(eps=4, bounds=(0, 255)).at(1e-9).eps == 1e-9


def test_radii_that_grow_from_zero_are_accepted() -> None:
    """``ibp`` with ``box`` attacks at a share of a radius that starts at 0."""
    made = CertifiedObjective.__new__(CertifiedObjective)
    made.threat, made.recipe, made.eps = Threat(bounds=(0, 255)), qg.Recipe("ibp", box=0.5), 0.01
    assert made.attacker.eps == pytest.approx(0.005)


def test_an_old_result_in_wrong_units_is_refused(cnn: nn.Module, digits: Digits) -> None:
    record = qg.evaluate(cnn, [digits], Threat(), **QUICK).to_dict()
    assert math.isclose(Evaluation.from_dict(record).threat.eps, 8 / 255)
    record["threat"] = {**record["threat"], "bounds": [0.0, 255.0]}
    with pytest.raises(SpecError, match="grey levels"):
        Evaluation.from_dict(record)
