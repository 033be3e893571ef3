"""Activations whose results are computed only where something other than a pool reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pooling_nets import POOLS, Net, example, input_gradient, made, output_and_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantguard import convert
from quantguard.nn import pool_reordering as pooling
from quantguard.nn.pool_reordering import pools_first
from quantguard.nn.quant_activation import QuantActivation


class Branches(nn.Module):
    """Net whose activation is read by a pool, and also elsewhere from the second forward on."""

    def __init__(self, reads: Any, relu: Any = None) -> None:
        super().__init__()
        self.conv, self.reads, self.forwards = nn.Conv2d(1, 4, 3, padding=1), reads, 0
        self.activation, self.head = relu or nn.ReLU(), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        y = self.activation(self.conv(x))
        before = self.reads(y) if self.forwards > 1 else 0.0
        out: Tensor = self.head(F.max_pool2d(y, 2).flatten(1))
        return out + before


class Twice(torch.autograd.Function):
    """Doubling by an operation that torch functions do not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@torch.no_grad()
def unseen_mean(y: Tensor) -> Tensor:
    return y.mean()


SCRIPT = torch.jit.CompilationUnit("def read(y):\n    return (y * y).mean()\n")  # no Python there
READS = {
    "function": lambda y: y.mean(), "Function": lambda y: Twice.apply(y).mean(),
    "no_grad": unseen_mean, "both": lambda y: unseen_mean(y) + y.std(),
    "script": lambda y: SCRIPT.read(y),
    "list": lambda y: torch.cat([y, y], 1).mean(), "written": lambda y: y.mul_(2).sum() * 0,
    "shape": lambda y: float(y.shape[1] + y.dim()), "indexed": lambda y: y[0, 0, 1, 1]}


# autograd does not let a ReLU's result be written to
@pytest.mark.parametrize(("name", "dynamic"), [
    (name, dynamic) for name in READS for dynamic in (None, False, True)
    if (name, dynamic) != ("written", None)])
