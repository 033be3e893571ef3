"""Logits that are infinite or NaN: classes that are ruled out, votes, overflows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantguard import certify
from quantguard.attacks import NES, PGD, Entry, FoolboxModel, Noise, PixelModel, Square, suites
from quantguard.attacks.losses import decided, fools, image_losses, input_gradient, margin, named
from quantguard.core.errors import ConversionError
from quantguard.core.specs import Threat
from quantguard.evaluation.comparison import compare
from quantguard.evaluation.evaluator import evaluate
from quantguard.evaluation.results import Evaluation

Digits = tuple[Tensor, Tensor]
INF, NAN = torch.inf, torch.nan
THREAT = Threat(eps=0.12)


class Behind(nn.Module):
    """Model that applies a function to the logits of some models."""

    def __init__(self, make: Callable[[list[Tensor]], Tensor], *models: nn.Module) -> None:
        super().__init__()
        self.make, self.models = make, nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return self.make([model(x) for model in self.models])


def measured(model: nn.Module, digits: Digits, n: int = 60, **options: object) -> Evaluation:
    x, y = digits[0][:n], digits[1][:n]
    options = {"suite": "quick", **options}
    return evaluate(model.eval(), [(x, y)], THREAT, progress=False, **options)  # type: ignore[arg-type]


# --- predicted classes ---


@pytest.mark.parametrize(("row", "name"), [
    ([1.0, -INF, 2.0], 2), ([-INF, -3.0, -INF], 1), ([INF, 0.0, -INF], 0), ([INF, -INF, -INF], 0),
    ([3e38, -INF, 2e38], 0), ([-3e38, -INF, -3.3e38], 0), ([1e8, 1e8 + 8, -INF], 1),
    ([0.0, 0.0, -INF], 0), ([INF, INF, 0.0], -1), ([-INF, -INF, -INF], -1), ([5.0, NAN, 1.0], -1),
    ([NAN, 0.0, 1.0], -1), ([NAN, NAN, NAN], -1), ([1.0, 3.0, 2.0], 1)])
def test_the_largest_logit_decides(row: list[float], name: int) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]])
    assert named(logits).tolist() == [name, 2]
    for label in range(3):
        y = torch.tensor([label, 2])
        assert fools(logits, y).tolist() == [name != label, False]
        assert (margin(logits, y)[0] > 0) == (name != label) or row.count(max(row)) > 1
    z = decided(logits)
    assert z.isfinite()[0].all() or (name == -1 and z[0].isnan().all())
    assert torch.equal(z[1], logits[1])


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "scaled"])
def test_a_ruled_out_class_changes_no_loss_and_no_gradient(loss: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 7)).eval()
    x, y = torch.rand(16, 1, 3, 3), torch.randint(0, 4, (16,))
    few = PixelModel(Behind(lambda z: z[0][:, :5], net), THREAT)
    more = PixelModel(Behind(lambda z: z[0].index_fill(1, torch.tensor([5, 6]), -INF), net), THREAT)
    for one, other in zip(input_gradient(few, x, y, loss), input_gradient(more, x, y, loss),
                          strict=True):
        torch.testing.assert_close(one, other[:, :5] if other.dim() == 2 else other)
    torch.testing.assert_close(image_losses(few(x), y, loss), image_losses(more(x), y, loss))


@pytest.mark.parametrize("low", [-1e4, -65504.0, -1e9, torch.finfo(torch.float32).min, -INF])
def test_any_low_value_rules_a_class_out(low: float) -> None:
    torch.manual_seed(0)
    z, y = torch.randn(64, 6) * 3, torch.randint(0, 4, (64,))
    masked = decided(z.index_fill(1, torch.tensor([4, 5]), low))
    for loss in ("ce", "margin", "scaled"):
        expected = image_losses(z[:, :4], y, loss)
        torch.testing.assert_close(image_losses(masked, y, loss), expected)


@pytest.mark.parametrize("low", [-1e9, -INF])
def test_dependence_on_the_batch_is_found_behind_a_mask(low: float, digits: Digits,
                                                                 cnn: nn.Module) -> None:
    def beside(z: list[Tensor]) -> Tensor:
        return F.pad(z[0] * (1 + 0.01 * z[0].mean()), (0, 1), value=low)
    result = measured(Behind(beside, cnn), digits, suite=[Noise(repeats=1)])
    assert result.conclusion == "no figure"


def test_nan_in_a_gradient_becomes_zero_and_does_not_spread() -> None:
    x = torch.tensor([[0.2, 0.4], [0.0, 0.4]])
    model = PixelModel(Behind(lambda z: z[0].log(), nn.Flatten()), THREAT)
    gradient, logits = input_gradient(model, x, torch.tensor([1, 1]), "ce")
    assert logits.isfinite().all()
    assert (gradient[0] != 0).all() and (gradient[1] == 0).any() and gradient.isfinite().all()


# --- the evaluation ---


def top(z: Tensor, k: int) -> Tensor:
    return z.masked_fill(z < z.topk(k).values[:, -1:], -INF)


def votes(z: list[Tensor]) -> Tensor:
    return torch.stack([F.one_hot(v.argmax(1), 10).float() for v in z]).sum(0)


MASKS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "the top 3": lambda z: top(z[0], 3), "the top 2": lambda z: top(z[0], 2),
    "an eleventh class": lambda z: F.pad(z[0], (0, 1), value=-INF),
    "an overflow": lambda z: (z[0] * (z[0] == z[0].amax(1, keepdim=True)) * 1e9).half().float()
    + z[0] * 0.1,
    "log-probabilities": lambda z: z[0].softmax(1).log()}


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten ``quick``."""
    monkeypatch.setitem(suites._SUITES, "quick", (10, 30, 20))


