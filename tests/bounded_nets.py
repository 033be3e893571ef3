"""Random networks, points of a ball, and checks that values stay within bounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import quantguard as qg
from quantguard.certification.graph.graph import ModelGraph, model_graph
from quantguard.certification.propagation import around, margins, propagate
from quantguard.certification.rules import linear_bounds as steps
from quantguard.certification.rules.intervals import Interval, narrowed
from quantguard.core.model_calls import run

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


# ---- checks ----


def points(pixels: Tensor, threat: qg.Threat, many: int, seed: int = 0) -> Tensor:
    """Return (many, N, ...) images within the threat: corners, faces and insides."""
    g = torch.Generator().manual_seed(seed)
    shape = (many, *pixels.shape)
    d = 2 * torch.rand(shape, generator=g) - 1
    d[: many // 2] = d[: many // 2].sign()
    d[many // 4 : many // 2] *= (torch.rand(d[many // 4 : many // 2].shape, generator=g) < 0.3)
    if threat.norm == "l2":
        length = d.flatten(2).norm(dim=2).clamp_min(1e-12).reshape(many, -1, *[1] * (d.dim() - 2))
        share = torch.ones(many, *[1] * (d.dim() - 1))
        share[many // 2 :] = torch.rand(many - many // 2, *[1] * (d.dim() - 1), generator=g)
        d = d / length * share
    return (pixels + threat.eps * d).clamp(*threat.bounds)


def attacked(model: nn.Module, pixels: Tensor, labels: Tensor, threat: qg.Threat) -> Tensor:
    """Return (steps * classes, N, ...) images within the threat, attacked towards each class."""
    found = []
    for target in range(3):
        x = pixels.clone()
        for _ in range(4):
            x.requires_grad_()
            try:
                with torch.enable_grad():
                    y = run(model, model_input(x, threat))
                    gap = (y.gather(1, labels[:, None])[:, 0] - y[:, target]).sum()
                    (g,) = torch.autograd.grad(gap, x)
            except RuntimeError:  # autograd refuses some writes in place
                g = torch.randn_like(x)
            if threat.norm == "linf":
                x = pixels - threat.eps * g.sign()
            else:
                length = g.flatten(1).norm(dim=1).clamp_min(1e-12)
                x = pixels - threat.eps * g / length.reshape(-1, *[1] * (g.dim() - 1))
            x = x.clamp(*threat.bounds).detach()
            found.append(x)
    return torch.stack(found)


def node_values(graph: ModelGraph, x: Tensor) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph on pixels in float32, and yield each node with its value."""
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args = fx.node.map_arg(node.args, values.__getitem__)
        named = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "placeholder":
            value: Any = x.clone()
        elif node.op == "output":
            return
        elif node.op == "get_attr":
            value = graph.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
        elif node.op == "call_module":
            value = graph.module(node)(*args, **named)
        elif node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **named)
        else:
            value = node.target(*args, **named)  # type: ignore[operator]
        values[node] = value
        yield node, value


def inside(value: Tensor, box: Interval, where: str) -> None:
    """Fail unless every value lies within its bounds."""
    v = value.double()
    v = v.unflatten(0, (-1, len(box.lower))) if v.dim() == box.lower.dim() else v
    assert not (v < box.lower).any(), f"{where}: below by {(box.lower - v).max():.3g}"
    assert not (v > box.upper).any(), f"{where}: above by {(v - box.upper).max():.3g}"


def encloses(wide: Interval, narrow: Interval, where: str) -> None:
    """Fail unless bounds enclose others, which may be unknown (NaN)."""
    for off in (wide.lower.double() - narrow.lower, narrow.upper - wide.upper.double()):
        assert not (off > 0).any(), f"{where}: narrower, above or below by {off.max():.3g}"


