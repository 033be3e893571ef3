"""Converted models: the same computation under bypass, quantized outside it, still the user's."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from quantguard.activation import QuantActivation, staircases
from quantguard.contexts import backward, bypass, soften
from quantguard.conversion import conversion_of, convert, restore
from quantguard.errors import ConversionError, DataError, SpecError
from quantguard.running import duplicate

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """Call an activation between two layers, however it is spelled."""

    def __init__(self, call: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.call = call
        if act is not None:
            self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self, self.first(x)))


def seeded(model: nn.Module, *arguments: Any, **options: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        result = model(*[a.clone() for a in arguments], **options)
    assert isinstance(result, Tensor)
    return result


def assert_converted(model: nn.Module, converted: nn.Module, x: Tensor = X) -> None:
    """Check both modes: bit-identical under bypass, buffers too; and not the same outside it."""
    model, converted = copy.deepcopy(model), copy.deepcopy(converted)
    for training in (True, False):
        model.train(training)
        converted.train(training)
        with bypass(converted):
            assert torch.equal(seeded(converted, x), seeded(model, x))
        state = converted.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        if not training:
            assert not torch.equal(seeded(converted, x), seeded(model, x))


def same_gradients(model: nn.Module, converted: nn.Module, x: Tensor = X) -> bool:
    """Tell whether bypass has the float model's gradients; soft and hard ones must exist."""
    grads = []
    for net in (model, converted):
        leaf = x.clone().requires_grad_()
        with bypass(net):
            seeded(net, leaf).sum().backward()
        grads.append(leaf.grad)
    for context in (lambda: backward(converted, "ramp"), lambda: soften(converted, 4.0)):
        leaf = x.clone().requires_grad_()
        with context():
            seeded(converted, leaf).square().sum().backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    return grads[0] is not None and torch.equal(*grads)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5)


@pytest.fixture(scope="module")
def converted_resnet(resnet: nn.Module) -> nn.Module:
    return convert(resnet, 3, example=torch.zeros(1, 3, 32, 32))


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_resnet_is_converted_everywhere_and_is_still_a_resnet(
        resnet: nn.Module, converted_resnet: nn.Module) -> None:
    assert isinstance(converted_resnet, ResNet) and isinstance(
        converted_resnet.layer1[0], BasicBlock)
    assert len(staircases(converted_resnet)) == 17
    assert not [m for m in converted_resnet.modules() if isinstance(m, nn.ReLU)]
    assert [n for n, _ in converted_resnet.named_parameters()] == [
        n for n, _ in resnet.named_parameters()]
    done = conversion_of(converted_resnet)
    assert done is not None and done.audit is not None
    assert done.summary() == "17 of 17 activations converted" and done.audit.left == ()
    assert_converted(resnet, converted_resnet, IMAGES)


def test_each_call_has_thresholds_of_its_own(converted_resnet: nn.Module) -> None:
    model = copy.deepcopy(converted_resnet).eval()
    block, seen = model.layer1[0], []
    for staircase in (block.relu, block.relu_2):
        staircase.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    with torch.no_grad():
        model(IMAGES)
        block.relu_2.set_thresholds(block.relu_2.thresholds * 3, block.relu_2.step)
        model(IMAGES)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])


def test_restore_gives_the_float_model_back_with_its_present_weights(
        resnet: nn.Module, converted_resnet: nn.Module) -> None:
    trained = copy.deepcopy(converted_resnet)
    nn.init.ones_(trained.fc.bias)
    back = restore(trained).eval()
    expected = copy.deepcopy(resnet).eval()
    nn.init.ones_(expected.fc.bias)
    assert torch.equal(back(IMAGES), expected(IMAGES))
    assert list(back.state_dict()) == list(resnet.state_dict())
    assert [(n, type(m)) for n, m in back.named_modules()] == [
        (n, type(m)) for n, m in resnet.named_modules()]
    assert [repr(m) for m in back.modules()] == [repr(m) for m in resnet.modules()]
    assert len(staircases(trained)) == 17 and conversion_of(back) is None
    assert_converted(resnet, convert(restore(converted_resnet), 3, example=IMAGES), IMAGES)


