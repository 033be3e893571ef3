"""The input quantizer: its values, copies, files, certificates and the command line."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import quantguard as qg
from quantguard.cli.main import main
from quantguard.conversion import module_rewrite as rewrite
from quantguard.conversion.converter import with_input_quantizer
from quantguard.core.errors import ConversionError, SpecError
from quantguard.core.specs import InputSpec
from quantguard.nn.input_quantizer import NAME, InputQuantizer
from quantguard.nn.quant_activation import quantizers

INPUT = f"{NAME}.staircase"
THREAT = qg.Threat(eps=0.1)


class Spelled(nn.Module):
    """Model whose own forward is rewritten and takes keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(torch.relu(self.first(pixel_values) * scale).mean((2, 3)))


def images(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def nearest(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Return the expected output of the input quantizer, computed by rounding."""
    step = (high - low) / (2**bits - 1)
    return ((x.double() - low) / step).round().clamp(0, 2**bits - 1) * step + low


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (3, 3, 3), (5, 3, 3, 4, 4), (5, 3, 2, 2)])
@pytest.mark.parametrize("bits", [2, 8])
def test_channels_are_axis_1_whatever_follows(bits: int, shape: tuple[int, ...]) -> None:
    ends = ((0.1, 0.9), (-1.0, 2.0), (0.0, 4.0))
    quantizer = InputQuantizer(InputSpec(bits, *zip(*ends, strict=True)))
    x = 8 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 4
    with qg.soften(quantizer, 1e7):  # the hard one, except on a threshold
        soft = quantizer(x)
    for y in (quantizer(x), soft):
        assert y.shape == x.shape
        for channel, (low, high) in enumerate(ends):
            torch.testing.assert_close(y[:, channel].double(),
                                       nearest(x[:, channel], low, high, bits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2,), (2, 9)])
def test_vectors_and_signals_are_hardened_and_certified(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    threat = qg.Threat(eps=0.02, mean=(0.5, 0.4), std=(0.25, 0.2))
    way = torch.tensor([0.5, 0.4]).reshape(-1, *[1] * (len(shape) - 1))
    x, y = torch.rand(64, *shape), torch.arange(64) % 2
    loader = [((x - way) / (way / 2), y)]
    head: list[nn.Module] = [nn.Linear(2, 8)] if len(shape) == 1 else \
        [nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(28, 8)]
    net = nn.Sequential(*head, nn.ReLU(), nn.Linear(8, 2)).eval()
    with pytest.warns(UserWarning, match="nothing can be held out"):
        hard = qg.harden(net, loader, threat, epochs=1, progress=False)
    assert f"{NAME}.staircase" in quantizers(hard)
    found = qg.certify(hard, loader, threat, progress=False)
    assert found.images == 64
    torch.testing.assert_close(hard.get_submodule(NAME)(loader[0][0]), loader[0][0], rtol=0,
                               atol=0.2)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_levels_go_from_end_to_end(bits: int) -> None:
    quantizer = InputQuantizer(InputSpec(bits, (0.1,), (0.9,)))
    x = torch.linspace(-0.3, 1.3, 1777)
    torch.testing.assert_close(quantizer(x).double(), nearest(x, 0.1, 0.9, bits), atol=1e-6, rtol=0)
    assert len(quantizer(x).unique()) == 2**bits
    wide = InputQuantizer(InputSpec(bits, (0.1, -1.0, 0.0), (0.9, 2.0, 4.0)))(8 * images() - 4)
    for channel, (low, high) in enumerate(((0.1, 0.9), (-1.0, 2.0), (0.0, 4.0))):
        torch.testing.assert_close(wide[:, channel].double(),
                                   nearest((8 * images() - 4)[:, channel], low, high, bits),
                                   atol=1e-5, rtol=0)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(64, 5))


@pytest.mark.parametrize("make", [sequential, Spelled])
@pytest.mark.parametrize("ends", [(0.1, 0.9), [(0.1, 0.9), (0.2, 0.8), (0.0, 1.0)]])
@torch.no_grad()
def test_it_is_copied_saved_and_restored_with_the_model(make: Any, ends: Any,
                                                        tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        p.copy_(torch.randn(p.shape))
    x = images()
    plain = qg.convert(model, 2, example=x)
    made = qg.convert(model, 2, example=x, input_bits=4, input_range=ends)
    assert type(made).__name__ == type(model).__name__ and isinstance(made, type(model))
    assert set(quantizers(made)) == {*quantizers(plain), INPUT}
    assert "input becomes 4-bit" in str(made.quantguard.plan)
    assert made.quantguard.summary() == plain.quantguard.summary()
    quantized = InputQuantizer(made.quantguard.plan.input)(x)
    y = made(x)
    assert torch.equal(y, plain(quantized)) and not torch.allclose(y, plain(x), atol=1e-3)
    if make is Spelled:
        assert torch.equal(made(pixel_values=x, scale=2.0), plain(quantized, 2.0))
    else:
        assert len(made) == 5 and made[0] is next(iter(made)) and isinstance(made[:2],
                                                                            nn.Sequential)
    with qg.bypass(made):
        assert torch.equal(made(x), model(x))
    with qg.soften(made, 2.0):
        assert not torch.equal(made(x), y)
    # copies, pickles, our file, the float model
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for clone in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(clone(x), y) and clone.state_dict().keys() == made.state_dict().keys()
    qg.save(made, tmp_path / "made.qg")
    loaded = qg.load(tmp_path / "made.qg", model=model)
    assert torch.equal(loaded(x), y) and loaded.quantguard.plan.input == made.quantguard.plan.input
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in loaded.state_dict().items())
    back = qg.restore(made)
    assert type(back) is type(model) and torch.equal(back(x), model(x))
    assert back.state_dict().keys() == model.state_dict().keys()


def test_gradients_pass_inside_the_range_only() -> None:
    made = qg.convert(sequential(), 2, input_bits=8, input_range=(0.1, 0.9)).eval()
    x = images().requires_grad_()
    made(x).square().sum().backward()
    outside = (x < 0.09) | (x > 0.91)
    assert outside.any() and not x.grad[outside].any() and x.grad[~outside].any()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_it_is_softened_up_to_4_bits_with_a_straight_through_gradient(
        bits: int, per_channel: bool) -> None:
    rows = 3 if per_channel else 1
    spec = InputSpec(bits, (0.1, 0.2, 0.3)[:rows], (0.9, 0.8, 0.7)[:rows])
    quantizer = InputQuantizer(spec).eval()
    x = torch.rand(4, 3, 5, 5).requires_grad_()
    hard, step = quantizer(x), quantizer.staircase.step.reshape(-1, 1, 1)
    for k in (2.0, 64.0):
        with qg.soften(quantizer, k):
            y = quantizer(x)
        assert ((y - hard).abs() <= (0.501 if k > 2 else 1) * step + 1e-6).all()
        assert torch.allclose(y, hard, atol=1e-6) is (bits > 4)
        (gradient,) = torch.autograd.grad((3 * y).sum(), x)
        assert (gradient == 3).all()


@torch.no_grad()
def test_a_softened_attack_leaves_the_ends_of_the_range() -> None:
    """Only pixels at 0.15 break the model, and the true gradient at 0.05 is 0."""
    line = nn.Linear(64, 2)
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 64))
        line.bias.copy_(64 * 0.13 * torch.tensor([1.0, -1.0]))  # the lowest level is 0.1
    model = qg.convert(nn.Sequential(nn.ReLU(), nn.Flatten(), line), 8, input_bits=8,
                       input_range=(0.1, 0.9), data=[torch.rand(64, 1, 8, 8)])
    x, y = torch.full((8, 1, 8, 8), 0.05), torch.zeros(8, dtype=torch.long)
    for sharpness, broken in ((None, False), ((32.0, 64.0), True)):
        attack = qg.attacks.PGD("ce", 10, noise=0.0, sharpness=sharpness)
        result = qg.evaluate(model, [(x, y)], THREAT, suite=[attack], progress=False)
        assert result.clean_accuracy == 1 and bool(result.survived.any()) is not broken


def test_certificates_include_it(digits: Any, cnn: nn.Module) -> None:
    """Black and white pixels move half as far, which makes intervals narrower."""
    x = (digits[0][:40], digits[1][:40])
    threat = qg.Threat(eps=0.02)
    without = qg.convert(cnn, 4)
    made = with_input_quantizer(without, InputSpec(8, (0.02,), (0.98,)))
    one, two = (qg.certify(m, [x], threat, method="ibp", progress=False) for m in (without, made))
    assert INPUT in two.sites and INPUT not in one.sites
    assert (two.lower >= one.lower - 0.2).all() and (two.lower > one.lower + 0.01).any()
    # A model with no other quantizer.
    alone = qg.convert(cnn, 32, input_bits=2, input_range=(0.0, 1.0))
    assert list(quantizers(alone)) == [INPUT]
    assert qg.certify(alone, [x], threat, method="ibp", progress=False).sites.keys() == {INPUT}
    with pytest.raises(ConversionError, match="already"):
        with_input_quantizer(made, InputSpec(8, (0.02,), (0.98,)))


@torch.no_grad()
def test_a_forward_without_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that bypasses the input quantizer fails the test above."""
    monkeypatch.setattr(rewrite, "through_input_quantizer", lambda forward: forward)
    with pytest.raises(AssertionError):
        test_it_is_copied_saved_and_restored_with_the_model(Spelled, (0.1, 0.9), Path())


@pytest.mark.parametrize("options", [
    {"input_bits": 8}, {"input_range": (0, 1)}, {"input_bits": 9, "input_range": (0, 1)},
    {"input_bits": 8, "input_range": (1, 0)}, {"input_bits": 8, "input_range": 3},
    {"input_bits": 8, "input_range": [(0, 1), (1, 1)]}, {"input_bits": 8, "input_range": ()}])
def test_half_a_range_is_refused(options: Any) -> None:
    with pytest.raises(SpecError, match="input_"):
        qg.convert(sequential(), 2, **options)
    with pytest.raises(SpecError, match="input_"):
        qg.inspect(sequential(), 2, **options)


def test_on_the_command_line(tmp_path: Path) -> None:
    torch.save(sequential(), tmp_path / "float.pt")
    out = tmp_path / "made.qg"
    runner = CliRunner()
    result = runner.invoke(main, ["convert", str(tmp_path / "float.pt"), "-o", str(out),
                                "--input-bits", "8", "--input-range", "0.1,0.9"])
    assert result.exit_code == 0 and "the input becomes 8-bit, from 0.1 to 0.9" in result.output
    assert INPUT in quantizers(qg.load(out))
    result = runner.invoke(main, ["inspect", str(tmp_path / "float.pt"), "--input-bits", "8"])
    assert result.exit_code != 0 and "input_range" in result.output
