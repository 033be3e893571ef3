"""A certificate is for the model that runs: where its graph says otherwise there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantguard as qg
from quantguard import certification
from quantguard.bounds import flattened
from quantguard.errors import ConversionError
from quantguard.recipes import Recipe

D = 64
X, Y = torch.full((4, D), 0.5), torch.zeros(4, dtype=torch.long)


class Means(nn.Module):
    """Answer by the mean of the features; what is done to them in between is a shrug of 3 %."""

    def __init__(self, change: Callable[[Any, Any], Any] = lambda _, y: y) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D, bias=False), nn.Linear(D, 2)
        self.change, self.calls = change, 0
        self.dice = torch.Generator().manual_seed(0)
        self.drop = nn.Dropout(0.1)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(D))
            self.last.weight.copy_(torch.stack([torch.ones(D), torch.zeros(D)]) / D)
            self.last.bias.copy_(torch.tensor([-0.44, 0.0]))

    def train(self, mode: bool = True) -> Means:
        super().train(mode)
        self.drop.train()  # as those do who sample from it
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        changed = self.change(self, y)
        return self.last(y if changed is None else changed)  # type: ignore[no-any-return]


def _counted(model: Means, y: Tensor) -> Tensor:
    model.calls += 1
    return y * (1 - 0.03 * (model.calls > 2))


def _autocast(model: Means, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z: Tensor = model.first(y)
    return z.float()


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "data": lambda _, y: _void(y.data.mul_(0.97)),
    "out": lambda _, y: _void(torch.mul(y, 0.97, out=y)),
    "narrow": lambda _, y: _void(y.narrow(1, 0, D).mul_(0.97)),
    "select": lambda _, y: _void(y.select(0, 0).mul_(0.97)),
    "T": lambda _, y: _void(y.T.mul_(0.97)),
    "movedim": lambda _, y: _void(y.movedim(0, 1).mul_(0.97)),
    "expand": lambda _, y: _void(y.expand(-1, D).mul_(0.97)),
    "setitem": lambda _, y: _void(y.__setitem__(0, 0.97 * y[0])),
    "unbind": lambda _, y: _void(y.unbind(1)[0].mul_(0.5)),
    "noise of a shape": lambda _, y: y + 0.01 * torch.randn(y.shape[1]),
    "noise of its own generator": lambda m, y: y + 0.01 * torch.randn(D, generator=m.dice),
    "noise of numpy": lambda _, y: y + float(0.01 * np.random.default_rng().normal()),
    "counted calls": _counted,
    "autocast": _autocast,
    "dropout that stays": lambda m, y: m.drop(y),
}


def _void(_: Any) -> None:
    return None


@pytest.mark.parametrize("what", CHANGES)
def test_what_the_graph_does_not_hold_has_no_certificate(what: str) -> None:
    assert qg.certify(Means().eval(), [(X, Y)], qg.Threat(eps=0.05),
                      progress=False).certified.all()
    with pytest.raises(ConversionError):
        qg.certify(Means(CHANGES[what]).eval(), [(X, Y)], qg.Threat(eps=0.05), progress=False)


def test_layers_that_stay_in_training_mode_are_named() -> None:
    with pytest.raises(ConversionError, match=r"drop \(Dropout\), which stays in training mode"):
        qg.certify(Means(CHANGES["dropout that stays"]).eval(), [(X, Y)], qg.Threat(eps=0.05),
                   progress=False)


class Twice(nn.Module):
    """One ReLU for two places, in a forward that torch.fx does not trace at conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.c, self.relu = nn.Linear(D, 2), nn.ReLU()
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight.copy_(torch.eye(D))
            self.c.weight.copy_(torch.stack([torch.ones(D), torch.zeros(D)]) / D)
            self.c.bias.copy_(torch.tensor([-0.44, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return self.c(self.relu(self.b(self.relu(self.a(x)))))  # type: ignore[no-any-return]


def test_calls_that_are_told_apart_at_run_time_have_their_own_staircase() -> None:
    model = qg.convert(Twice().eval(), 8, data=[torch.rand(256, D)])
    t = (torch.arange(255) + 0.5) / 255
    names = [name for name, m in model.named_modules() if type(m).__name__ == "QuantActivation"]
    assert len(names) == 2
    for name, shrink in zip(names, (1.0, 0.97), strict=True):
        model.get_submodule(name).set_thresholds(t, shrink / 255)  # type: ignore[operator]
    found = qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)
    with torch.no_grad():
        logits = model(X - 0.05)
    worst = (logits[:, 0] - logits[:, 1]).double().numpy()
    assert (found.lower <= worst).all() and (found.lower > worst - 1e-3).all()
    assert sorted(found.sites) == sorted(names)


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_a_clamp_without_one_end_has_none(method: str) -> None:
    class Far(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = ((x - 0.5) * 3e31).clamp(max=0.0) * (1 / 3e31)
            return torch.cat([z.mean(1, keepdim=True) + 0.04, 0 * x[:, :1]], 1)
    found = qg.certify(Far().eval(), [(X, Y)], qg.Threat(eps=0.05), method=method, progress=False)
    assert (found.lower <= -0.0099).all() and not found.certified.any()


def test_a_run_directory_belongs_to_one_model(tmp_path: Path) -> None:
    model, threat = Means().eval(), qg.Threat(eps=0.01)
    qg.certify(model, [(X, Y)], threat, run_dir=tmp_path, progress=False)
    with torch.no_grad():  # the same answers at the images
        model.last.weight[0, 0] += 0.2
        model.last.weight[0, 1] -= 0.2
    with pytest.raises(qg.SpecError, match="other settings"):
        qg.certify(model, [(X, Y)], threat, run_dir=tmp_path, progress=False)


def _pooled(**settings: Any) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, 2, 1, **settings), nn.Flatten(), nn.Linear(16, 2))


def _after(function: nn.Module | None, axis: int = 1) -> nn.Module:
    levels = qg.QuantActivation(qg.QuantSpec(2, per_channel=True), function, channels=4, axis=axis)
    return nn.Sequential(nn.Unflatten(1, (4, 4)), levels, nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize(("one", "other"), [
    (lambda: _pooled(), lambda: _pooled(count_include_pad=False)),
    (lambda: _pooled(), lambda: _pooled(divisor_override=2)),
    (lambda: _after(nn.LeakyReLU(0.1)), lambda: _after(nn.LeakyReLU(0.2))),
    (lambda: _after(nn.Hardtanh()), lambda: _after(nn.Hardtanh(-1, 2))),
    (lambda: _after(None, 1), lambda: _after(None, -1)),
])
def test_a_run_directory_belongs_to_one_models_settings(
        one: Callable[[], nn.Module], other: Callable[[], nn.Module], tmp_path: Path) -> None:
    first, second = one().eval(), other().eval()
    second.load_state_dict(first.state_dict())
    shape = (4, 1, 8, 8) if isinstance(first[0], nn.AvgPool2d) else (4, 16)
    data = [(torch.zeros(shape), Y)]
    for model in (first, first):
        qg.certify(model, data, qg.Threat(eps=0.01), run_dir=tmp_path, progress=False)
    with pytest.raises(qg.SpecError, match="other settings"):
        qg.certify(second, data, qg.Threat(eps=0.01), run_dir=tmp_path, progress=False)


def test_the_ball_lies_around_the_image_that_was_given() -> None:
    class Near(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([(1 / 255 + 0.01 + 5e-7) - x, x * 0], 1)
    given = torch.full((1, 1), 1 / 255 + 9e-7)  # taken for 1/255
    found = qg.certify(Near(), [(given, Y[:1])], qg.Threat(eps=0.01), progress=False)
    assert not found.certified.any()


def test_thresholds_that_do_not_ascend_are_refused() -> None:
    model = nn.Sequential(nn.Linear(D, 8), qg.QuantActivation.from_thresholds([0.3, 0.5, 0.7], 1.0),
                          nn.Linear(8, 2)).eval()
    state = model.state_dict()
    state["1.base"] = torch.tensor([0.5, 0.3, 0.7])
    model.load_state_dict(state)
    with pytest.raises(ConversionError, match="do not ascend"):
        qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)


class Calls(nn.Module):
    def __init__(self, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(x).flatten(1)
        return torch.cat([y.mean(1, keepdim=True), y.mean(1, keepdim=True) * 0 - 9], 1)


@pytest.mark.parametrize("call", [
    lambda x: x.clamp(0.5, 0.5), lambda x: torch.add(x, 1.0, alpha=2),
    lambda x: nn.functional.avg_pool2d(x.reshape(-1, 1, 8, 8), [2, 2])])
def test_calls_that_look_odd_have_bounds(call: Callable[[Any], Any]) -> None:
    assert qg.certify(Calls(call), [(X, Y)], qg.Threat(eps=0.05), progress=False).certified.all()


def test_a_window_of_padding_alone_is_refused() -> None:
    model = Calls(lambda x: nn.functional.max_pool2d(
        x[:, :1].reshape(-1, 1, 1, 1), 2, 2, padding=1, dilation=2))
    with pytest.raises(ConversionError):
        qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)


def test_inference_mode_around_it_changes_nothing(tmp_path: Path) -> None:
    model = Means().eval()
    with torch.inference_mode():
        found = qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), method="crown",
                           progress=False)
    assert found.certified.all()