@pytest.mark.parametrize(("name", "summary"), [
    pytest.param("googlenet", "57 of 57 activations converted (+4 that the audit's input did not "
                 "reach)", marks=pytest.mark.slow),
    ("inception_v3", "94 of 94 activations converted (+2 that the audit's input did not reach)")])
def test_auxiliary_heads_are_counted_apart_and_run_in_training(name: str, summary: str) -> None:
    model = torchvision.models.get_model(name, weights=None, init_weights=False, num_classes=3)
    side = 299 if name == "inception_v3" else 64
    x = IMAGES.repeat(1, 1, side // 32 + 1, side // 32 + 1)[..., :side, :side]
    model.eval()
    converted = convert(model, example=x[:1], data=[x[:1]])
    done = conversion_of(converted)
    assert done is not None and done.summary() == summary
    if name == "googlenet":
        outputs = []
        for net in (model.train(), converted.train()):
            torch.manual_seed(0)
            with torch.no_grad(), bypass(net):
                outputs.append(net(x))
        assert len(outputs[1]) == 3
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


MODULES = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(),
           nn.Tanh()]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "F.relu": lambda self, x: F.relu(x), "torch.relu": lambda self, x: torch.relu(x),
    "method": lambda self, x: x.relu(), "keyword": lambda self, x: F.relu(input=x),
    "relu6": lambda self, x: F.relu6(x), "leaky": lambda self, x: F.leaky_relu(x, 0.3),
    "gelu": lambda self, x: F.gelu(x, approximate="tanh"), "silu": lambda self, x: F.silu(x),
    "hardswish": lambda self, x: F.hardswish(x), "tanh": lambda self, x: torch.tanh(x),
    "tanh method": lambda self, x: x.tanh(),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("act", MODULES, ids=lambda m: type(m).__name__)
def test_activation_modules(act: nn.Module, dynamic: bool) -> None:
    model = Calls(lambda self, x: self.act(x), act)
    converted = convert(model, 2, dynamic)
    assert_converted(model, converted)
    staircase = converted.act
    assert isinstance(staircase, QuantActivation) and staircase.spec.dynamic is dynamic
    hidden = act(model.first(X))
    count = (hidden.unsqueeze(-1) > staircase.thresholds).sum(-1)
    assert torch.equal(converted(X), model.last(staircase.step * (count - staircase.zero)))
    assert same_gradients(model, converted)


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_activation_functions_and_methods(call: Callable[..., Tensor]) -> None:
    model = Calls(call)
    converted = convert(model)
    assert_converted(model, converted)
    staircase, = staircases(converted).values()
    hidden = call(model, model.first(X))
    count = (hidden.unsqueeze(-1) > staircase.thresholds).sum(-1)
    assert torch.equal(converted(X), model.last(staircase.step * (count - staircase.zero)))
    assert same_gradients(model, converted)
    assert torch.equal(restore(converted)(X), model(X))


