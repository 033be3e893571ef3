"""The optimizer: one pass over memory computes what torch's own does, however tensors lie."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from quantguard.training import optim
from quantguard.training.optim import AdamW

BETAS = (0.9, 0.99)


def weights(layout: torch.memory_format) -> nn.Parameter:
    g = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(8, 4, 3, 3, generator=g).contiguous(memory_format=layout))


def gradient(step: int, layout: torch.memory_format) -> Tensor:
    g = torch.Generator().manual_seed(step + 1)
    return torch.randn(8, 4, 3, 3, generator=g).contiguous(memory_format=layout)


def trained(optimizer: torch.optim.Optimizer, parameter: nn.Parameter,
            layout: torch.memory_format, first: int = 0) -> Tensor:
    for step in range(first, first + 3):
        parameter.grad = gradient(step, layout)
        optimizer.step()
    return parameter.detach()


def expected(steps: int) -> Tensor:
    """Six steps of torch's AdamW, one operation after the other."""
    parameter = weights(torch.contiguous_format)
    optimizer = torch.optim.AdamW([{"params": [parameter], "weight_decay": 0.1}], lr=0.01,
                                  betas=BETAS, foreach=False)
    for first in range(0, steps, 3):
        trained(optimizer, parameter, torch.contiguous_format, first)
    return parameter.detach()


def ours(parameter: nn.Parameter) -> AdamW:
    return AdamW([{"params": [parameter], "weight_decay": 0.1, "lr": 0.01}], BETAS)


LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_gradients", LAYOUTS)
def test_steps_equal_torchs_in_every_layout_of_gradients(
        layout: torch.memory_format, of_gradients: torch.memory_format) -> None:
    parameter = weights(layout)
    found = trained(ours(parameter), parameter, of_gradients)
    assert torch.allclose(found, expected(3), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumes_in_another_layout_of_weights(
        layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    def resumed() -> Tensor:
        before = weights(torch.channels_last)
        optimizer = ours(before)
        trained(optimizer, before, torch.channels_last)
        after = nn.Parameter(before.detach().contiguous(memory_format=layout))
        other = ours(after)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return trained(other, after, layout, 3)
    assert torch.allclose(resumed(), expected(6), rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(optim, "_in_layout_of", lambda _like, value: value)
    right = torch.allclose(resumed(), expected(6), rtol=1e-6, atol=1e-7)
    assert right is (layout == torch.channels_last)  # else moments meet other weights


def test_only_cpu_weights_use_the_fused_kernel() -> None:
    meta = nn.Parameter(torch.zeros(2, 2, device="meta"))
    assert ours(weights(LAYOUTS[0])).defaults["fused"] is True
    assert ours(meta).defaults["fused"] is None