def sound(model: nn.Module, pixels: Tensor, threat: qg.Threat, many: int = 64,
          seed: int = 0) -> int:
    """Fail if any node, logit or margin leaves its bounds; return the number of points."""
    with torch.no_grad():
        graph = model_graph(model.eval(), threat, None, pixels)
        found: dict[fx.Node, Any] = {}
        labels = run(model, model_input(pixels, threat)).argmax(1)
        logits = propagate(graph, around(pixels, threat), True, found.__setitem__)
        gaps = [margins(logits, labels, through) for through in (False, True)]
        brief: dict[fx.Node, Any] = {}
        plain = propagate(graph, around(pixels, threat, brief=True), visit=brief.__setitem__)
        gaps.append(margins(plain, labels, False))
        for node, box in brief.items():
            if isinstance(box, Interval):
                encloses(box, found[node], f"{node} in {box.lower.dtype}")
        x = points(pixels, threat, many, seed)
        x = torch.cat([x, attacked(model, pixels, labels, threat)])
        many = len(x)
        x = x.flatten(0, 1)
        for node, value in node_values(graph, x):
            if isinstance(found.get(node), Interval):
                inside(value, found[node], str(node))
        y = run(model, model_input(x, threat))
        inside(y, logits, "logits")
        y = y.double().unflatten(0, (many, len(pixels)))
        gap = y.gather(2, labels[:, None].expand(many, -1, -1)) - y
        for number, bound in enumerate(gaps):
            off = (bound - gap)[:, F.one_hot(labels, y.shape[2]) == 0]
            assert not (off > 0).any(), f"margin {number}: below by {off.max():.3g}"
    return len(x)


def lines_hold(ends: tuple[Tensor, Tensor], box: Interval, f: Callable[[Tensor], Tensor]) -> None:
    """Fail if a function of one variable crosses the lines that bound it."""
    step, (left, right) = box.step, ends
    assert isinstance(step, steps.PiecewiseLinear)
    for sign in (1, -1):
        values = (sign * step.values[0], sign * step.values[1])
        corners = [(place, sign * value) for place, value in step.corners]
        slope, at = steps.lower_line(step.ends, values, corners)
        for share in torch.linspace(0, 1, 101, dtype=torch.float64):
            z = (left + share * (right - left)).float()
            z = torch.minimum(torch.maximum(z, narrowed(left, True)), narrowed(right, False))
            off = slope * z.double() + at - step.error - sign * f(z.clone()).double()
            assert not (off > 1e-12).any(), f"line: below by {off.max():.3g}"


def model_input(pixels: Tensor, threat: qg.Threat) -> Tensor:
    from quantguard.data.batches import from_pixels
    return from_pixels(pixels, threat)


def true_margin(model: nn.Module, levels: qg.QuantActivation, image: Tensor, label: int,
                eps: float) -> float:
    """Return the smallest margin over all quantized inputs of images within eps."""
    reach = [torch.unique(levels(torch.linspace(max(0, float(v) - eps), min(1, float(v) + eps),
                                                4001))) for v in image]
    with torch.no_grad():
        z = model[1:](torch.tensor(list(itertools.product(*[r.tolist() for r in reach]))))
    others = z.clone()
    others[:, label] = -torch.inf
    return float((z[:, label] - others.amax(1)).min())


# ---- random networks ----

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True), "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.2), "leaky, falling": lambda: nn.LeakyReLU(-0.4),
    "prelu": nn.PReLU, "gelu": nn.GELU, "gelu tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU,
    "mish": nn.Mish, "hardswish": nn.Hardswish, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus, "softplus, early": lambda: nn.Softplus(2.0, 0.5), "elu": nn.ELU,
    "selu": nn.SELU, "celu": lambda: nn.CELU(0.7), "hardtanh": lambda: nn.Hardtanh(-0.4, 0.3),
    "hardsigmoid": nn.Hardsigmoid, "softsign": nn.Softsign, "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink, "softshrink": lambda: nn.Softshrink(0.1)}


