"""A model that computes something else while it is traced gets no certificate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from custom_forward import Net, certified
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

import quantguard as qg


def traced(x: Any) -> bool:
    """Return whether torch.fx is tracing."""
    return isinstance(x, fx.Proxy)


def halves(m: Net, x: Any) -> Any:
    return torch.cat([m.head(x), -m.head(x)], 1)


def swallowed(x: Any) -> float:
    try:
        return -1.0 if x.shape[0] >= 0 else 1.0
    except Exception:
        return 1.0


def read_inside(x: Any) -> bool:
    """Read values inside of a torch function override, in which no mode is active."""
    if has_torch_function_unary(x):
        return handle_torch_function(read_inside, (x,), x)  # type: ignore[no-any-return]
    return bool((x.numpy() > 0.999).any())


def applied(x: Tensor) -> bool:
    values: list[float] = []
    x.clone().apply_(lambda v: values.append(v) or v)
    return max(values) > 0.999


BRANCHES: dict[str, Callable[[Net, Any], Any]] = {
    "number": lambda m, x: m.head(x) * (1.0 if traced(x) else -1.0),
    "integer": lambda m, x: m.head(x) * (1 if traced(x) else 2),
    "made tensor": lambda m, x: m.head(x) * (torch.ones(3) * (1 if traced(x) else -1)),
    "full": lambda m, x: m.head(x) * torch.full((3,), 1.0 if traced(x) else 0.5),
    "alpha=": lambda m, x: torch.add(m.head(x), m.ones, alpha=1 if traced(x) else -7),
    "clamp": lambda m, x: m.head(x).clamp(-9, 9.0 if traced(x) else 0.1),
    "buffer": lambda m, x: m.head(x) * (m.ones if traced(x) else m.twos),
    "parameter": lambda m, x: m.head(x) + (m.head.bias if traced(x) else m.other.bias),
    "layer": lambda m, x: (m.head if traced(x) else m.other)(x),
    "transposed": lambda m, x: m.head(x @ (m.body.weight if traced(x) else m.body.weight.t())),
    "index": lambda m, x: m.head(x)[:, [0, 1, 2] if traced(x) else [2, 1, 0]],
    "which result": lambda m, x: (m.head(x), m.other(x))[0 if traced(x) else 1],
    "which window": lambda m, x: halves(m, x)[:, slice(0, 3) if traced(x) else slice(3, 6)],
    "window later on": lambda m, x: (lambda y: 2 * (y[0] if traced(x) else y[1]))(
        halves(m, x).chunk(2, 1)),
    "type": lambda m, x: m.head(x) * (-1.0 if type(x) is Tensor else 1.0),
    "swallowed": lambda m, x: m.head(x) * swallowed(x),
    "is tracing": lambda m, x: m.head(x) * (
        1.0 if torch.fx._symbolic_trace.is_fx_symbolic_tracing() else -1.0),
    "gradients on": lambda m, x: m.head(x) * (
        -1.0 if torch.is_grad_enabled() and not traced(x) else 1.0),
    "a read inside": lambda m, x: -m.head(x) if not traced(x) and read_inside(x) else m.head(x),
    "apply_": lambda m, x: -m.head(x) if not traced(x) and applied(x) else m.head(x),
}


@pytest.mark.parametrize("case", BRANCHES)
def test_a_branch_on_tracing_is_refused(case: str) -> None:
    with pytest.raises(qg.ConversionError):
        certified(Net(BRANCHES[case]))


class HarmlessCopy(Net):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        clone = Net(lambda m, x: m.head(x))
        clone.load_state_dict(self.state_dict())
        return clone


def test_the_model_itself_is_checked_and_not_its_copy() -> None:
    with pytest.raises(qg.ConversionError):
        certified(HarmlessCopy(lambda m, x: m.head(x) if traced(x) else
                       m.head(x) * (1 - 2 * (x[:, :1] > 0.999).float())))