def test_one_class_alone_is_certain_and_stays_so_in_json(tmp_path: Path) -> None:
    model = nn.Linear(D, 1).eval()
    found = qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)
    found.save(tmp_path / "c.json")
    again = type(found).load(tmp_path / "c.json")
    assert (again.lower == found.lower).all() and again.certified.all()


def test_a_sequence_of_three_channels_is_normalised_by_channel() -> None:
    from quantguard.batches import from_pixels
    x, threat = torch.rand(2, 2, 5), qg.Threat(mean=(0.1, 0.9), std=(0.5, 0.25))
    wanted = (x - torch.tensor([[0.1], [0.9]])) / torch.tensor([[0.5], [0.25]])
    torch.testing.assert_close(from_pixels(x, threat), wanted)


def test_training_goes_through_the_model_that_runs() -> None:
    model = Means(CHANGES["noise of a shape"]).eval()
    from torch.utils.data import DataLoader, TensorDataset
    loader = DataLoader(TensorDataset(torch.rand(300, D), torch.zeros(300, dtype=torch.long)), 32)
    with pytest.raises(ConversionError):
        qg.harden(model, loader, qg.Threat(eps=0.05), bits=32, epochs=1, progress=False,
                  recipe=Recipe("ibp", init="keep", input_bits=0))