# Each is given q and must compute what the in-place form does, written without it.
IN_PLACE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu_": (lambda self, x: F.relu_(x) + 2 * x, lambda q, x: 3 * q(x)),
    "inplace=True": (lambda self, x: F.relu(x, inplace=True) * x, lambda q, x: q(x) * q(x)),
    "method": (lambda self, x: x.relu_() + 2 * x, lambda q, x: 3 * q(x)),
    "result unused": (lambda self, x: (x.relu_(), 2 * x)[1], lambda q, x: 2 * q(x)),
    "module": (lambda self, x: self.act(x) + 2 * x, lambda q, x: 3 * q(x)),
    "slice": (lambda self, x: x + F.relu_(x[:, :3]).sum(),
              lambda q, x: torch.cat([q(x[:, :3]), x[:, 3:]], 1) + q(x[:, :3]).sum()),
    "view": (lambda self, x: x + F.relu_(x.view(-1)).sum(), lambda q, x: q(x) + q(x).sum()),
    "leaky": (lambda self, x: F.leaky_relu(x, 0.3, True) + 2 * x, lambda q, x: 3 * q(x)),
    "silu": (lambda self, x: F.silu(x, inplace=True) + 2 * x, lambda q, x: 3 * q(x)),
    "hardswish": (lambda self, x: F.hardswish(x, inplace=True) + 2 * x, lambda q, x: 3 * q(x)),
    "tanh_": (lambda self, x: x.tanh_() + 2 * x, lambda q, x: 3 * q(x)),
    "read before": (lambda self, x: torch.cat([x * 1, F.relu_(x)], 1)[:, 3:9],
                    lambda q, x: torch.cat([x, q(x)], 1)[:, 3:9]),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_overwritten_tensor_that_is_read_later_holds_the_quantized_value(
        name: str, dynamic: bool) -> None:
    call, meaning = IN_PLACE[name]
    model = Calls(call, nn.ReLU(inplace=True) if name == "module" else None)
    converted = convert(model, 2, dynamic)
    assert_converted(model, converted)
    staircase, = staircases(converted).values()
    alone = copy.deepcopy(staircase)
    alone.inplace = False
    expected = model.last(meaning(alone, model.first(X)))
    torch.testing.assert_close(converted(X), expected, rtol=0, atol=1e-6)
    assert same_gradients(model, converted)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU])
def test_an_in_place_module_writes_into_its_callers_tensor(act: type[nn.Module]) -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.body = nn.Sequential(act(inplace=True), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.body(x)
            return self.head(x + y)

    model = PreActivation()
    converted = convert(model)
    assert_converted(model, converted)
    alone = copy.deepcopy(converted.body[0])
    alone.inplace = False
    hidden = alone(model.stem(X))
    assert torch.equal(converted(X), model.head(hidden + model.body[1](hidden)))
    assert same_gradients(model, converted)


class Repeats(nn.Module):
    """Call one module three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act, self.layer, self.head = nn.GELU(), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.layer(x))
        x = self.act(self.layer(x) - 0.5)
        return self.head(self.act(self.layer(x) + 0.25))


@pytest.mark.parametrize("keep", [["act"], ["act_2"], ["act_3"], ["act", "act_3"],
                                  ["act_2", "act_3"], []])
def test_one_of_several_calls_of_a_module_may_be_kept(keep: list[str]) -> None:
    model = Repeats()
    converted = convert(model, keep=keep)
    assert_converted(model, converted)
    assert set(staircases(converted)) == {"act", "act_2", "act_3"} - set(keep)

    def at(name: str, x: Tensor) -> Tensor:
        return model.act(x) if name in keep else getattr(converted, name)(x)

    x = at("act", model.layer(X))
    x = at("act_2", model.layer(x) - 0.5)
    assert torch.equal(converted(X), model.head(at("act_3", model.layer(x) + 0.25)))
    back = restore(converted)
    assert type(back) is Repeats and torch.equal(back(X), model(X))
    assert [n for n, _ in back.named_modules()] == [n for n, _ in model.named_modules()]


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class Iterates(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Reaches(nn.Module):
    """Call a child's child, which that child calls, too."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(nn.ReLU()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block.act(self.block(x) - 0.1))


def shared(kind: str) -> tuple[nn.Module, int]:
    """Return a model in which one activation object serves several calls, and their number."""
    torch.manual_seed(0)
    act, head = nn.ReLU(), nn.Linear(6, 3)
    if kind == "in one Sequential":
        return nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act, head), 2
    if kind == "in two blocks":
        return nn.Sequential(Block(act), Block(act), head), 2
    if kind == "iterated over":
        return Iterates(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), head), 2
    if kind == "shared and iterated over":
        return Iterates(nn.Linear(6, 6), act, nn.Linear(6, 6), act, head), 2
    if kind == "from above":
        return Reaches(), 2
    block = Block(act)
    assert kind == "a block used twice"
    return nn.Sequential(block, nn.Linear(6, 6), block, head), 1


