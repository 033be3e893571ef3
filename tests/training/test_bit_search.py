"""The search for the lowest bits with high enough clean accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fine_tuning import THREAT, inner
from hardening_stages import FAST, staged
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.core.errors import SpecError
from quantguard.nn.quant_activation import quantizers
from quantguard.training import bit_search, stage_trainer
from quantguard.training.history import Epoch, History
from quantguard.training.recipes import Recipe


def history_of(clean: float) -> History:
    return History((Epoch(0, None, clean, 0.5, 1e-3, 0.0),), 0, 1e-3, {})


def faked(clean: dict[str, float], monkeypatch: pytest.MonkeyPatch,
          sites: dict[str, tuple[float, float]]) -> list[str]:
    """Give every stage a clean accuracy, and train nothing."""
    seen: list[str] = []

    def fit(model: nn.Module, *_: Any, **options: Any) -> History:
        bits = sorted({m.spec.bits for m in inner(model).values()})
        seen.append("+".join(map(str, bits)) or "float")
        return history_of(clean[seen[-1]])
    monkeypatch.setattr(stage_trainer, "fit", fit)
    monkeypatch.setattr(bit_search, "costs", lambda *_: sites)
    return seen


NONE = {"2": (0.0, 0.0), "5": (0.0, 0.01), "9": (0.0, 0.0), "12": (0.0, 0.0)}
# sites 5 and 9 give back half of the lost accuracy; 5 also gains most robust accuracy
ONE = {**NONE, "2": (0.0, 0.2), "5": (0.03, 0.1), "9": (0.04, 0.05)}


@pytest.mark.parametrize(("clean", "sites", "expected", "bits"), [
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.885, "2": 0.88}, NONE, ["8", "4", "3", "2"], [2]),
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.87}, NONE, ["8", "4", "3"], [4]),
    ({"float": 0.9, "8": 0.87}, NONE, ["8"], []),
    # a single site costs the accuracy: with its earlier bits that is accepted, or not
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.87, "3+4": 0.885}, ONE,
     ["8", "4", "3", "3+4"], [3, 4]),
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.87, "3+4": 0.875}, ONE,
     ["8", "4", "3", "3+4"], [4])])
def test_the_lowest_accurate_bits_are_returned(
        clean: dict[str, float], sites: Any, expected: list[str], bits: list[int], cnn: nn.Module,
        loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    seen = faked(clean, monkeypatch, sites)
    made = staged(cnn, loader, bits=None, max_clean_drop=0.02, progress=True)
    # float is trained first, and then as many epochs as every other stage
    assert seen == ["float", "float", *expected]
    assert sorted({m.spec.bits for m in inner(made.model).values()}) == bits
    log = capsys.readouterr().err
    assert log.count("held-out clean") == len(seen)
    assert [s.holds for s in made.stages] == [clean[name] >= 0.88 - 1e-9 for name in seen]


def test_bits_are_compared_with_a_float_control_of_as_many_epochs(
        cnn: nn.Module, loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, Tensor]] = []
    clean = iter([0.80, 0.90, 0.89, 0.87])  # the second float stage continues the first

    def fit(model: nn.Module, *_: Any, **options: Any) -> History:
        starts.append({k: v.clone() for k, v in model.state_dict().items() if "weight" in k})
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return history_of(next(clean))
    monkeypatch.setattr(stage_trainer, "fit", fit)
    monkeypatch.setattr(bit_search, "costs", lambda *_: NONE)
    made = staged(cnn, loader, bits=4, max_clean_drop=0.02)
    assert [s.holds for s in made.stages] == [True, True, True, False]
    assert [s.name for s in made.stages] == ["float", "float control", "8 bits", "4 bits"]
    first = "0.weight"
    assert torch.equal(starts[0][first] + 1, starts[1][first])
    assert all(torch.equal(starts[1][first], other[first]) for other in starts[2:])
    # recipes that reinitialise the weights need no float stage
    clean = iter([0.9, 0.89, 0.885])
    made = staged(cnn, loader, bits=4, max_clean_drop=0.02, recipe=Recipe("ibp"))
    assert [s.name for s in made.stages] == ["float control", "8 bits", "4 bits"]


def test_the_search_on_real_digits(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    model = qg.harden(cnn, loader, THREAT, bits=4, recipe=Recipe("clean", lr=1e-3), epochs=1,
                      max_clean_drop=0.2, progress=False)
    assert {m.spec.bits for m in quantizers(model).values()} == {4}


def test_one_site_is_named_although_its_name_is_also_a_kind(
        monkeypatch: pytest.MonkeyPatch, loader: DataLoader[Any]) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))  # type: ignore[no-any-return]

    model = Functional().eval()
    names = [site.name for site in qg.inspect(model).sites]
    assert names[0] == "relu" and len(names) == 2  # both are of kind relu
    faked({"float": 0.9, "8": 0.9, "4": 0.87, "4+8": 0.89}, monkeypatch,
          {names[0]: (0.03, 0.1), names[1]: (0.0, 0.0)})
    made = staged(model, loader, bits=None, max_clean_drop=0.02)
    assert made.stages[-1].name == f"4 bits, {names[0]} 8"
    assert {n: m.spec.bits for n, m in inner(made.model).items()} == {names[0]: 8, names[1]: 4}


@pytest.mark.parametrize(("options", "message"), [
    ({"max_clean_drop": 2.0}, "from 0 to 1"),
    ({"max_clean_drop": 0.1, "bits": 32}, "not one of them"),
    ({"max_clean_drop": 0.1, "bits": 0}, "not one of them"),
    ({"max_clean_drop": 0.1, "bits": 9}, "not one of them"),
    ({"max_clean_drop": 0.1, "train": "thresholds"}, "leaves nothing to train"),
    ({"max_clean_drop": 0.1, "recipe": Recipe("pgd", bit_schedule=(32,))},
     "a bit schedule of its own"),
    ({"max_clean_drop": 0.1, "bits": {"*": 2, "first": 4}}, "the same at every site")])
def test_impossible_goals(options: dict[str, Any], message: str, cnn: nn.Module,
                          loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_trainer, "fit", lambda *_, **__: pytest.fail("it has trained"))
    with pytest.raises(SpecError, match=message):
        staged(cnn, loader, **options)


def test_the_search_needs_a_float_model_and_held_out_images(
        cnn: nn.Module, quantized: nn.Module, loader: DataLoader[Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="this one is converted"):
        staged(quantized, loader, max_clean_drop=0.1)
    monkeypatch.setattr(stage_trainer, "fit", lambda *_, **__: pytest.fail("it has trained"))
    images = TensorDataset(torch.cat([x for x, _ in loader]))
    for data, recipe in ((list(loader)[:2], FAST),
                         (DataLoader(images, batch_size=64), Recipe("clean", distill=1.0))):
        with pytest.raises(SpecError, match="needs held-out images with labels"):
            staged(cnn, data, max_clean_drop=0.1, epochs=1, recipe=recipe)
