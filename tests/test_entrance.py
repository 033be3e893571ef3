"""A staircase on the input: what it computes, and that everything carries it along."""

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
from quantguard import rewrite
from quantguard.activation import staircases
from quantguard.cli import main
from quantguard.conversion import with_entrance
from quantguard.entrance import NAME, InputStaircase
from quantguard.errors import ConversionError, SpecError
from quantguard.spec import InputSpec

ENTRANCE = f"{NAME}.staircase"
THREAT = qg.Threat(eps=0.1)


class Spelled(nn.Module):
    """A root whose own forward is rewritten, and which eats keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(torch.relu(self.first(pixel_values) * scale).mean((2, 3)))


def images(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def nearest(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Return what the staircase must give, in another way."""
    step = (high - low) / (2**bits - 1)
    return ((x.double() - low) / step).round().clamp(0, 2**bits - 1) * step + low


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (3, 3, 3), (5, 3, 3, 4, 4), (5, 3, 2, 2)])
@pytest.mark.parametrize("bits", [2, 8])
def test_channels_are_axis_1_whatever_follows(bits: int, shape: tuple[int, ...]) -> None:
    ends = ((0.1, 0.9), (-1.0, 2.0), (0.0, 4.0))
    entrance = InputStaircase(InputSpec(bits, *zip(*ends, strict=True)))
    x = 8 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 4
    with qg.soften(entrance, 1e7):  # at once the hard one, but for who stands on a threshold
        soft = entrance(x)
    for y in (entrance(x), soft):
        assert y.shape == x.shape
        for channel, (low, high) in enumerate(ends):
            torch.testing.assert_close(y[:, channel].double(),
                                       nearest(x[:, channel], low, high, bits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(2,), (2, 9)])
def test_rows_and_signals_are_hardened_and_certified(shape: tuple[int, ...]) -> None:
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
    assert f"{NAME}.staircase" in staircases(hard)
    found = qg.certify(hard, loader, threat, progress=False)
    assert found.images == 64
    torch.testing.assert_close(hard.get_submodule(NAME)(loader[0][0]), loader[0][0], rtol=0,
                               atol=0.2)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_levels_go_from_end_to_end(bits: int) -> None:
    entrance = InputStaircase(InputSpec(bits, (0.1,), (0.9,)))
    x = torch.linspace(-0.3, 1.3, 1777)
    torch.testing.assert_close(entrance(x).double(), nearest(x, 0.1, 0.9, bits), atol=1e-6, rtol=0)
    assert len(entrance(x).unique()) == 2**bits
    wide = InputStaircase(InputSpec(bits, (0.1, -1.0, 0.0), (0.9, 2.0, 4.0)))(8 * images() - 4)
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
def test_it_goes_wherever_the_model_goes(make: Any, ends: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        p.copy_(torch.randn(p.shape))
    x = images()
    plain = qg.convert(model, 2, example=x)
    made = qg.convert(model, 2, example=x, input_bits=4, input_range=ends)
    assert type(made).__name__ == type(model).__name__ and isinstance(made, type(model))
    assert set(staircases(made)) == {*staircases(plain), ENTRANCE}
    assert "input becomes 4-bit" in str(made.quantguard.plan)
    assert made.quantguard.summary() == plain.quantguard.summary()
    entered = InputStaircase(made.quantguard.plan.input)(x)
    y = made(x)
    assert torch.equal(y, plain(entered)) and not torch.allclose(y, plain(x), atol=1e-3)
    if make is Spelled:
        assert torch.equal(made(pixel_values=x, scale=2.0), plain(entered, 2.0))
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
    for twin in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), y) and twin.state_dict().keys() == made.state_dict().keys()
    qg.save(made, tmp_path / "made.qg")
    loaded = qg.load(tmp_path / "made.qg", model=model)
    assert torch.equal(loaded(x), y) and loaded.quantguard.plan.input == made.quantguard.plan.input
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in loaded.state_dict().items())
    back = qg.restore(made)
    assert type(back) is type(model) and torch.equal(back(x), model(x))
    assert back.state_dict().keys() == model.state_dict().keys()


