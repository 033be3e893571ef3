"""Pooling before the staircase: the same function, another gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quantguard import convert, pooling
from quantguard.activation import QuantActivation, staircases
from quantguard.contexts import backward, bypass, soften
from quantguard.pooling import pools_first


class Net(nn.Module):
    """A convolution, an activation, a pool: as modules or as functions."""

    def __init__(self, pool: Any, activation: Any = None, dim: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        self.conv, self.activation = conv(1, 4, 3, padding=1), activation or nn.ReLU()
        self.pool, self.head = pool, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.activation(self.conv(x))).flatten(1))
        return out


POOLS = {
    "module": (nn.MaxPool2d(2), 2), "padded": (nn.MaxPool2d(3, 2, 1), 2),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), 2), "1d": (nn.MaxPool1d(2), 1),
    "3d": (nn.MaxPool3d(2), 3), "adaptive": (nn.AdaptiveMaxPool2d(3), 2),
    "function": (lambda x: F.max_pool2d(x, 2), 2), "torch": (lambda x: torch.max_pool2d(x, 2), 2),
    "keyword": (lambda x: F.max_pool2d(x, kernel_size=2, return_indices=False), 2)}


def example(dim: int) -> Tensor:
    return torch.randn(4, 1, *[7] * dim, generator=torch.Generator().manual_seed(0))


def made(pool: Any, dim: int, activation: Any = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net, x = Net(pool, activation, dim), example(dim)
    net(x)
    return convert(net, 2, example=x, **options)


def input_gradient(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    return y.detach(), gradient


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU], ids=["relu", "gelu"])
@pytest.mark.parametrize("name", POOLS)
def test_the_function_is_the_same_and_the_gradient_is_that_of_the_pool_before(
        name: str, activation: type[nn.Module]) -> None:
    pool, dim = POOLS[name]
    net, x = made(pool, dim, activation()), example(dim)
    before = input_gradient(net, x)
    with pools_first(net):
        after = input_gradient(net, x)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    q: Any = net.activation

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = net.conv(x)  # type: ignore[operator]
            z = z if q.absorbs else q.function(z)
            out: Tensor = net.head(q.quantized(pool(z)).flatten(1))  # type: ignore[operator]
            return out
    expected = input_gradient(ByHand(), x)
    assert torch.equal(after[0], expected[0]) and torch.equal(after[1], expected[1])


@pytest.mark.parametrize("per_channel", [False, True])
def test_every_mode_and_the_twin_keep_their_values(per_channel: bool) -> None:
    net, x = made(nn.MaxPool2d(2), 2, per_channel=per_channel, dynamic=True), example(2)
    for context in (bypass(net), backward(net, "ste"), backward(net, "sigmoid(8)")):
        with context:
            before = input_gradient(net, x)
            with pools_first(net):
                after = input_gradient(net, x)
        assert torch.equal(before[0], after[0])
    with soften(net, 4):  # without ties nothing changes, but for the order of rounding
        before = input_gradient(net, x)
        with pools_first(net):
            after = input_gradient(net, x)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one, two)


def test_what_is_no_pool_of_the_staircase_stays_as_it_is() -> None:
    def indices(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, return_indices=True)[0]

    def written(x: Tensor) -> Tensor:
        return F.max_pool2d(x.mul_(-1), 2)  # monotone no more

    def between(x: Tensor) -> Tensor:
        return F.max_pool2d(-x, 2)

    for pool in (indices, written, between, nn.AvgPool2d(2)):
        net, x = made(pool, 2), example(2)
        before = input_gradient(net, x)
        with pools_first(net):
            after = input_gradient(net, x)
        assert all(map(torch.equal, before, after))
    plain = Net(nn.MaxPool2d(2))
    plain(x)
    with pools_first(plain):
        assert input_gradient(plain, x)[0].shape == (4, 3)
    with torch.inference_mode(), pools_first(net):
        net(x)


def test_the_context_leaves_nothing_behind() -> None:
    net = made(nn.MaxPool2d(2), 2)
    with pytest.raises(ZeroDivisionError), pools_first(net):
        raise ZeroDivisionError
    assert [m._state.answers for m in staircases(net).values()] == [None]
    assert isinstance(net.activation, QuantActivation)


# --- results that a pool alone reads are not computed ---


class Branches(nn.Module):
    """A net whose activation is read by a pool, and from the second forward on by somebody else."""

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
    """Double, which torch functions do not see."""

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


def everything(net: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    weights = [p for p in net.parameters() if p.requires_grad]
    y = net(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *weights])]


# autograd does not let a ReLU's result be written to
@pytest.mark.parametrize(("name", "dynamic"), [
    (name, dynamic) for name in READS for dynamic in (None, False, True)
    if (name, dynamic) != ("written", None)])
def test_who_reads_a_stand_in_gets_the_result_and_its_gradient(name: str, dynamic: bool | None
                                                               ) -> None:
    torch.manual_seed(0)
    net, x = Branches(READS[name]), example(2)
    if dynamic is not None:
        net = convert(net, 2, dynamic=dynamic, example=x)
    net.forwards = 0
    found = []
    for _ in range(2):  # in a context of its own each, in which nothing is put off
        pooling._known.clear()
        with pools_first(net):
            found.append(everything(net, x))
    net.forwards = 0
    pooling._known.clear()
    with pools_first(net):
        for expected in found:
            for got, want in zip(everything(net, x), expected, strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("activation", [nn.ReLU(), F.relu, torch.relu, lambda z: z.relu()])
@pytest.mark.parametrize("name", POOLS)
def test_a_relu_behind_a_pool_gives_the_same_bits_and_gradients(name: str, activation: Any) -> None:
    pool, dim = POOLS[name]
    torch.manual_seed(0)
    net, x = Net(pool, activation, dim), example(dim)
    net(x)
    expected = everything(net, x)
    with pools_first(net):
        for _ in range(3):
            assert all(map(torch.equal, everything(net, x), expected))
    assert pooling._known[net][0]


@pytest.mark.parametrize("converted", [False, True])
def test_what_a_pool_alone_reads_is_computed_behind_the_pool_from_the_second_forward_on(
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
    for _ in range(2):  # of two contexts the second knows
        with pools_first(net):
            net(x)
            net(x)
    assert sizes == [7, 3, 3, 3, 3] if converted else [7, 3, 3, 3]  # a ReLU's ties do no harm
    sizes.clear()
    net.pool = nn.AvgPool2d(2)
    with pools_first(net):
        net(x)  # read by another: computed as it is, here and from now on
        net(x)
    assert sizes == [7, 7] and pooling._known[net] == {0: False}


def test_a_relu_that_no_pool_reads_or_that_writes_is_left_alone() -> None:
    torch.manual_seed(0)
    for activation, pool, known in ((nn.ReLU(), nn.AvgPool2d(2), {0: False}),
                                    (nn.ReLU(inplace=True), nn.MaxPool2d(2), {})):
        net = Net(pool, activation)
        net(x := example(2))
        expected = everything(net, x)
        with pools_first(net):
            for _ in range(3):
                assert all(map(torch.equal, everything(net, x), expected))
        assert pooling._known[net] == known


def test_a_result_that_is_kept_can_be_read_afterwards() -> None:
    net, kept = made(nn.MaxPool2d(2), 2), list[Tensor]()
    net.activation.register_forward_hook(lambda _m, _i, y: kept.append(y))  # type: ignore[operator]
    with pools_first(net), torch.no_grad():
        net(x := example(2))
        net(x)
    assert type(kept[1]) is not Tensor and kept[1].shape == kept[0].shape
    assert torch.equal(kept[1] + 0, kept[0])


def test_what_was_written_to_before_its_result_is_read_is_said() -> None:
    kept: list[Tensor] = []

    class Late(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            y = F.relu(z)
            out = F.max_pool2d(y, 2)
            if kept:
                z.mul_(2)
                out = out + y.mean()
            kept.append(z)
            return out
    with pools_first(late := Late()), torch.no_grad():
        late(x := example(2))
        with pytest.raises(RuntimeError, match="written to before its result was read"):
            late(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
@pytest.mark.parametrize("converted", [False, True])
def test_of_a_compiled_model_nothing_is_put_off(converted: bool) -> None:
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


# --- forwards that do more with an activation than pool it ---

Rest = Callable[[nn.Module, Tensor], Tensor]


def half(gradient: Tensor) -> Tensor:
    return gradient / 2


def pooled_and(rest: Rest) -> Rest:
    """Pool a ReLU's result and add something of the rest, which reads z or the result."""
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
    """A net around one of these forwards."""

    def __init__(self, forward: Rest) -> None:
        super().__init__()
        self.conv, self.head, self.inner = nn.Conv2d(1, 4, 3, padding=1), nn.LazyLinear(3), forward

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self, self.conv(x)).flatten(1))
        return out


