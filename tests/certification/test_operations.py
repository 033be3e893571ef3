"""Operations without a rule are named, and arguments may be passed by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounded_nets import (
    images,
    inside,
    sound,
)
from torch import Tensor, nn

import quantguard as qg
from quantguard.certification.graph.graph import model_graph
from quantguard.certification.propagation import around, propagate
from quantguard.certification.rules.intervals import Interval
from quantguard.certification.training_propagation import around as around_pixels
from quantguard.certification.training_propagation import graph_of
from quantguard.certification.training_propagation import propagate as propagated


def _with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(50, 6), layer), nn.Linear(6, 3))


class Calls(nn.Module):
    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f, self.head = f, nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Any:
        return self.f(self.head(x.flatten(1)))


@pytest.mark.parametrize(("model", "words"), [
    (_with(nn.LayerNorm(6)), "one operation has no rule: 1.1 .LayerNorm."),
    (nn.Sequential(_with(nn.Softmax(1)), nn.GroupNorm(1, 3)),
     "2 operations have no rule: 0.1.1 .Softmax., 1 .GroupNorm."),
    (Calls(lambda x: x.sort(1)[0]), "sort at certification/test_operations.py"),
    (Calls(lambda x: x.T.contiguous().T), "getattr at"),
    (Calls(lambda x: x - x.mean(0)), "across images"),
    (Calls(lambda x: x.view(-1, 1) * 2), "mixes images"),
    (Calls(lambda x: x if x.sum() > 0 else -x), "cannot be traced into one graph"),
    (Calls(lambda x: x + torch.rand(3)), "random numbers"),
    (Calls(lambda x: x.half().float()), "half at"),
    (Calls(lambda x: x[0]), "index over images"),
    (_with(nn.Hardshrink()), r"1.1 \(Hardshrink\) cannot be bounded"),
    (_with(nn.BatchNorm1d(6, track_running_stats=False)), "batch.s statistics"),
    (_with(nn.Identity()).double(), "float64"),
    (Calls(lambda x: x.unsqueeze(1)), "logits"),
])
def test_operations_without_a_rule_are_named(model: nn.Module, words: str) -> None:
    x = images(2, 0)
    with pytest.raises(qg.ConversionError, match=words), torch.no_grad():
        propagate(model_graph(model.eval(), qg.Threat(), None, x), around(x, qg.Threat()))


class Named(nn.Module):
    """A call with keyword arguments, between a convolution and a linear layer."""

    def __init__(self, call: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.call = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), call
        self.levels = qg.QuantActivation.from_thresholds([-0.2, 0.0, 0.2], 0.2)
        self.slope = nn.Parameter(torch.tensor([0.2]))
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Any:
        y = self.call(self, self.norm(input=self.conv(input=x)))
        return self.head(input=torch.flatten(input=y, start_dim=1))


BY_NAME: dict[str, Callable[[Any, Any], Any]] = {
    "relu": lambda m, x: F.relu(input=x), "written": lambda m, x: F.relu(inplace=True, input=x),
    "quantizer": lambda m, x: m.levels(x=x), "both": lambda m, x: m.levels(value=x.relu(), x=x),
    "sum": lambda m, x: torch.sum(x, axis=1), "means": lambda m, x: x.mean(axis=(2, 3)),
    "largest": lambda m, x: torch.amax(input=x, dim=1, keepdim=True),
    "permute": lambda m, x: x.permute(dims=(0, 2, 3, 1)),
    "permuted": lambda m, x: torch.permute(dims=(0, 3, 1, 2), input=x),
    "split": lambda m, x: x.split(split_size=3, dim=1)[0],
    "splits": lambda m, x: torch.split(x, split_size_or_sections=[1, 3], dim=1)[1],
    "chunk": lambda m, x: torch.chunk(input=x, chunks=2, dim=1)[0],
    "cat": lambda m, x: torch.cat(tensors=[x, x], axis=1),
    "reshape": lambda m, x: torch.reshape(input=x, shape=(-1, 36)),
    "view": lambda m, x: x.view(size=(-1, 4, 9)), "transpose": lambda m, x:
    torch.transpose(dim1=2, dim0=1, input=x), "unsqueeze": lambda m, x: x.unsqueeze(dim=1),
    "add": lambda m, x: torch.add(other=x, input=m.levels(x)), "sub": lambda m, x: x.sub(other=1.5),
    "div": lambda m, x: torch.div(input=x, other=3.0), "clamp": lambda m, x:
    torch.clamp(input=x, min=-0.1, max=0.2), "pad": lambda m, x: F.pad(input=x, pad=(1, 1)),
    "pool": lambda m, x: F.max_pool2d(input=x, kernel_size=2), "average": lambda m, x:
    F.avg_pool2d(input=x, kernel_size=2, stride=1), "prelu": lambda m, x:
    F.prelu(input=x, weight=m.slope), "leaky": lambda m, x:
    F.leaky_relu(negative_slope=0.2, input=x), "softplus": lambda m, x: F.softplus(input=x, beta=2),
    "convolution": lambda m, x: F.conv2d(input=x, weight=m.conv.weight.repeat(1, 2, 1, 1),
                                         padding=1),
}


@pytest.mark.parametrize("what", BY_NAME)
def test_arguments_may_be_passed_by_name(what: str) -> None:
    x, threat = images(4, 0), qg.Threat(eps=0.01)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Named(BY_NAME[what]).eval()
        y = model(x).argmax(1)
    assert sound(model, x, threat)
    qg.certify(model, [(x, y)], threat, progress=False)
    trained = graph_of(model, threat, None, x)
    with torch.no_grad():
        logits = propagated(trained, around_pixels(x, 0.01, (0.0, 1.0)))
    inside(
        model(x).detach(),
        Interval(logits.lower.double() - 1e-5, logits.upper.double() + 1e-5),
        what,
    )


def test_hooks_of_layers_are_named_and_those_of_the_model_are_traced() -> None:
    model = _with(nn.ReLU()).eval()
    model.register_forward_pre_hook(lambda module, args: (args[0].clamp(0.2, 0.8),))
    assert sound(model, images(4, 0), qg.Threat(eps=0.3))
    model[1][0].register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(qg.ConversionError, match=r"1.0 \(Linear\), which has hooks"):
        model_graph(model, qg.Threat(), None, images(4, 0))
    patched = _with(nn.ReLU()).eval()
    patched[1][0].forward = lambda x: F.linear(x, patched[1][0].weight)
    with pytest.raises(qg.ConversionError, match=r"1.0 \(Linear\), .* its own forward"):
        model_graph(patched, qg.Threat(), None, images(4, 0))