def quantizer(bits: int, g: torch.Generator, channels: int = 0, dynamic: bool = False,
              function: nn.Module | None = None) -> nn.Module:
    """Return a quantizer with uneven thresholds, per channel if there are channels."""
    m = 2**bits - 1
    rows = (channels,) if channels else ()
    t = (torch.rand(*rows, m, generator=g) + 0.05).cumsum(-1) * 1.2 / m - 0.4
    step = torch.rand(rows, generator=g) + 0.3
    q = qg.QuantActivation(qg.QuantSpec(bits, dynamic, bool(channels)), function,
                           channels=max(channels, 1))
    q.set_thresholds(t, step if rows else float(step), zero=float(bits % 2))
    if dynamic:
        with torch.no_grad():
            for p in (q.shift, q.log_gaps, q.log_step):
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    return q


class Net(nn.Module):
    """A small network out of a list of block names."""

    def __init__(self, blocks: list[str], activations: list[nn.Module], g: torch.Generator) -> None:
        super().__init__()
        self.blocks, self.activations = blocks, nn.ModuleList(activations)
        layers: list[nn.Module] = []
        for block in blocks:
            dense = block == "dense"
            layers.append(nn.Linear(4, 4) if dense else nn.Conv2d(
                8 if block == "cat" else 4, 4, 3, padding=1, bias=block != "bn",
                padding_mode="reflect" if block == "reflect" else "zeros",
                groups=2 if block == "groups" else 1))
        self.first, self.layers = nn.Conv2d(2, 4, 3, stride=1, padding=1), nn.ModuleList(layers)
        self.bn = nn.BatchNorm2d(4)
        self.max, self.average = nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1, padding=1)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn(p.shape, generator=g) * (1.5 / p[0].numel() ** 0.5))
            self.bn.running_mean.copy_(torch.randn(4, generator=g) * 0.2)
            self.bn.running_var.copy_(torch.rand(4, generator=g) + 0.3)
            self.bn.weight.copy_(torch.randn(4, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(2 * x - 1)
        for block, layer, f in zip(self.blocks, self.layers, self.activations, strict=True):
            if block == "residual":
                identity = x
                x = f(layer(x))
                x += identity
                x = x - identity.mean((2, 3), keepdim=True)
            elif block == "cat":
                x = f(layer(torch.cat([x, -x], 1)))
            elif block == "max":
                x = self.max(f(layer(x)))
            elif block == "average":
                x = self.average(f(layer(x)))
            elif block == "bn":
                x = f(self.bn(layer(x)))
            elif block == "gate":
                x = layer(x)
                x = x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
                x = f(x)
            elif block == "dense":
                x = f(layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous())
            elif block == "clamp":
                a, b = f(layer(x)).clamp(-0.5, 0.8).chunk(2, dim=1)
                x = torch.cat((b / 3, a), dim=1)
            else:
                x = f(layer(x))
        x = F.adaptive_max_pool2d(x, 1).view(x.size(0), -1)
        return self.head(x)


BLOCKS = ["plain", "residual", "cat", "max", "average", "bn", "gate", "dense", "clamp", "reflect",
          "groups"]
QUANTIZERS = ["1 bit", "2 bits", "3 bits", "4 bits", "2 dynamic", "2 per channel", "2 after gelu"]


def activation(name: str, g: torch.Generator) -> nn.Module:
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    bits, how = int(name[0]), name[2:]
    return quantizer(bits, g, 4 if how == "per channel" else 0, how == "dynamic",
                     nn.GELU() if how == "after gelu" else nn.ReLU())


def random_net(names: list[tuple[str, str]], seed: int) -> Net:
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net([b for b, _ in names], [activation(a, g) for _, a in names], g).eval()


def images(n: int, seed: int, shape: tuple[int, ...] = (2, 5, 5)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


nets = st.lists(st.tuples(st.sampled_from(BLOCKS), st.sampled_from([*ACTIVATIONS, *QUANTIZERS,
                                                                   *QUANTIZERS])),
                min_size=1, max_size=3)


def norm_net() -> nn.Module:
    """Return a small network with both kinds of BatchNorm."""
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
                         nn.Linear(36, 6), nn.BatchNorm1d(6, momentum=None), nn.Softplus(),
                         nn.Linear(6, 3))