def test_a_reader_of_a_stand_in_gets_the_result_and_its_gradient(name: str, dynamic: bool | None
                                                               ) -> None:
    torch.manual_seed(0)
    net, x = Branches(READS[name]), example(2)
    if dynamic is not None:
        net = convert(net, 2, dynamic=dynamic, example=x)
    net.forwards = 0
    found = []
    for _ in range(2):  # each in its own context, in which nothing is deferred
        pooling._only_pooled.clear()
        with pools_first(net):
            found.append(output_and_gradients(net, x))
    net.forwards = 0
    pooling._only_pooled.clear()
    with pools_first(net):
        for expected in found:
            for got, want in zip(output_and_gradients(net, x), expected, strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", [nn.ReLU(), F.relu, torch.relu, lambda z: z.relu()])
@pytest.mark.parametrize("name", POOLS)
def test_a_relu_behind_a_pool_gives_the_same_bits_and_gradients(name: str, activation: Any) -> None:
    pool, dim = POOLS[name]
    torch.manual_seed(0)
    net, x = Net(pool, activation, dim), example(dim)
    net(x)
    expected = output_and_gradients(net, x)
    with pools_first(net):
        for _ in range(3):
            assert all(map(torch.equal, output_and_gradients(net, x), expected))
    assert pooling._only_pooled[net][0]


@pytest.mark.parametrize("converted", [False, True])
def test_a_result_that_only_a_pool_reads_is_computed_behind_it_from_the_second_forward(
        monkeypatch: pytest.MonkeyPatch, converted: bool) -> None:
    net = made(nn.MaxPool2d(2), 2) if converted else Net(nn.MaxPool2d(2))
    net(x := example(2))
    sizes: list[int] = []
    if converted:
        quantize = QuantActivation._quantized

        def quantized(self: QuantActivation, z: Tensor, state: Any) -> Tensor:
            sizes.append(z.shape[-1])
            return quantize(self, z, state)
        monkeypatch.setattr(QuantActivation, "_quantized", quantized)
    else:
        rectify = pooling._relu

        def rectified(z: Tensor) -> Tensor:
            sizes.append(z.shape[-1])
            return rectify(z)
        monkeypatch.setattr(pooling, "_relu", rectified)
    for _ in range(2):  # the second context knows from the first
        with pools_first(net):
            net(x)
            net(x)
    assert sizes == [7, 3, 3, 3, 3] if converted else [7, 3, 3, 3]  # ties of a ReLU do not matter
    sizes.clear()
    net.pool = nn.AvgPool2d(2)
    with pools_first(net):
        net(x)  # read by another layer: computed at once from now on
        net(x)
    assert sizes == [7, 7] and pooling._only_pooled[net] == {0: False}


def test_a_relu_that_no_pool_reads_or_that_writes_is_left_alone() -> None:
    torch.manual_seed(0)
    for activation, pool, known in ((nn.ReLU(), nn.AvgPool2d(2), {0: False}),
                                    (nn.ReLU(inplace=True), nn.MaxPool2d(2), {})):
        net = Net(pool, activation)
        net(x := example(2))
        expected = output_and_gradients(net, x)
        with pools_first(net):
            for _ in range(3):
                assert all(map(torch.equal, output_and_gradients(net, x), expected))
        assert pooling._only_pooled[net] == known


def test_a_stored_result_can_be_read_afterwards() -> None:
    net, stored = made(nn.MaxPool2d(2), 2), list[Tensor]()
    net.activation.register_forward_hook(lambda _m, _i, y: stored.append(y))  # type: ignore[operator]
    with pools_first(net), torch.no_grad():
        net(x := example(2))
        net(x)
    assert type(stored[1]) is not Tensor and stored[1].shape == stored[0].shape
    assert torch.equal(stored[1] + 0, stored[0])


def test_an_input_written_to_before_its_result_is_read_is_an_error() -> None:
    stored: list[Tensor] = []

    class Late(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            y = F.relu(z)
            out = F.max_pool2d(y, 2)
            if stored:
                z.mul_(2)
                out = out + y.mean()
            stored.append(z)
            return out
    with pools_first(late := Late()), torch.no_grad():
        late(x := example(2))
        with pytest.raises(RuntimeError, match="written to before its result was read"):
            late(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile reads it
@pytest.mark.parametrize("converted", [False, True])
def test_nothing_is_deferred_in_a_compiled_model(converted: bool) -> None:
    net = made(nn.MaxPool2d(2), 2) if converted else Net(nn.MaxPool2d(2))
    net(x := example(2))
    with pools_first(net):
        expected = input_gradient(net, x)
    compiled: Any = torch.compile(net, backend="aot_eager")
    with pools_first(compiled):
        for _ in range(3):
            for got, want in zip(input_gradient(compiled, x), expected, strict=True):
                torch.testing.assert_close(got, want)
    torch.compiler.reset()


Rest = Callable[[nn.Module, Tensor], Tensor]


def half(gradient: Tensor) -> Tensor:
    return gradient / 2


def pooled_and(rest: Rest) -> Rest:
    """Return a forward that pools a ReLU and adds ``rest``, which reads z or the result."""
    def forward(net: nn.Module, z: Tensor) -> Tensor:
        y = F.relu(z)
        net.y = y
        out = F.max_pool2d(y, 2)
        return out + rest(net, z)
    return forward


def hooked(net: nn.Module, z: Tensor) -> Tensor:
    y = F.relu(z)
    y.register_hook(half)
    return F.max_pool2d(y, 2)


def cut(net: nn.Module, z: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(z).detach_(), 2) + z.mean()


def without_gradient(net: nn.Module, z: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(z)
    return F.max_pool2d(y, 2) + z.mean()


def written_by_data(net: nn.Module, z: Tensor) -> Tensor:
    y = F.relu(z)
    y.data.clamp_(max=0.3)
    return F.max_pool2d(y, 2)


def written_afterwards(net: nn.Module, z: Tensor) -> Tensor:
    y = F.relu(z.detach())
    out = F.max_pool2d(y, 2)
    with torch.no_grad():
        y.mul_(0.5)
    return out + y.mean() + z.mean()


def differentiated(net: nn.Module, z: Tensor) -> Tensor:
    y = F.relu(z)
    out = F.max_pool2d(y, 2)
    (gradient,) = torch.autograd.grad(out.sum(), y, create_graph=True)
    return out + (gradient * y).mean()


def twice_differentiated(net: nn.Module, z: Tensor) -> Tensor:
    y = F.relu(z)
    out = F.max_pool2d(y, 2)
    (gradient,) = torch.autograd.grad(Twice.apply(y * y).mean(), z, create_graph=True)
    return out + gradient.square().sum() * 100


def checkpointed(net: nn.Module, z: Tensor) -> Tensor:
    found: Tensor = checkpoint(lambda v: F.max_pool2d(F.relu(v), 2), z, use_reentrant=False)
    return found


def mapped(net: nn.Module, z: Tensor) -> Tensor:
    found: Tensor = torch.func.vmap(lambda v: F.max_pool2d(F.relu(v), 2))(z)
    return found


def tuples(net: nn.Module, z: Tensor) -> Tensor:
    return torch.adaptive_max_pool1d(F.relu(z.flatten(2)), 9)[0].unflatten(2, (3, 3))


def dilated(net: nn.Module, z: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(z.mean((2, 3), keepdim=True)), 2, 1, 1, 2).clamp(min=-5).mean() + z


def inference(net: nn.Module, z: Tensor) -> Tensor:
    with torch.inference_mode():
        count = float(F.max_pool2d(F.relu(z.detach()), 2).sum())
    return F.max_pool2d(z, 2) * count


FORWARDS: dict[str, Rest] = {f.__name__: f for f in (
    hooked, cut, without_gradient, written_by_data, written_afterwards, differentiated,
    twice_differentiated, checkpointed, mapped, tuples, dilated, inference)} | {
    "z written": pooled_and(lambda _, z: z.add_(1).mean()),
    "z written by a relu": pooled_and(lambda _, z: F.relu_(z).mean()),
    "read": pooled_and(lambda net, z: net.y.mean() + z.mean())}


class Around(nn.Module):
    """Net with one of these forwards."""

    def __init__(self, forward: Rest) -> None:
        super().__init__()
        self.conv, self.head, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.LazyLinear(3), forward

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self, self.conv(x)).flatten(1))
        return out


@pytest.mark.parametrize("name", FORWARDS)
def test_a_float_net_has_the_same_outputs_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    net, x = Around(FORWARDS[name]), example(2)
    net(x)
    expected = output_and_gradients(net, x)
    with pools_first(net):
        for _ in range(3):
            for got, want in zip(output_and_gradients(net, x), expected, strict=True):
                torch.testing.assert_close(got, want)


def test_a_stored_result_does_not_change_with_later_thresholds() -> None:
    net = made(nn.MaxPool2d(2), 2, dynamic=True)
    stored: list[Tensor] = []
    net.activation.register_forward_hook(lambda _m, _i, y: stored.append(y))  # type: ignore[operator]
    with pools_first(net):
        net(x := example(2))
        net(x)
    with torch.no_grad():
        net.activation.shift += 1  # type: ignore[operator]
    assert torch.equal(stored[1] + 0, stored[0])
    assert pooling._only_pooled[net] == {0: False}  # it is stored elsewhere: computed at once
