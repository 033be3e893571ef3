"""What the quantization of each site costs."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from fine_tuning import THREAT, Digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.core.errors import DataError, SpecError
from quantguard.core.specs import Threat
from quantguard.data.train_batches import hold_out
from quantguard.evaluation.site_sensitivity import one_float
from quantguard.nn.quant_activation import quantizers
from quantguard.training.validation import costs


def test_one_site_is_float_in_every_context(quantized: nn.Module, digits: Digits) -> None:
    model, x = copy.deepcopy(quantized), digits[0][:8]
    names = list(quantizers(model))
    expected = copy.deepcopy(model)
    expected[int(names[1])] = nn.ReLU()
    with torch.no_grad(), one_float(model, names[1]):
        assert list(quantizers(model)) == [names[0], *names[2:]]
        assert torch.equal(model(x), expected(x))
        with qg.soften(model, 3.0), qg.soften(expected, 3.0):
            assert torch.equal(model(x), expected(x))
    with torch.no_grad():
        assert torch.equal(model(x), quantized(x)) and list(quantizers(model)) == names


@pytest.mark.slow
def test_a_damaged_site_costs_most(quantized: nn.Module, digits: Digits,
                                            loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(quantized)
    names = list(quantizers(model))
    bad = quantizers(model)[names[2]]
    bad.set_thresholds(bad.thresholds + 3, bad.step)  # hardly anything passes
    found = qg.sensitivity(model, [(digits[0][:64], digits[1][:64])], Threat(eps=0.05),
                           suite=[qg.attacks.PGD("ce", 3)], progress=False)
    assert list(found.sites) == names
    assert max(names, key=lambda name: found.cost(name)[0]) == names[2]
    assert found.cost(names[2])[0] > 20 and names[2] in str(found).splitlines()[2]
    assert json.loads(json.dumps(found.to_dict()))["sites"].keys() == set(names)
    assert list(quantizers(model)) == names
    quick = costs(model, [(digits[0][:64], digits[1][:64])], Threat(eps=0.05), 0)
    assert max(names, key=lambda name: quick[name][0]) == names[2]


def test_a_float_model_has_no_site_to_cost(cnn: nn.Module, digits: Digits) -> None:
    with pytest.raises(SpecError, match="no quantized site"):
        qg.sensitivity(cnn, [(digits[0][:8], digits[1][:8])], progress=False)


def test_sensitivity_refuses_rows_of_different_images(quantized: nn.Module, digits: Digits) -> None:
    loader = DataLoader(TensorDataset(*digits), batch_size=20, shuffle=True,
                        generator=torch.Generator())
    with pytest.raises(DataError, match="different images"):
        qg.sensitivity(quantized, loader, THREAT, suite=[PGD("ce", 1)], images=20, progress=False)


def test_site_costs_do_not_depend_on_the_callers_random_numbers(
        quantized: nn.Module, digits: Digits, loader: DataLoader[Any]) -> None:
    val = DataLoader(TensorDataset(*digits), batch_size=50, shuffle=True)

    def found() -> dict[str, tuple[float, float]]:
        some = hold_out(loader, val, None, 0).some
        assert some is not None
        return costs(quantized, some, THREAT, 0)
    before = torch.get_rng_state()
    first = found()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert found() == first