SHARED = ["in one Sequential", "in two blocks", "iterated over", "shared and iterated over",
          "from above", "a block used twice"]


@pytest.mark.parametrize("kind", SHARED)
def test_shared_modules(kind: str) -> None:
    model, calls = shared(kind)
    converted = convert(model)
    assert_converted(model, converted)
    assert len(staircases(converted)) == calls
    done = conversion_of(converted)
    assert done is not None and done.audit is not None and len(done.audit.ran) == calls
    back = restore(converted)
    assert torch.equal(back(X), model(X))
    assert list(back.state_dict()) == list(model.state_dict())


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert isinstance(twin, nn.Module)
    return twin


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy, "pickle": saved, "twice": lambda m: saved(copy.deepcopy(saved(m)))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [
    Repeats, *(lambda kind=kind: shared(kind)[0] for kind in SHARED)], ids=["repeats", *SHARED])
def test_copies_and_pickles_of_a_converted_model(make: Callable[[], nn.Module], how: str) -> None:
    model = make()
    converted = convert(model, 2, True)
    twin = COPIES[how](converted)
    assert torch.equal(twin(X), converted(X))
    assert_converted(model, twin)
    assert isinstance(twin, type(model)) and conversion_of(twin) == conversion_of(converted)
    for staircase in staircases(twin).values():
        nn.init.constant_(staircase.shift, 0.5)
    assert not torch.equal(twin(X), converted(X))
    assert torch.equal(restore(twin)(X), model(X))


def test_a_pickle_names_the_users_class_and_holds_no_code() -> None:
    file = io.BytesIO()
    torch.save(convert(Repeats()), file)
    assert b"Repeats" in file.getvalue()
    assert b"def forward" not in file.getvalue()


def test_pickled_resnet_is_traced_again(converted_resnet: nn.Module) -> None:
    twin = saved(converted_resnet)
    assert type(twin.layer1[0]) is not type(converted_resnet.layer1[0])
    assert torch.equal(twin(IMAGES), copy.deepcopy(converted_resnet)(IMAGES))