def test_matrix_products_are_float32_whatever_is_allowed_elsewhere() -> None:
    from torch.backends import cuda, cudnn, mkldnn

    from quantguard.running import true_float32

    def now() -> list[Any]:
        return [cuda.matmul.allow_tf32, cudnn.allow_tf32,
                mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision]  # type: ignore[attr-defined]
    before, precision = now(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        loose = now()
        with true_float32():
            assert now() == [False, False, "ieee", "ieee"]
        assert now() == loose != [False, False, "ieee", "ieee"]
    finally:
        torch.set_float32_matmul_precision(precision)
    assert now()[:2] == before[:2]


class Asks(nn.Module):
    """Answer 0; turn the answer where ten pixels are bright, if that is found out unseen."""

    def __init__(self, answer: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.head, self.other, self.answer = nn.Linear(D, 2), nn.Linear(D, 2), answer
        self.levels = qg.QuantActivation.from_thresholds([-3.0, 0.5, 3.0], 0.5, zero=1)
        with torch.no_grad():
            for layer, bias in ((self.head, [1.0, 0.0]), (self.other, [0.0, 1.0])):
                layer.weight.zero_()
                layer.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor) -> Any:
        return self.answer(self, x)


def _bright(x: Any) -> Any:
    return (x[:, :10] > 0.55).all(1, keepdim=True)


def _caught(m: Asks, x: Any) -> Any:
    try:
        turned = bool(_bright(x).any())
    except Exception:
        turned = False
    return -m.head(x) if turned else m.head(x)


def _number(m: Asks, x: Any) -> Any:
    y, least = m.head(x), x.amin().item()
    return -y if isinstance(least, float) and least > 0.55 else y


def _array(m: Asks, x: Any) -> Any:
    y, pixels = m.head(x), x.numpy()
    return -y if isinstance(pixels, np.ndarray) and pixels.min() > 0.55 else y


def _converted_number(m: Asks, x: Any) -> Any:
    y = m.head(x)
    try:
        return -y if float(x.amin()) > 0.55 else y
    except TypeError:
        return y


def _count(m: Asks, x: Any) -> Any:
    y, many = m.head(x), (x < 0.55).nonzero().shape[0]
    return -y if isinstance(many, int) and not many else y


def _after_levels(m: Asks, x: Any) -> Any:
    y = m.levels(m.head(x))
    return y - 2 * (y * _bright(x)) if type(x) is Tensor else y


def _scripted(m: Asks, x: Any) -> Any:
    y = m.head(x)
    return -y if torch.is_tensor(x) and SCRIPTED(x) else y


SCRIPTED = torch.jit.CompilationUnit("""
def bright(x):
    return bool((x[:, :10] > 0.55).all())
""").bright

ASKED: dict[str, Callable[[Any, Any], Any]] = {
    "swallowed refusal": _caught,
    "is_tensor": lambda m, x: -m.head(x) if torch.is_tensor(x) and _bright(x).all() else m.head(x),
    "isinstance": lambda m, x: m.head(x) * (1 - 2 * _bright(x).float())
    if isinstance(x, Tensor) else m.head(x),
    "after a staircase": _after_levels, "a number": _number, "an array": _array,
    "float()": _converted_number, "a count": _count, "a scripted function": _scripted,
    "other constants": lambda m, x: (m.other if isinstance(x, Tensor) else m.head)(x),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", ASKED)
def test_a_forward_that_branches_unseen_has_no_certificate(what: str) -> None:
    with pytest.raises(ConversionError, match="compute what its graph|traced into one graph"):
        qg.certify(Asks(ASKED[what]).eval(), [(X, Y)], qg.Threat(eps=0.1), progress=False)


def _checks(m: Asks, x: Any) -> Any:
    if isinstance(x, Tensor):
        assert x.dim() == 2 and x.shape[1] == D and x.dtype == torch.float32
    y = m.levels(m.head(x) * torch.ones(2).mul(2))
    return y if m.levels.base.sum() < 9 else -y


def test_a_forward_may_ask_for_shapes_and_look_at_constants() -> None:
    assert qg.certify(Asks(_checks).eval(), [(X, Y)], qg.Threat(eps=0.1),
                      progress=False).certified.all()


def test_a_forward_that_fails_where_its_graph_does_not_is_refused() -> None:
    def fails(m: Asks, x: Any) -> Any:
        if isinstance(x, Tensor) and len(x) < 4:
            raise RuntimeError("too few\nof them")
        return m.head(x)
    with pytest.raises(ConversionError, match="compute what its graph says\nIt says: too few\nA"):
        qg.certify(Asks(fails).eval(), [(X, Y)], qg.Threat(eps=0.1), progress=False)


def test_all_pixels_darker_and_all_brighter_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Tensor] = []
    model = Asks(lambda m, x: m.head(x)).eval()
    check = certification.check_faithful

    def noted(flat: Any, points: Tensor, *rest: Any) -> None:
        met.append(points)
        check(flat, points, *rest)
    monkeypatch.setattr(certification, "check_faithful", noted)
    qg.certify(model, [(X, Y)], qg.Threat(eps=0.1), progress=False)
    for shift in (-0.1, 0.1):
        assert any(torch.equal(x[:4], X + shift) for x in met)


def test_hooks_of_all_modules_are_refused() -> None:
    def turned(module: nn.Module, args: Any, y: Any) -> Any:
        return -y if type(module) is nn.Linear and bool(_bright(args[0]).any()) else y
    handle = nn.modules.module.register_module_forward_hook(turned)
    try:
        with pytest.raises(ConversionError, match="head .Linear., which has hooks"):
            qg.certify(Asks(lambda m, x: m.head(x)).eval(), [(X, Y)], qg.Threat(eps=0.04),
                       progress=False)
    finally:
        handle.remove()


class Written(nn.Module):
    """Write over what a staircase gives out; then read what it was given, or not."""

    def __init__(self, again: bool, spelled: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.levels = qg.QuantActivation.from_thresholds([0.2, 0.4, 0.6], 0.2)
        self.again, self.spelled = again, spelled

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        z = y.sigmoid() if self.spelled else y
        w = self.levels(y, z) if self.spelled else self.levels(y)
        w += 1
        return self.last(w + (z if self.again else 0))


@pytest.mark.parametrize("spelled", [False, True])
def test_a_staircase_in_float_gives_out_what_it_was_given(spelled: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [Written(again, spelled).eval() for again in (False, True)]
    for model in models:
        flattened(model, qg.Threat(), None, X)
    with qg.bypass(models[0]):
        qg.certify(models[0], [(X, Y)], qg.Threat(eps=0.05), progress=False)
    with qg.bypass(models[1]), pytest.raises(ConversionError, match="is read again"):
        flattened(models[1], qg.Threat(), None, X)
