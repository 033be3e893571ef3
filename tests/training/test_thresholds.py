"""Training of thresholds: what moves, what stays, levels in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fine_tuning import loader_of, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from quantguard.conversion.converter import convert
from quantguard.core.errors import SpecError
from quantguard.data.train_batches import hold_out
from quantguard.nn.contexts import listening
from quantguard.nn.quant_activation import QuantActivation, quantizers
from quantguard.training import trainer
from quantguard.training.recipes import Recipe
from quantguard.training.validation import Validation


def test_thresholds_only_changes_quantizers_and_nothing_else(
        quantized: nn.Module, small: TensorDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    # the last epoch is returned
    monkeypatch.setattr(trainer, "validate", lambda *_: Validation(None, None, 0))
    model, _ = trained(quantized, loader_of(small), recipe=Recipe("pgd", steps=1),
                       train="thresholds")
    own = {f"{name}.{p}" for name, m in quantizers(model).items() for p, _ in m.named_parameters()}
    before, after = quantized.state_dict(), model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == own


def test_thresholds_only_needs_learned_thresholds(cnn: nn.Module, quantized: nn.Module,
                                                  small: TensorDataset) -> None:
    for model in (cnn, nn.Sequential(*(m for m in quantized if not quantizers(m)))):
        with pytest.raises(SpecError, match="no learnable thresholds(.|\n)*dynamic=True"):
            trained(model, loader_of(small), train="thresholds")


def test_frozen_thresholds_stay(cnn: nn.Module, small: TensorDataset) -> None:
    model = convert(cnn, bits=2, dynamic=True)
    for module in quantizers(model).values():
        module.requires_grad_(False)
    with pytest.raises(SpecError, match="no learnable thresholds(.|\n)*They are frozen"):
        trained(model, loader_of(small), train="thresholds", recipe=Recipe("pgd", steps=1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(SpecError, match="every parameter is frozen"):
        trained(model, loader_of(small))
    model[0].requires_grad_(True)
    after, _ = trained(model, loader_of(small), epochs=1)
    assert not torch.equal(after[0].weight, model[0].weight)
    for name, module in quantizers(after).items():
        assert torch.equal(module.thresholds, quantizers(model)[name].thresholds)


@pytest.mark.parametrize(("bits", "per_channel", "train"), [
    (2, False, "all"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (3, True, "thresholds"), (2, False, "thresholds"), (3, True, "all"), (4, False, "all"),
        (4, False, "thresholds")))])
def test_thresholds_move_stay_ordered_and_inside_the_data(
        cnn: nn.Module, train_digits: TensorDataset, bits: int, per_channel: bool, train: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    # the last epoch is returned
    monkeypatch.setattr(trainer, "validate", lambda *_: Validation(None, None, 0))
    images = train_digits.tensors[0]
    converted = convert(cnn, bits, dynamic=True, per_channel=per_channel, data=[images[:512]])
    before = {name: m.thresholds.detach() for name, m in quantizers(converted).items()}
    touched = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in before.items()}

    def note(module: Any, gradient: Tensor) -> None:
        touched[module.name] |= gradient != 0

    def noting(module: QuantActivation) -> Tensor:
        t: Tensor = thresholds(module)
        if t.requires_grad:
            t.register_hook(lambda g: note(module, g))
        return t

    for name, module in quantizers(converted).items():
        module.name = name  # type: ignore[assignment]
    thresholds = QuantActivation.thresholds.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(QuantActivation, "thresholds", property(noting))
    loader = DataLoader(Subset(train_digits, range(640)), batch_size=8)
    model, history = trained(converted, loader, epochs=4, recipe=Recipe("clean"), train=train)
    assert history.chosen == 4 and 4 * hold_out(loader, None, None, 0).count() >= 200
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), listening(model, {name: lambda z, name=name: seen.update({name: z})
                                            for name in before}):
        model.eval()(images[:1000])
    assert history.levels.keys() == before.keys()
    for name, module in quantizers(model).items():
        t, z = module.thresholds.detach(), seen[name]
        moved = t != before[name]
        assert moved[touched[name]].all(), name
        assert (t[..., 1:] > t[..., :-1]).all()
        assert t.max() <= z.max() and t.min() >= z.min()


def test_unused_levels_are_reported(cnn: nn.Module, small: TensorDataset,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    converted = convert(cnn, 2, dynamic=False)
    name, module = next(iter(quantizers(converted).items()))
    module.set_thresholds([0.1, 0.2, 1e6], 0.1)  # nothing reaches the last level
    _, history = trained(converted, loader_of(small), epochs=1, recipe=Recipe("clean", lr=1e-5),
                         progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "levels" in line]
    assert history.levels[name] == 3 and set(list(history.levels.values())[1:]) == {4}
    assert len(lines) == 1 and lines[0].startswith(f"{name} uses 3 of its 4 levels")