class Modal(nn.Module):
    """Differ between train and eval in dropout, batch norm, activation and output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.layer(x)))
        x = F.dropout(x, 0.5, training=self.training)
        if self.training:
            x = F.gelu(self.drop(x)) + F.tanh(x)
        return self.head(x)


def test_train_and_eval_each_keep_their_own_forward() -> None:
    model = Modal()
    converted = convert(model)
    assert set(staircases(converted)) == {"relu", "gelu", "tanh"}
    assert_converted(model, converted)
    assert_converted(model, saved(converted))
    converted.eval()
    assert torch.equal(converted(X), converted(X))
    converted.train()
    assert not torch.equal(converted(X), converted(X))
    assert same_gradients(model, convert(model.train()))


def skips(module: nn.Module, x: Tensor) -> Tensor:
    if module.training and torch.rand(1).item() < 0.5:
        return x
    return x + F.relu(x - 0.3)


def noisy(module: nn.Module, x: Tensor) -> Tensor:
    return F.relu(x + torch.randn(6) if module.training else x)


def noisy_like(module: nn.Module, x: Tensor) -> Tensor:
    return F.relu(x + torch.randn_like(x) if module.training else x)


@pytest.mark.parametrize("call", [skips, noisy, noisy_like])
def test_random_numbers_are_drawn_anew_in_each_call(call: Callable[..., Tensor]) -> None:
    """Also stochastic depth, whose coin torch.fx would toss once and for all."""
    model = nn.Sequential(Calls(call), nn.ReLU(), nn.Linear(3, 2)).train()
    converted = convert(model)
    for seed in range(12):
        torch.manual_seed(seed)
        expected = model(X)
        torch.manual_seed(seed)
        with bypass(converted):
            assert torch.equal(converted(X), expected)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, skip: Tensor | None = None, scale: float = 1.0,
                flip: bool = False) -> Tensor:
        y = F.relu(self.layer(x)) * scale
        if skip is not None:
            y = y + skip
        return -y if flip else y


class Passes(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.block, self.head, self.names = Optional(), nn.Linear(6, 3), names

    def forward(self, x: Tensor) -> Tensor:
        given = {"skip": x, "scale": 2.0, "flip": True}
        return self.head(self.block(x, **{name: given[name] for name in self.names}))


@pytest.mark.parametrize("names", [(), ("skip",), ("scale",), ("flip",), ("skip", "flip")])
def test_optional_arguments_of_a_forward_may_be_passed_inside_the_model(
        names: tuple[str, ...]) -> None:
    model = Passes(*names)
    assert_converted(model, convert(model))


@pytest.mark.parametrize("given", [{}, {"scale": 3.0}, {"flip": True}, {"skip": X},
                                   {"skip": X, "scale": 0.5}])
def test_optional_arguments_of_a_forward_may_be_passed_by_the_caller(given: Any) -> None:
    model = nn.Sequential(Optional(), nn.Linear(6, 3))
    converted = convert(model)
    with bypass(converted):
        assert torch.equal(converted[0](X, **given), model[0](X, **given))
    assert not torch.equal(converted[0](X, **given), model[0](X, **given))


class TupleDefault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, size: tuple[int, int] = (2, 3)) -> Tensor:
        return F.relu(self.layer(x)).reshape(-1, *size).flatten(1)


class Unconventional(nn.Module):
    def __init__(this) -> None:
        super().__init__()
        this.layer = nn.Linear(6, 6)

    def forward(this, x: Tensor, scale: float = 2.0) -> Tensor:
        return F.relu(this.layer(x)) * scale


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, scale: float = 2.0) -> Tensor:
        return F.relu(self.layer(x)) * scale


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, *, first: Tensor, second: Tensor) -> dict[str, Any]:
        return {"a": F.relu(self.layer(first)), "b": (second, [first])}


class UsesReturns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Returns()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(second=x + 1, first=x)
        return out["a"] + out["b"][0] * out["b"][1][0]


@pytest.mark.parametrize("kind", [TupleDefault, Unconventional, KeywordOnly, UsesReturns])
def test_unusual_signatures(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(), nn.Linear(6, 3))
    converted = convert(model)
    assert_converted(model, converted)
    assert_converted(model, saved(converted))


class Blocked(nn.Module):
    """Hold a no_grad block, which the generated forward could not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = F.relu(self.layer(x))
        return x * scale


def test_a_no_grad_block_is_intercepted_and_its_gradient_stays_as_it_is() -> None:
    model = nn.Sequential(Blocked(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    converted = convert(model)
    assert_converted(model, converted)
    done = conversion_of(converted)
    assert done is not None and done.audit is not None
    assert list(done.plan.unread) == ["0"] and done.audit.left == ()
    assert done.summary() == "2 of 2 activations converted"
    with bypass(converted):
        assert same_gradients(model, converted)


def test_modules_in_a_forward_that_cannot_be_traced_are_replaced() -> None:
    class Opaque(Blocked):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x) if float(x.sum()) > 0 else self.act(self.layer(x))

    model = nn.Sequential(Opaque(), nn.Linear(6, 3))
    converted = convert(model)
    assert set(staircases(converted)) == {"0.act", "0.act_2"}  # two calls on one line
    assert_converted(model, converted)
    assert_converted(model, converted, -X)
    assert type(restore(converted)[0].act) is nn.GELU


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x) * torch.sigmoid(self.layer(x)))


