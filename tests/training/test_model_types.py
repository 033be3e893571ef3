"""Models in other modes, memory layouts and types."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fine_tuning import FAST, THREAT, loader_of, trained
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from quantguard.core.errors import SpecError
from quantguard.training.recipes import Recipe
from quantguard.training.trainer import fit


def test_a_model_in_train_mode_trains_without_a_warning(quantized: nn.Module, small: TensorDataset,
                                                        recwarn: pytest.WarningsRecorder) -> None:
    model, _ = trained(copy.deepcopy(quantized).train(), loader_of(small), epochs=1)
    assert model.training and not [str(w.message) for w in recwarn]


class Viewing(nn.Module):
    """Asks for a view that channels-last order cannot give, or for a copy where there is none."""

    def __init__(self, channels: int, view: bool) -> None:
        super().__init__()
        self.first, self.conv = (nn.Conv2d(n, 4, 3, padding=1) for n in (channels, 4))
        self.last, self.view = nn.Linear(256, 2), view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x).relu()).relu()
        flat = y.view(len(y), -1) if self.view else y.reshape(len(y), -1)
        return self.last(flat)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("channels", "view"), [(3, False), (3, True), (1, False), (1, True)])
def test_images_have_the_models_layout_and_weights_are_contiguous_again(
        channels: int, view: bool) -> None:
    model = Viewing(channels, view).eval()
    loader = [(torch.rand(8, channels, 8, 8), torch.tensor([0, 1] * 4))] * 2
    seen = []
    handle = model.conv.register_forward_hook(lambda _, __, y: seen.append(
        y.is_contiguous(memory_format=torch.channels_last)))
    fit(model, loader, THREAT, FAST, epochs=1, val=loader[:1], progress=False)
    handle.remove()
    assert seen[-1] is not view and model.conv.weight.is_contiguous()


class Writes(nn.Module):
    """Writes a float32 tensor into its features, which bfloat16 ones do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
        self.register_buffer("value", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1))
        y[:, [0]] = self.value
        return self.last(self.relu(y))  # type: ignore[no-any-return]


def test_a_model_that_does_not_run_in_bfloat16_is_refused(small: TensorDataset) -> None:
    with pytest.raises(SpecError, match="does not run in bfloat16"):
        trained(Writes().eval(), loader_of(small), epochs=1,
                recipe=Recipe("pgd", steps=1, precision="bfloat16"))


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"of": "mine"}

    def set_extra_state(self, state: Any) -> None:
        assert state


def test_state_other_than_tensors_is_refused_before_any_work(small: TensorDataset) -> None:
    net = nn.Sequential(nn.Flatten(), Extra(64, 10))
    with pytest.raises(SpecError, match="1._extra_state in the model's state is a dict"):
        trained(net, loader_of(small), epochs=1)