@pytest.mark.parametrize("name", FORWARDS)
def test_a_float_net_computes_and_hands_on_what_it_does_elsewhere(name: str) -> None:
    torch.manual_seed(0)
    net, x = Around(FORWARDS[name]), example(2)
    net(x)
    expected = everything(net, x)
    with pools_first(net):
        for _ in range(3):
            for got, want in zip(everything(net, x), expected, strict=True):
                torch.testing.assert_close(got, want)


def test_what_is_kept_is_not_read_with_thresholds_of_later() -> None:
    net = made(nn.MaxPool2d(2), 2, dynamic=True)
    kept: list[Tensor] = []
    net.activation.register_forward_hook(lambda _m, _i, y: kept.append(y))  # type: ignore[operator]
    with pools_first(net):
        net(x := example(2))
        net(x)
    with torch.no_grad():
        net.activation.shift += 1  # type: ignore[operator]
    assert torch.equal(kept[1] + 0, kept[0])
    assert pooling._known[net] == {0: False}  # somebody keeps it: it is computed from here on


def test_staircases_in_a_checkpointed_block_are_left_where_they_are() -> None:
    net, x = made(nn.MaxPool2d(2), 2), example(2)
    activation: Any = net.activation
    plain = net.pool

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = net.conv(x)  # type: ignore[operator]
            y: Any = checkpoint(lambda v: plain(activation(v)), z, use_reentrant=False)
            out: Tensor = net.head(y.flatten(1))  # type: ignore[operator]
            return out
    expected = input_gradient(Block(), x)
    with pools_first(block := nn.Sequential(Block(), activation)):
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            y = block[0](leaf)
            (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
            assert torch.equal(y.detach(), expected[0]) and torch.equal(gradient, expected[1])
