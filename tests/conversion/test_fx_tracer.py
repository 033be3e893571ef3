"""Graphs of one forward: its variants, and the graphs that they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantguard.conversion.fx_tracer import planned_graphs


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), training=self.training)


def test_both_modes_share_the_graph_of_a_forward_that_ignores_its_mode() -> None:
    one, two = planned_graphs(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).values()
    assert one is two


def test_a_forward_that_reads_its_mode_has_two_graphs() -> None:
    modes = planned_graphs(Drops())
    assert {variant.training for variant in modes} == {False, True}
    drops = {variant.training: next(node.kwargs["training"] for node in one.graph.nodes
                                    if node.target is F.dropout) for variant, one in modes.items()}
    assert drops == {False: False, True: True}


@pytest.mark.parametrize("ask", [
    lambda module, x: getattr(module, "train" + "ing"),
    lambda module, x: nn.functional.dropout(x, 0.5, module.training) is None,
], ids=["by getattr", "in another function"])
def test_any_way_to_read_the_mode_is_noticed(ask: Any) -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if ask(self, x) else F.gelu(x)

    one, two = planned_graphs(Asks()).values()
    assert one is not two


@pytest.mark.parametrize("touch", [
    lambda module: module.train(),
    lambda module: setattr(module, "training", False),
    lambda module: module.__dict__["training"],
    lambda module: vars(module)["training"],
], ids=["train", "set", "dict", "vars"])
def test_mode_changes_that_a_graph_cannot_represent_are_refused(touch: Any) -> None:
    class Touches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            touch(self)
            return F.relu(x)

    module = Touches()
    before = dict(vars(module))
    with pytest.raises(Exception, match="training"):
        planned_graphs(module)
    assert vars(module) == before


def test_the_variants_of_an_optional_argument_share_by_mode() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return F.relu(x) if mask is None else F.relu(x) * mask

    graphs = planned_graphs(Optional())
    assert len(graphs) == 4 and len({id(one) for one in graphs.values()}) == 2


def test_the_graph_of_a_class_that_checks_its_own_type() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert type(self).__name__ == "Named" and isinstance(self, Named)
            return F.relu(x)

    one, _ = planned_graphs(Named()).values()
    assert any(node.target is F.relu for node in one.graph.nodes)
    assert torch.equal(Named()(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
