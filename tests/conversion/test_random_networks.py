"""Random networks pass the checks of the model zoo."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conversion_zoo.base import Setting, rows
from conversion_zoo.checks import (
    assert_active,
    assert_copied,
    assert_levels,
    assert_restored,
    assert_same_everywhere,
    assert_untouched,
    kinds,
    saved,
)
from conversion_zoo.pairs import pair_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantguard.conversion.converter import conversion_of
from quantguard.nn.quant_activation import QuantActivation

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")]
ACTIVATIONS: dict[str, tuple[str, Callable[[Any, Tensor, int], Tensor]]] = {
    "module": ("gelu", lambda self, x, i: self.acts[i](x)),
    "in-place module": ("relu", lambda self, x, i: self.acts[i](x)),
    "shared module": ("tanh", lambda self, x, i: self.shared(x)),
    "function": ("relu", lambda self, x, i: F.relu(x)),
    "function with a number": ("leaky_relu", lambda self, x, i: F.leaky_relu(x, 0.1 * (i + 1))),
    "method": ("tanh", lambda self, x, i: x.tanh()),
    "in place": ("relu", lambda self, x, i: F.relu_(x)),
    "in-place method": ("tanh", lambda self, x, i: x.tanh_()),
    "clamp": ("relu", lambda self, x, i: x.clamp(min=0)),
    "clamp in place": ("relu", lambda self, x, i: x.clamp_(min=0)),
    "product": ("relu", lambda self, x, i: x * (x > 0)),
    "where": ("leaky_relu", lambda self, x, i: torch.where(x > 0, x, 0.25 * x)),
    "silu": ("silu", lambda self, x, i: x * torch.sigmoid(x)),
    "learned": ("prelu", lambda self, x, i: F.prelu(x, self.slope)),
    "chain": ("gelu relu", lambda self, x, i: F.gelu(F.relu(x - 0.2))),
    "gate": ("", lambda self, x, i: x * torch.sigmoid(self.layers[i](x))),
}
STEPS = ("act", "act", "residual", "layer norm", "batch norm", "dropout", "functional dropout")
MODULES = {"module": nn.GELU, "in-place module": functools.partial(nn.ReLU, inplace=True)}
Step = tuple[str, str]


class RandomNet(nn.Module):
    """Run a list of steps, each (what, which activation), and read what each was applied to."""

    def __init__(self, steps: tuple[Step, ...], opaque: bool) -> None:
        super().__init__()
        self.steps, self.opaque = steps, opaque
        norms = {"layer norm": nn.LayerNorm, "batch norm": nn.BatchNorm1d}
        self.layers = nn.ModuleList([
            nn.Dropout(0.3) if step == "dropout" else norms[step](6) if step in norms
            else nn.Linear(6, 6) for step, _ in steps])
        self.acts = nn.ModuleList([MODULES.get(form, nn.Identity)() for _, form in steps])
        if any(form == "shared module" for _, form in steps):
            self.shared = nn.Tanh()
        self.slope, self.head = nn.Parameter(torch.tensor(0.2)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque and bool(x.detach().sum() > 1e6):
            return self.head(x)
        for i, (step, form) in enumerate(self.steps):
            if step in ("act", "residual"):
                h = self.layers[i](x)
                y = ACTIVATIONS[form][1](self, h, i)
                x = y - 0.25 * h if step == "act" else x + y * 0.5 + 0.1 * h
            elif step == "functional dropout":
                x = F.dropout(x, 0.2, self.training)
            else:
                x = self.layers[i](x)
        return self.head(F.relu(x))


def steps() -> st.SearchStrategy[tuple[Step, ...]]:
    act = st.tuples(st.sampled_from(["act", "residual"]), st.sampled_from(list(ACTIVATIONS)))
    other = st.tuples(st.sampled_from(STEPS[3:]), st.just(""))
    return st.lists(st.one_of(act, act, other), min_size=1, max_size=6).map(tuple)


RANDOMLY = settings(deadline=None, max_examples=25, derandomize=True, database=None,
                    phases=[Phase.generate])  # networks of a few steps need no shrinking
# A BatchNorm wants two rows.
RANDOM = (Setting(True, 5, 1), Setting(True, 2, -1), Setting(False, 5, 1), Setting(False, 2, -1))


@settings(RANDOMLY)
@given(steps(), st.booleans())
def test_random_networks(plan: tuple[Step, ...], opaque: bool) -> None:
    pair = pair_of(functools.partial(RandomNet, plan, opaque), rows(5))
    model, converted = pair.model, pair.converted
    acts = [form for step, form in plan if step in ("act", "residual")]
    wanted = " ".join(["relu", *(ACTIVATIONS[form][0] for form in acts)]).split()
    assert kinds(converted) == (" ".join(sorted(wanted)),
                                ("sigmoid: gate",) * acts.count("gate"))
    done = conversion_of(converted)
    assert done is not None and done.audit is not None
    assert done.audit.left == () and done.audit.identical
    assert_same_everywhere(model, converted, rows, each=RANDOM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantActivation, "bypassed", property(lambda self: False))
        assert_same_everywhere(model, converted, rows, each=RANDOM)
    assert_active(model, converted, rows)
    assert_levels(converted, rows, each=RANDOM)
    assert_copied(model, converted, rows, saved)
    assert_untouched(pair)


@settings(RANDOMLY)
@given(steps(), st.booleans())
def test_random_networks_are_restored(plan: tuple[Step, ...], opaque: bool) -> None:
    pair = pair_of(functools.partial(RandomNet, plan, opaque), rows(5))
    assert_restored(pair.model, pair.converted, rows)