def test_gradients_pass_it_inside_the_range_alone() -> None:
    made = qg.convert(sequential(), 2, input_bits=8, input_range=(0.1, 0.9)).eval()
    x = images().requires_grad_()
    made(x).square().sum().backward()
    outside = (x < 0.09) | (x > 0.91)
    assert outside.any() and not x.grad[outside].any() and x.grad[~outside].any()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_its_twin_is_smooth_up_to_4_bits_and_hands_gradients_on(bits: int,
                                                                per_channel: bool) -> None:
    rows = 3 if per_channel else 1
    spec = InputSpec(bits, (0.1, 0.2, 0.3)[:rows], (0.9, 0.8, 0.7)[:rows])
    entrance = InputStaircase(spec).eval()
    x = torch.rand(4, 3, 5, 5).requires_grad_()
    hard, step = entrance(x), entrance.staircase.step.reshape(-1, 1, 1)
    for k in (2.0, 64.0):
        with qg.soften(entrance, k):
            y = entrance(x)
        assert ((y - hard).abs() <= (0.501 if k > 2 else 1) * step + 1e-6).all()
        assert torch.allclose(y, hard, atol=1e-6) is (bits > 4)
        (gradient,) = torch.autograd.grad((3 * y).sum(), x)
        assert (gradient == 3).all()


@torch.no_grad()
def test_who_climbs_the_twin_comes_out_of_the_ends() -> None:
    """A pixel near 0 may reach 0.15, and only that breaks it: from 0.05 no gradient leads there."""
    line = nn.Linear(64, 2)
    with torch.no_grad():
        line.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 64))
        line.bias.copy_(64 * 0.13 * torch.tensor([1.0, -1.0]))  # the lowest level is 0.1
    model = qg.convert(nn.Sequential(nn.ReLU(), nn.Flatten(), line), 8, input_bits=8,
                       input_range=(0.1, 0.9), data=[torch.rand(64, 1, 8, 8)])
    x, y = torch.full((8, 1, 8, 8), 0.05), torch.zeros(8, dtype=torch.long)
    for twin, falls in ((None, False), ((32.0, 64.0), True)):
        attack = qg.attacks.PGD("ce", 10, noise=0.0, twin=twin)
        result = qg.evaluate(model, [(x, y)], THREAT, suite=[attack], progress=False)
        assert result.clean_accuracy == 1 and bool(result.survived.any()) is not falls


def test_the_certificate_sees_it(digits: Any, cnn: nn.Module) -> None:
    """Black and white pixels move half as far: intervals are the narrower for it."""
    x = (digits[0][:40], digits[1][:40])
    threat = qg.Threat(eps=0.02)
    without = qg.convert(cnn, 4)
    made = with_entrance(without, InputSpec(8, (0.02,), (0.98,)))
    one, two = (qg.certify(m, [x], threat, method="ibp", progress=False) for m in (without, made))
    assert ENTRANCE in two.sites and ENTRANCE not in one.sites
    assert (two.lower >= one.lower - 0.2).all() and (two.lower > one.lower + 0.01).any()
    # what a graph without it would say is found out
    alone = qg.convert(cnn, 32, input_bits=2, input_range=(0.0, 1.0))
    assert list(staircases(alone)) == [ENTRANCE]
    assert qg.certify(alone, [x], threat, method="ibp", progress=False).sites.keys() == {ENTRANCE}
    with pytest.raises(ConversionError, match="already"):
        with_entrance(made, InputSpec(8, (0.02,), (0.98,)))


@torch.no_grad()
def test_a_model_that_forgets_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: a forward that goes past its entrance."""
    monkeypatch.setattr(rewrite, "through_entrance", lambda forward: forward)
    with pytest.raises(AssertionError):
        test_it_goes_wherever_the_model_goes(Spelled, (0.1, 0.9), Path())


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
    told = runner.invoke(main, ["convert", str(tmp_path / "float.pt"), "-o", str(out),
                                "--input-bits", "8", "--input-range", "0.1,0.9"])
    assert told.exit_code == 0 and "the input becomes 8-bit, from 0.1 to 0.9" in told.output
    assert ENTRANCE in staircases(qg.load(out))
    told = runner.invoke(main, ["inspect", str(tmp_path / "float.pt"), "--input-bits", "8"])
    assert told.exit_code != 0 and "input_range" in told.output
