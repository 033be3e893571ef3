"""Quantized models recorded by torch.jit.trace and by the ONNX exporter."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantguard as qg

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning",
                                        "ignore:It is recommended that constant folding")
SPECS = [qg.QuantSpec(bits, dynamic, per_channel) for bits, dynamic, per_channel in
         itertools.product(range(1, 9), (False, True), (False, True))]


@pytest.fixture(autouse=True)
def autocast_cache() -> Iterator[None]:
    """Switch autocast's cache on again: an export that torch gives up leaves it off."""
    yield
    torch.set_autocast_cache_enabled(True)


def through_file(model: nn.Module, x: Tensor) -> nn.Module:
    """Trace a model on x, save it, and load it."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    return torch.jit.load(file)


def through_onnx(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """Export a model with a dynamic batch size, and return it as run by onnxruntime."""
    torch.onnx.export(model, (x,), str(path), dynamo=False, input_names=["x"],
                      dynamic_axes={"x": {0: "n"}})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"x": images.numpy()})[0])


def same(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.isnan(), two.isnan()) \
        and torch.equal(one.nan_to_num(0.5), two.nan_to_num(0.5))


def uneven(spec: qg.QuantSpec, channels: int) -> qg.QuantActivation:
    """Return a quantizer with unequal, shifted thresholds."""
    g = torch.Generator().manual_seed(spec.bits)
    m, rows = 2**spec.bits - 1, (channels,) if spec.per_channel else ()
    q = qg.QuantActivation(spec, nn.ReLU(), channels=channels)
    q.set_thresholds((torch.rand(*rows, m, generator=g) + 0.05).cumsum(-1) * 2 / m - 0.3,
                     torch.rand(rows, generator=g) + 0.2, zero=1.0)
    with torch.no_grad():
        for p in q.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return q.eval()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_thresholds_and_their_neighbours_get_the_same_bits(spec: qg.QuantSpec,
                                                           tmp_path: Path) -> None:
    q, inf = uneven(spec, 3), torch.tensor(torch.inf)
    t = q.thresholds.detach().reshape(-1, 2**spec.bits - 1).expand(3, -1)
    odd = torch.tensor([float("nan"), torch.inf, -torch.inf, 0.0, -0.0, 1e30]).expand(3, -1)
    x = torch.cat([torch.nextafter(t, -inf), t, torch.nextafter(t, inf), odd], 1).unsqueeze(0)
    wanted = q(x)
    level = (x.unsqueeze(-1) > t.unsqueeze(1)).sum(-1)  # by its definition
    step = q.step.detach().reshape(-1, 1)
    assert same(wanted, torch.where(x.isnan(), x, (level - 1.0) * step))
    loaded, exported = through_file(q, x), through_onnx(q, x, tmp_path / "q.onnx")
    for many in (1, 2, 5):  # images
        images = x.expand(many, -1, -1).contiguous()
        assert same(loaded(images), q(images)) and same(exported(images), q(images))


class Residual(nn.Module):
    """Model with an activation whose input is read again."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 36, 5)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x)
        rows = h.flatten(1)
        self.relu(h)
        return self.head(rows + F.gelu(rows))


class Opaque(nn.Module):
    """Model whose forward torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(108, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        h = self.relu(self.a(x.flatten(1)))
        if h.sum() >= 0:
            h = F.silu(self.b(h))
        return self.c(self.relu(h))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4),
                         nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))


INPUT = {"input_bits": 3, "input_range": (0.0, 1.0)}
ROWS = {"input_bits": 8, "input_range": ((0.0, 1.0), (0.1, 0.9), (0.2, 1.1))}


@pytest.mark.parametrize("options", [{}, INPUT, ROWS], ids=["", "input", "input per channel"])
@pytest.mark.parametrize("spec", [qg.QuantSpec(2), qg.QuantSpec(4, True, True)], ids=str)
@pytest.mark.parametrize("make", [plain, lambda: Residual(False), pytest.param(
    Opaque, marks=pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"))])
def test_a_recorded_model_computes_the_same(make: Callable[[], nn.Module], spec: qg.QuantSpec,
                                      options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = qg.convert(make(), spec, data=[torch.rand(64, 3, 6, 6)], **options).eval()
    x = torch.rand(2, 3, 6, 6)
    loaded, exported = through_file(model, x), through_onnx(model, x, tmp_path / "m.onnx")
    for many in (1, 2, 33):  # images
        images = torch.rand(many, 3, 6, 6)
        assert torch.equal(loaded(images), model(images))
        # sums in another order may cross a threshold
        off = (exported(images) - model(images)).abs().amax(1) > 1e-5
        assert off.sum() <= 1
    for context in (qg.bypass(model), qg.soften(model, 4.0)):
        with context:
            loaded = through_file(model, x)
            assert torch.equal(loaded(images), model(images))


def test_an_in_place_write_that_is_read_later_is_recorded_or_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 6)
    model = qg.convert(Residual(True), 2, data=[torch.rand(64, 3, 6, 6)]).eval()
    assert torch.equal(through_file(model, x)(x), model(x))
    with pytest.raises(qg.ConversionError, match="writes over its input"):
        through_onnx(model, x, tmp_path / "m.onnx")
    with qg.bypass(model), pytest.raises(qg.ConversionError, match="writes over its input"):
        through_onnx(model, x, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # from BatchNorm
@pytest.mark.parametrize("dynamic", [False, True])
def test_exports_that_would_lose_the_gradient_are_refused(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 6)
    model = qg.convert(plain(), 2, dynamic=dynamic, data=[torch.rand(64, 3, 6, 6)])
    with pytest.raises(qg.ConversionError, match=r"training mode[^$]*model\.eval"):
        torch.jit.trace(model.train(), x)
    with pytest.raises(qg.ConversionError, match="training mode"):
        torch.onnx.export(model.eval(), (x,), str(tmp_path / "m.onnx"), dynamo=False,
                          training=torch.onnx.TrainingMode.TRAINING)
    with pytest.raises(qg.ConversionError, match=r"torch\.jit\.trace"):
        torch.jit.script(model.eval())
    x.requires_grad_()  # zero gradients would pass for robustness
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(through_file(model.eval(), x)(x).sum(), x)
    assert torch.autograd.grad(model(x).sum(), x)[0].any()


def test_a_traced_model_accepts_half_precision_and_double() -> None:
    torch.manual_seed(0)
    model = qg.convert(plain(), 4, dynamic=True, data=[torch.rand(64, 3, 6, 6)]).eval()
    for kind in (torch.float64, torch.bfloat16):
        x = torch.rand(3, 3, 6, 6, dtype=kind)
        assert torch.equal(through_file(model.to(kind), x)(x), model(x))