@pytest.fixture(scope="module")
def plain(cnn: nn.Module, digits: Digits) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites._SUITES, "quick", (10, 30, 20))
        return measured(cnn, digits)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_do_not_change_robust_accuracy(mask: str, cnn: nn.Module, digits: Digits,
                                                    plain: Evaluation) -> None:
    masked = measured(Behind(MASKS[mask], cnn), digits)
    assert np.array_equal(plain.correct, masked.correct)
    assert plain.robust_accuracy < plain.clean_accuracy - 0.3
    assert masked.robust_accuracy <= plain.robust_accuracy + 0.03 or \
        masked.verdict == "unresolved"
    at = [p.survivors for p in masked.curve if p.eps == THREAT.eps]
    assert at == [int(masked.survived.sum())]


@pytest.mark.parametrize("make", [
    votes, lambda z: votes(z).log(), lambda z: votes(z) / 3, lambda z: (votes(z) / 3).log(),
    lambda z: votes(z).long(), lambda z: votes(z[:1]).log(), lambda z: top(z[0], 1)])
def test_votes_are_broken_or_unresolved(make: Callable[[list[Tensor]], Tensor],
                                                   cnn: nn.Module, quantized: nn.Module,
                                                   digits: Digits) -> None:
    result = measured(Behind(make, cnn, quantized, cnn), digits, 60)
    assert result.clean_accuracy > 0.8
    # images that break one model, judged by the votes
    x, y = digits[0][:60], digits[1][:60]
    moved = PGD("margin", 20).run(FoolboxModel(cnn, THREAT), x, y, epsilon=THREAT.eps)
    with torch.no_grad():
        truth = float((make([cnn(moved), quantized(moved), cnn(moved)]).argmax(1) == y)
                      .float().mean())
    assert result.robust_accuracy <= truth + 0.03 or result.verdict == "unresolved"


def test_a_model_that_returns_the_top_class_only_is_unresolved(cnn: nn.Module,
                                                               digits: Digits) -> None:
    for make in (lambda z: top(z[0], 1), lambda z: votes(z).log(), MASKS["an overflow"]):
        result = measured(Behind(make, cnn), digits, 20, suite=[Noise(repeats=1)])
        assert {f.name: f.kind for f in result.flags if f.raised}["one class alone"] == "unresolved"
    result = measured(Behind(lambda z: 1e6 * z[0], cnn), digits, 20, suite=[Noise(repeats=1)])
    assert not {f.name: f.raised for f in result.flags}["one class alone"]


@pytest.mark.parametrize("nothing", [
    [NAN, 0.0], [0.0, NAN], [INF, INF], [-INF, -INF]])
@pytest.mark.parametrize("attack", [
    Noise(), Square(10), NES(steps=20, rel_h=1.0), PGD("ce", 3), PGD("margin", 3)],
    ids=lambda a: type(a).__name__)
def test_an_image_without_a_class_under_attack_is_broken(attack: object,
                                                              nothing: list[float]) -> None:
    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = x.flatten(1).mean(1, keepdim=True)
            return torch.where(s > 0.501, torch.tensor(nothing), torch.cat([0.8 - s, s - 0.8], 1))

    x, y = torch.full((3, 1, 4, 4), 0.5), torch.tensor([0, 0, 0])
    x[2] = 0.2
    for label in (0, 1):
        model = Bright() if label == 0 else Behind(lambda z: z[0].flip(1), Bright())
        result = evaluate(model.eval(), [(x, y + label)], Threat(eps=0.05), progress=False,
                          suite=[Entry("it", attack, "pgd", True)])
        assert result.correct.all()
        assert result.survived.tolist() == [False, False, True], label


def test_an_image_without_a_class_is_refused() -> None:
    for row in ([-INF, -INF], [INF, INF]):
        model = Behind(lambda z, row=row: z[0][:, :2] * 0 + torch.tensor(row), nn.Flatten())
        with pytest.raises(ConversionError, match="infinite"):
            evaluate(model.eval(), [(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))],
                     suite="quick", progress=False)


def test_transferred_images_without_a_class_are_broken(cnn: nn.Module,
                                                               digits: Digits) -> None:
    x, y = digits[0][:40], digits[1][:40]

    class NoClass(nn.Module):
        """Predicts no class except for the original images."""

        def forward(self, z: Tensor) -> Tensor:
            own = (z.unsqueeze(1) - x).abs().flatten(2).amax(2).amin(1, keepdim=True) < 1e-3
            return torch.where(own, cnn(z), -INF)

    result = compare({"one": cnn, "two": NoClass().eval()}, [(x, y)], THREAT, progress=False,
                     suite=[PGD("ce", 5)])
    one, two = result.rows.values()
    assert (one.correct == two.correct).all() and not two.survived.any()


def test_ruled_out_classes_are_certified_or_refused(cnn: nn.Module,
                                                               digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    mask = torch.zeros(10)
    mask[9] = -INF
    wide = Threat(eps=0.5)
    try:
        result = certify(Behind(lambda z: z[0] + mask, cnn).eval(), [(x, y)], wide, progress=False)
    except ConversionError:
        return
    assert not result.certified.any()