@pytest.mark.parametrize("gates", [False, True])
def test_gates_stay_float_unless_asked_for(gates: bool) -> None:
    model = nn.Sequential(Gated(), nn.Sigmoid())
    converted = convert(model, gates=gates)
    assert_converted(model, converted)
    assert set(staircases(converted)) == {"0.relu"} | ({"0.sigmoid"} if gates else set())
    assert type(converted[1]) is nn.Sigmoid  # the model's output
    done = conversion_of(converted)
    assert done is not None and done.audit is not None and done.audit.left == ()


def test_a_recurrent_cell_stays_float_beside_a_converted_activation() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.rnn(x.unsqueeze(1))[0][:, -1]))

    model = Recurrent()
    assert_converted(model, convert(model, example=X))


def fired(model: nn.Module, log: list[str]) -> list[str]:
    log.clear()
    seeded(model, X.clone().requires_grad_()).sum().backward()
    return list(log)


def add_hooks(module: nn.Module, log: list[str]) -> None:
    module.register_forward_pre_hook(lambda m, a: log.append("before"))
    module.register_forward_hook(lambda m, a, y: log.append("after"))
    module.register_forward_pre_hook(lambda m, a, k: log.append("before with keywords"),
                                     with_kwargs=True)
    module.register_forward_hook(lambda m, a, k, y: log.append("after with keywords"),
                                 with_kwargs=True)
    module.register_full_backward_hook(lambda m, g, h: log.append("backward"))
    module.register_full_backward_pre_hook(lambda m, g: log.append("backward before"))


@pytest.mark.parametrize("where", ["1", "0", "0.act", ""])
def test_hooks_are_kept(where: str) -> None:
    """On a replaced activation, a rewritten module, a module called three times, the model."""
    log: list[str] = []
    model = nn.Sequential(nn.Sequential(), nn.ReLU(), nn.Linear(6, 3))
    model[0] = Residual()
    add_hooks(model.get_submodule(where), log)
    expected = fired(model, log)
    assert len(set(expected)) == 6
    converted = convert(model)
    assert fired(converted, log) == expected
    assert fired(restore(converted), log) == expected


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.layer = nn.GELU(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(self.act(self.layer(self.act(x))))) + F.relu(x)


def test_a_hook_that_changes_values_still_does() -> None:
    model = Calls(lambda self, x: self.act(x), nn.ReLU())
    model.act.register_forward_hook(lambda m, a, y: y + 1)
    assert_converted(model, convert(model))


@pytest.mark.parametrize("how", [lambda m: m, *COPIES.values()], ids=["convert", *COPIES])
def test_tied_weights_stay_tied(how: Callable[[nn.Module], nn.Module]) -> None:
    class Tied(Repeats):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(6, 6)
            self.other.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.other(x))

    globals()["Tied"], Tied.__qualname__ = Tied, "Tied"  # pickle finds it by name
    model = Tied()
    twin = how(convert(model))
    assert twin.other.weight is twin.layer.weight
    assert twin.layer.weight is not model.layer.weight
    assert restore(twin).other.weight is not restore(twin).layer.bias
    back = restore(twin)
    assert back.other.weight is back.layer.weight


def test_modes_are_kept_module_by_module() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), Modal()).train()
    model[1].eval()
    model[2].eval()
    before = {n: m.training for n, m in model.named_modules()}
    converted = convert(model)
    after = {n: m.training for n, m in converted.named_modules()}
    assert {n: after[n] for n in before} == before
    assert {n: m.training for n, m in model.named_modules()} == before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("data", [None, [X[:5], X[5:]]])
