"""Rewritten modules: repeated and shared activations, copies, pickles, and modes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from rewritten_models import (
    COPIES,
    IMAGES,
    SHARED,
    Blocked,
    Calls,
    Modal,
    Repeats,
    X,
    assert_converted,
    same_gradients,
    saved,
    shared,
)
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from quantguard.conversion.converter import conversion_of, convert, restore
from quantguard.nn.contexts import bypass
from quantguard.nn.quant_activation import quantizers


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5)


@pytest.fixture(scope="module")
def converted_resnet(resnet: nn.Module) -> nn.Module:
    return convert(resnet, 3, example=torch.zeros(1, 3, 32, 32))


def test_resnet_is_converted_completely_and_is_still_a_resnet(
        resnet: nn.Module, converted_resnet: nn.Module) -> None:
    assert isinstance(converted_resnet, ResNet) and isinstance(
        converted_resnet.layer1[0], BasicBlock)
    assert len(quantizers(converted_resnet)) == 17
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
    for quantizer in (block.relu, block.relu_2):
        quantizer.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    with torch.no_grad():
        model(IMAGES)
        block.relu_2.set_thresholds(block.relu_2.thresholds * 3, block.relu_2.step)
        model(IMAGES)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])


def test_restore_returns_the_float_model_with_the_current_weights(
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
    assert len(quantizers(trained)) == 17 and conversion_of(back) is None
    assert_converted(resnet, convert(restore(converted_resnet), 3, example=IMAGES), IMAGES)


@pytest.mark.parametrize(("name", "summary"), [
    pytest.param("googlenet", "57 of 57 activations converted (+4 that the audit's input did not "
                 "reach)", marks=pytest.mark.slow),
    ("inception_v3", "94 of 94 activations converted (+2 that the audit's input did not reach)")])
def test_auxiliary_heads_are_counted_separately(name: str, summary: str) -> None:
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


@pytest.mark.parametrize("exclude", [["act"], ["act_2"], ["act_3"], ["act", "act_3"],
                                  ["act_2", "act_3"], []])
def test_one_of_several_calls_of_a_module_may_be_excluded(exclude: list[str]) -> None:
    model = Repeats()
    converted = convert(model, exclude=exclude)
    assert_converted(model, converted)
    assert set(quantizers(converted)) == {"act", "act_2", "act_3"} - set(exclude)

    def at(name: str, x: Tensor) -> Tensor:
        return model.act(x) if name in exclude else getattr(converted, name)(x)

    x = at("act", model.layer(X))
    x = at("act_2", model.layer(x) - 0.5)
    assert torch.equal(converted(X), model.head(at("act_3", model.layer(x) + 0.25)))
    back = restore(converted)
    assert type(back) is Repeats and torch.equal(back(X), model(X))
    assert [n for n, _ in back.named_modules()] == [n for n, _ in model.named_modules()]


@pytest.mark.parametrize("kind", SHARED)
def test_shared_modules(kind: str) -> None:
    model, calls = shared(kind)
    converted = convert(model)
    assert_converted(model, converted)
    assert len(quantizers(converted)) == calls
    done = conversion_of(converted)
    assert done is not None and done.audit is not None and len(done.audit.ran) == calls
    back = restore(converted)
    assert torch.equal(back(X), model(X))
    assert list(back.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [
    Repeats, *(lambda kind=kind: shared(kind)[0] for kind in SHARED)], ids=["repeats", *SHARED])
def test_copies_and_pickles_of_a_converted_model(make: Callable[[], nn.Module], how: str) -> None:
    model = make()
    converted = convert(model, 2, True)
    clone = COPIES[how](converted)
    assert torch.equal(clone(X), converted(X))
    assert_converted(model, clone)
    assert isinstance(clone, type(model)) and conversion_of(clone) == conversion_of(converted)
    for quantizer in quantizers(clone).values():
        nn.init.constant_(quantizer.shift, 0.5)
    assert not torch.equal(clone(X), converted(X))
    assert torch.equal(restore(clone)(X), model(X))


def test_a_pickle_names_the_users_class_and_contains_no_code() -> None:
    file = io.BytesIO()
    torch.save(convert(Repeats()), file)
    assert b"Repeats" in file.getvalue()
    assert b"def forward" not in file.getvalue()


def test_pickled_resnet_is_traced_again(converted_resnet: nn.Module) -> None:
    clone = saved(converted_resnet)
    assert type(clone.layer1[0]) is not type(converted_resnet.layer1[0])
    assert torch.equal(clone(IMAGES), copy.deepcopy(converted_resnet)(IMAGES))


def test_train_and_eval_have_separate_forwards() -> None:
    model = Modal()
    converted = convert(model)
    assert set(quantizers(converted)) == {"relu", "gelu", "tanh"}
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
def test_random_numbers_are_drawn_again_in_each_call(call: Callable[..., Tensor]) -> None:
    """This includes stochastic depth, whose random choice a graph would fix."""
    model = nn.Sequential(Calls(call), nn.ReLU(), nn.Linear(3, 2)).train()
    converted = convert(model)
    for seed in range(12):
        torch.manual_seed(seed)
        expected = model(X)
        torch.manual_seed(seed)
        with bypass(converted):
            assert torch.equal(converted(X), expected)


def test_a_no_grad_block_is_intercepted_and_its_gradient_is_unchanged() -> None:
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
    assert set(quantizers(converted)) == {"0.act", "0.act_2"}  # two calls on one line
    assert_converted(model, converted)
    assert_converted(model, converted, -X)
    assert type(restore(converted)[0].act) is nn.GELU