def test_the_callers_model_is_untouched(data: Any, training: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), Modal())
    model.train(training)
    model[0].weight.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seen = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
    random, text = torch.get_rng_state(), repr(model)
    converted = convert(model, 2, True, data=data)
    assert torch.equal(torch.get_rng_state(), random)
    assert [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()] == seen
    assert repr(model) == text and not any(p.grad is not None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not converted[0].weight.requires_grad


def test_a_module_that_counts_its_calls_in_a_buffer_still_does() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return F.relu(self.layer(x)) * self.count

    model = nn.Sequential(Counts(), nn.Linear(6, 3))
    converted = convert(model)
    assert float(model[0].count) == float(converted[0].count) == 0
    converted(X)
    converted(X)
    assert float(converted[0].count) == 2


def test_data_parallel_is_taken_off() -> None:
    model = Repeats()
    converted = convert(nn.DataParallel(model))
    assert isinstance(converted, Repeats)
    assert_converted(model, converted)
    wrapped = nn.DataParallel(converted)
    assert conversion_of(wrapped) is conversion_of(converted)
    assert isinstance(restore(wrapped), Repeats)


@pytest.mark.parametrize("per_channel", [False, True])
def test_specs_reach_their_staircases(per_channel: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3))
    converted = convert(model, {"*": 2, "3": 4}, True, per_channel=per_channel)
    assert_converted(model, converted)
    shapes = {name: tuple(s.thresholds.shape) for name, s in staircases(converted).items()}
    assert shapes == ({"1": (5, 3), "3": (4, 15)} if per_channel else {"1": (3,), "3": (15,)})
    assert len(list(converted.parameters())) == len(list(model.parameters())) + 6
    assert same_gradients(model, converted)


def errors() -> Iterator[tuple[Callable[[], Any], type[Exception], str]]:
    model = Repeats()
    yield lambda: convert(convert(model)), ConversionError, "converted already: 'act' is a Quant"
    yield lambda: restore(model), ConversionError, "Repeats is not converted"
    yield lambda: convert(nn.Linear(2, 2)), ConversionError, "no activations to convert"
    yield lambda: convert(model, 9), SpecError, "bits=9 is not possible"
    yield lambda: convert(model, 32), ConversionError, r"act \(32 bits\)"
    yield lambda: convert(model, keep="acts"), SpecError, "Did you mean 'act'"
    yield lambda: convert(model, data=[]), DataError, "data is empty"
    yield lambda: convert(model, data=iter([X])), DataError, "data"
    yield lambda: convert(model, data=[X[:, :3]]), DataError, r"shape \(8, 3\)"
    yield lambda: convert(model, example=X[:, :3]), DataError, r"inputs of shape"
    yield lambda: convert(nn.Sequential(nn.ReLU(), nn.Flatten())), ConversionError, "data="
    yield lambda: convert("resnet18"), ConversionError, "expected an nn.Module"  # type: ignore


@pytest.mark.parametrize(("call", "kind", "says"), list(errors()))
def test_errors_say_what_and_what_to_do(call: Callable[[], Any], kind: type[Exception],
                                        says: str) -> None:
    with pytest.raises(kind, match=says):
        call()


def test_a_script_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.trace(Repeats(), X)
    with pytest.raises(ConversionError, match="ScriptModule"):
        convert(script)


def test_a_forward_that_cannot_be_reproduced_is_an_error_not_a_wrong_model() -> None:
    calls = itertools.count()

    def unsteady(module: nn.Module, x: Tensor) -> Tensor:
        return F.relu(x) + next(calls)

    with pytest.raises(ConversionError, match="does not reproduce"):
        convert(Calls(unsteady))


def test_a_copy_has_memory_of_its_own_and_is_else_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    net[1].weight = net[0].weight
    net[1].bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = duplicate(net)
    assert twin[0].weight is twin[1].weight is not net[0].weight
    assert [p.requires_grad for p in twin.parameters()] == [True, True, False, True, True]
    for (name, one), (again, other) in zip(net.state_dict().items(), twin.state_dict().items(),
                                           strict=True):
        assert name == again and torch.equal(one, other) and one.stride() == other.stride()
        assert one.data_ptr() != other.data_ptr()
