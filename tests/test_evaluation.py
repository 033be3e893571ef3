"""The evaluator: worst case per image, honest flags, no trace, and what each wrong input says."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard import evaluation
from quantguard.attacks import PGD, Entry, Noise, Suite
from quantguard.attacks._foolbox import fb
from quantguard.errors import ConversionError, DataError, SpecError
from quantguard.results import Evaluation
from quantguard.spec import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Digits = tuple[Tensor, Tensor]
EPS = 0.1


def cheap(norm: str = "linf") -> list[Any]:
    """A suite of one attack a group, seconds in all."""
    return [Entry("noise", Noise(norm, 3), "noise", True),
            Entry("FGSM", fb.attacks.LinfFastGradientAttack() if norm == "linf" else
                  fb.attacks.L2FastGradientAttack(), "fgsm", True),
            Entry("PGD", PGD("ce", 5, norm=norm), "pgd", True),
            Entry("C&W", fb.attacks.L2CarliniWagnerAttack(2, 5, abort_early=False), "cw", True),
            Entry("twin", PGD("margin", 10, twin=(2, 16), norm=norm), "twin")]


def measured(model: nn.Module, loader: Any, threat: Threat | None = None,
             **options: Any) -> Evaluation:
    options = {"suite": cheap(), "progress": False, **options}
    return qg.evaluate(model, loader, threat or Threat(eps=EPS), **options)


def batches(digits: Digits, n: int, size: int = 64) -> DataLoader[Any]:
    return DataLoader(TensorDataset(digits[0][:n], digits[1][:n]), batch_size=size)


@pytest.fixture(scope="module")
def result(quantized: nn.Module, digits: Digits) -> Evaluation:
    """The cheap suite on 100 digits."""
    return measured(quantized, batches(digits, 100))


@pytest.fixture(scope="module")
def result_l2(quantized: nn.Module, digits: Digits) -> Evaluation:
    return measured(quantized, batches(digits, 100), Threat("l2", 0.5), suite=cheap("l2"))


# --- what counts ---


def test_the_worst_case_is_the_intersection_over_attacks(result: Evaluation) -> None:
    survived = result.correct.copy()
    for attack in result.attacks:
        assert not (attack.broke & ~attack.attacked).any()
        assert not (result.survived & attack.broke).any()
        survived &= ~attack.broke
        assert result.survived.sum() <= (result.correct & ~attack.broke).sum()
    assert np.array_equal(survived, result.survived)
    assert 0 < result.survived.sum() < result.correct.sum()
    assert result.robust_accuracy == result.survived.sum() / 100
    assert np.array_equal(result.surviving("noise", "fgsm", "pgd", "cw", "twin"), survived)
    assert np.array_equal(result.surviving(), result.correct)


def test_attacks_with_a_column_run_on_every_correct_image_and_others_on_survivors(
        result: Evaluation) -> None:
    standing = result.correct.copy()
    for attack in result.attacks:
        everywhere = attack.settings["everywhere"]
        assert np.array_equal(attack.attacked, result.correct if everywhere else standing)
        assert attack.queries >= attack.attacked.sum() > 0
        standing &= ~attack.broke


@pytest.mark.parametrize(("name", "norm", "eps"), [("result", "linf", EPS),
                                                   ("result_l2", "l2", 0.5)])
def test_adversarials_lie_in_the_ball_and_are_really_misclassified(
        name: str, norm: str, eps: float, request: pytest.FixtureRequest, quantized: nn.Module,
        digits: Digits) -> None:
    result: Evaluation = request.getfixturevalue(name)
    x, found = digits[0][:100], torch.from_numpy(result.adversarials)
    delta = (found - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1
    broken = torch.from_numpy(result.correct & ~result.survived)
    assert broken.any() and torch.equal(found[~broken], x[~broken])
    with torch.no_grad():
        assert (quantized(found[broken]).argmax(1) != digits[1][:100][broken]).all()


def test_a_minimum_norm_attacks_own_success_is_beside_its_column_and_not_in_it(
        result: Evaluation) -> None:
    for attack in result.attacks:
        assert (attack.own_success is None) == (attack.label != "C&W")
    carlini = next(a for a in result.attacks if a.label == "C&W")
    assert carlini.own_success is not None and carlini.own_success >= carlini.broke.sum()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_masks_do_not_depend_on_the_loaders_batch_size(size: int, result: Evaluation,
                                                       quantized: nn.Module,
                                                       digits: Digits) -> None:
    other = measured(quantized, batches(digits, 100, size))
    assert np.array_equal(other.survived, result.survived)
    assert np.array_equal(other.adversarials, result.adversarials)
    for one, two in zip(other.attacks, result.attacks, strict=True):
        assert np.array_equal(one.broke, two.broke)


def test_masks_do_not_depend_on_order_or_on_the_other_images(result: Evaluation,
                                                             quantized: nn.Module,
                                                             digits: Digits) -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = measured(quantized, [(digits[0][order], digits[1][order])])
    assert np.array_equal(shuffled.survived, result.survived[order.numpy()])
    first = measured(quantized, batches(digits, 100), images=30)
    assert np.array_equal(first.survived, result.survived[:30])


class Normalised(nn.Module):
    def __init__(self, model: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, torch.tensor([mean]), torch.tensor([std])

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1))


def test_a_normalised_loader_and_a_raw_one_attack_the_same_images(quantized: nn.Module,
                                                                  digits: Digits) -> None:
    mean, std = 0.3, 0.4
    model = copy.deepcopy(quantized)
    with torch.no_grad():  # so that the model is good at what it eats
        model[0].weight.mul_(std)
    pixels, y = (digits[0][:60] * 255).round() / 255, digits[1][:60]
    raw = measured(Normalised(model, mean, std), [(pixels, y)])
    eaten = measured(model, [((pixels - mean) / std, y)],
                     Threat(eps=EPS, mean=(mean,), std=(std,)))
    assert raw.image_hash == eaten.image_hash
    assert np.array_equal(raw.correct, eaten.correct)
    assert np.array_equal(raw.survived, eaten.survived)
    assert np.array_equal(raw.adversarials, eaten.adversarials)


def test_pixels_that_rounding_put_just_outside_are_brought_into_bounds(quantized: nn.Module,
                                                                       digits: Digits) -> None:
    x = digits[0][:20] + torch.where(digits[0][:20] > 0.5, 5e-5, -5e-5)
    result = measured(quantized, [(x, digits[1][:20])])
    assert result.adversarials is not None
    assert result.adversarials.min() >= 0 and result.adversarials.max() <= 1


def test_the_same_seed_gives_the_same_evaluation(quantized: nn.Module, digits: Digits) -> None:
    suite = [fb.attacks.LinfPGD(steps=3), PGD("ce", 3)]  # Foolbox's draws from torch's numbers
    torch.manual_seed(1)
    first = measured(quantized, batches(digits, 40), suite=suite, seed=3)
    torch.manual_seed(2)
    second = measured(quantized, batches(digits, 40), suite=suite, seed=3)
    assert np.array_equal(first.adversarials, second.adversarials)
    assert first.suite == "list" and first.seed == 3


def test_no_eps_breaks_nothing_and_a_hopeless_model_is_0(cnn: nn.Module, digits: Digits) -> None:
    nothing = measured(cnn, batches(digits, 30), Threat(eps=0))
    assert np.array_equal(nothing.survived, nothing.correct) and nothing.correct.any()
    with torch.no_grad():
        wrong = (cnn(digits[0][:30]).argmax(1) + 1) % 10
    hopeless = measured(cnn, [(digits[0][:30], wrong)])
    assert hopeless.clean_accuracy == hopeless.robust_accuracy == 0
    assert hopeless.verdict == "resolved" and "0 of 30" in str(hopeless)


class Stub(fb.attacks.base.FixedEpsilonAttack):
    """Return images moved by ``size``, which may be anything."""

    def __init__(self, size: float) -> None:
        self.size = size

    distance = fb.distances.linf

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **_: Any) -> Any:
        return inputs + self.size


class Bright(nn.Module):
    """Class 1 where the mean is above 0.5; its gradient in every pixel is the same."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.flatten(1).mean(1) - 0.5
        return torch.stack([-s, s], 1)


def grey(*levels: float) -> list[Digits]:
    x = torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return [(x, (torch.tensor(levels) > 0.5).long())]


def test_what_an_attack_returns_is_clipped_to_the_threat_before_it_counts() -> None:
    levels = (0.2, 0.39, 0.41, 0.45, 0.7)
    result = measured(Bright(), grey(*levels), suite=[Stub(10.0)])
    assert result.survived.tolist() == [True, True, False, False, True]
    assert torch.allclose(torch.tensor(result.adversarials[:, 0, 0, 0]),
                          torch.tensor([0.2, 0.39, 0.51, 0.55, 0.7]))


def test_an_attack_that_returns_nan_breaks_nothing() -> None:
    result = measured(Bright(), grey(0.1, 0.2, 0.9), suite=[Stub(float("nan"))])
    assert result.survived.all()
    assert np.isfinite(result.adversarials).all()


# --- flags ---


def raised(result: Evaluation) -> dict[str, str]:
    return {flag.name: flag.kind for flag in result.flags if flag.raised}


MASKED = {"default attacks overstate": "masked"}


@pytest.mark.parametrize(("strong", "weak", "expected"), [
    ("noise", "pgd", {"noise beats white-box": "unresolved", **MASKED}),
    ("transfer", "pgd", {"transfer beats white-box": "unresolved", **MASKED}),
    ("fgsm", "pgd", {"one step beats many": "unresolved"}), ("twin", "pgd", MASKED),
    ("modes", "pgd", MASKED), ("pgd", "noise", {}), ("pgd", "twin", {}), ("pgd", "fgsm", {})])
def test_each_flag_is_wired_to_its_attacks(strong: str, weak: str,
                                           expected: dict[str, str]) -> None:
    loader = grey(*[0.45] * 20, *[0.1] * 180)
    result = measured(Bright(), loader, suite=[
        Entry("strong", Stub(0.1), strong, True), Entry("weak", Stub(-0.1), weak, True)])
    assert result.survived.sum() == 180
    assert raised(result) == expected
    assert result.verdict == ("unresolved" if "unresolved" in expected.values() else "resolved")
    assert result.reliable == (result.verdict == "resolved")


class Flat(nn.Module):
    """A model behind a rounding whose gradient is zero."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "round":
            return self.model((x * 4).round() / 4)
        if self.how == "compare":
            return self.model((x > 0.5).float())
        return self.model(x.detach())


@pytest.mark.parametrize("how", [
    "round", "compare", pytest.param("detach", marks=pytest.mark.slow)])
def test_zero_gradients_are_unresolved_and_not_robust(how: str, cnn: nn.Module,
                                                      quantized: nn.Module,
                                                      digits: Digits) -> None:
    for model in (cnn, quantized):
        result = measured(Flat(model, how).eval(), batches(digits, 60))
        assert result.survived.any()
        assert raised(result)["zero input gradients"] == "unresolved"
        assert result.verdict == "unresolved" and not result.reliable


@pytest.mark.slow
def test_a_sound_float_model_is_neither_masked_nor_unresolved(cnn: nn.Module,
                                                              digits: Digits) -> None:
    result = qg.evaluate(cnn, batches(digits, 250), Threat(eps=0.05), suite="quick",
                         progress=False)
    assert result.correct.sum() > result.survived.sum() > 150
    assert raised(result) == {}
    assert result.verdict == "resolved" and result.reliable
    assert {a.group for a in result.attacks} == {
        "noise", "fgsm", "pgd", "scaled", "modes", "twin", "escalation", "reseeded", "black-box"}


def test_default_attacks_overstate_a_staircase_that_masks_its_gradient(result: Evaluation) -> None:
    assert raised(result)["default attacks overstate"] == "masked"
    assert "[masked]" in str(result)


def test_few_survivors_are_undecided(cnn: nn.Module, digits: Digits) -> None:
    result = measured(cnn, batches(digits, 20))
    assert result.verdict == "undecided" and "Undecided" in str(result)


# --- JSON and files ---


def test_json_round_trip(result: Evaluation, tmp_path: Path) -> None:
    told = json.loads(json.dumps(result.to_dict()))
    read = Evaluation.from_dict(told)
    assert json.loads(json.dumps(read.to_dict())) == told and str(read) == str(result)
    assert np.array_equal(read.survived, result.survived) and read.verdict == result.verdict
    assert read.threat == result.threat and read.flags == result.flags
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == told
    assert told["images"] == 100 and told["survived"] == int(result.survived.sum())
    with pytest.raises(DataError, match="read from JSON"):
        read.save_adversarials(tmp_path / "a.npz")


def test_results_can_be_compared(result: Evaluation) -> None:
    read = Evaluation.from_dict(result.to_dict())
    assert (read == result) in (True, False)
    assert result == result and read.attacks[0] != 3


@pytest.mark.parametrize("change", [{"format": 99}, {"images": None}, {"flags": [{"a": 1}]}])
def test_other_json_is_refused(change: dict[str, Any], result: Evaluation) -> None:
    with pytest.raises(DataError, match="evaluation JSON"):
        Evaluation.from_dict({**result.to_dict(), **change})
    with pytest.raises(DataError, match="no evaluation JSON"):
        Evaluation.from_dict({})


def test_adversarials_are_saved_with_labels(result: Evaluation, tmp_path: Path,
                                            digits: Digits) -> None:
    result.save_adversarials(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["x"], result.adversarials)
        assert np.array_equal(file["y"], digits[1][:100].numpy())
        assert np.array_equal(file["broken"], result.correct & ~result.survived)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    with pytest.raises(DataError, match=r"\.npz"):
        result.save_adversarials(tmp_path / "a.zip")


# --- run_dir ---


class Interrupted(PGD):
    """Raise Ctrl-C at the n-th call in all."""

    left: int | None = None

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        if Interrupted.left is not None:
            Interrupted.left -= 1
            if Interrupted.left < 0:
                raise KeyboardInterrupt
        return super().run(model, inputs, criterion, epsilon=epsilon)


def test_an_interrupted_evaluation_goes_on_to_the_same_result(quantized: nn.Module, digits: Digits,
                                                              tmp_path: Path,
                                                              untouched: Untouched,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              ) -> None:
    loader = batches(digits, 150)
    suite = [Noise("linf", 3), Interrupted("ce", 3), Interrupted("margin", 5, twin=(2, 16)),
             PGD("ce", 3)]
    whole = measured(quantized, loader, suite=suite)
    monkeypatch.setattr(Interrupted, "left", 4)  # in the third attack's second batch
    with pytest.raises(qg.errors.Interrupted, match="after 2 of 4 attacks; saved in"), \
            untouched(quantized):
        measured(quantized, loader, suite=suite, run_dir=tmp_path / "run")
    monkeypatch.setattr(Interrupted, "left", 3)  # the first two attacks are not run again
    resumed = measured(quantized, loader, suite=suite, run_dir=tmp_path / "run")
    assert np.array_equal(resumed.adversarials, whole.adversarials)
    assert np.array_equal(resumed.survived, whole.survived)
    assert resumed.flags == whole.flags
    for one, two in zip(resumed.attacks, whole.attacks, strict=True):
        assert np.array_equal(one.broke, two.broke) and np.array_equal(one.attacked, two.attacked)
        assert (one.settings, one.queries, one.gradients) == (two.settings, two.queries,
                                                              two.gradients)
    again = measured(quantized, loader, suite=suite, run_dir=tmp_path / "run")  # nothing left to do
    assert np.array_equal(again.adversarials, whole.adversarials)


class Rounds(PGD):
    """Break a stated number of standing images, and note where it started."""

    log: ClassVar[weakref.WeakKeyDictionary[Rounds, list[Any]]] = weakref.WeakKeyDictionary()

    def __init__(self, share: int, restart: bool = False) -> None:
        super().__init__("ce", 1, restart=restart)
        self.share = share

    @property
    def starts(self) -> list[Any]:
        """What it was given as starting points; no setting of the attack."""
        return self.log.setdefault(self, [])

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            starting_points: Any = None, **kwargs: Any) -> Any:
        self.starts.append(starting_points)
        found = inputs.clone()
        if len(self.starts) == 1:  # the first batch
            found[: self.share] = 0.55
        return found


@pytest.mark.parametrize(("breaks", "ran"), [
    ([5, 0, 1, 9], 3), ([0, 0, 9], 2), ([5, 1, 5, 1, 0, 9], 5), ([3, 3, 3], 3)])
def test_rounds_go_on_until_two_in_a_row_do_not_pay(breaks: list[int], ran: int, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [Entry(f"round {i}", Rounds(k, restart=i == 1), "escalation")
              for i, k in enumerate(breaks)]
    first, last = Entry("first", Stub(-0.1), "pgd", True), Entry("last", Stub(-0.1), "transfer")
    monkeypatch.setattr(evaluation, "build_suite",
                        lambda *_, **__: Suite([first], rounds, blind=[last]))
    loader = grey(*[0.45] * 250)  # 0.55 is another class; 1 of 250 images does not pay, 2 do
    results = [measured(Bright(), loader, Threat(eps=0.2), run_dir=tmp_path) for _ in range(2)]
    for result in results:  # the second takes what the first has left in the run directory
        assert [a.label for a in result.attacks] == [
            "first", *(f"round {i}" for i in range(ran)), "last"]
        assert [int(a.broke.sum()) for a in result.attacks[1:-1]] == breaks[:ran]
        assert int(result.survived.sum()) == 250 - sum(breaks[:ran])
        pays = ran == len(breaks) and max(breaks[-2:]) > 1
        assert ("escalation still pays" in raised(result)) == pays
    assert all(start is None for start in rounds[0].attack.starts)
    assert all(start is not None for start in rounds[1].attack.starts)
    assert len(rounds[0].attack.starts) == 4  # batches, once


@pytest.mark.parametrize("change", ["eps", "seed", "suite", "images", "model"])
def test_a_run_dir_of_other_settings_is_refused(change: str, cnn: nn.Module, quantized: nn.Module,
                                                digits: Digits, tmp_path: Path) -> None:
    model, threat, suite, seed, n = quantized, Threat(eps=EPS), [PGD("ce", 2)], 0, 20
    measured(model, batches(digits, n), threat, suite=suite, seed=seed, run_dir=tmp_path)
    said = {"eps": "threat", "model": "what the model answers",
            "suite": "the attacks"}.get(change, change)
    model = cnn if change == "model" else model
    threat = Threat(eps=0.05) if change == "eps" else threat
    suite = [PGD("ce", 3)] if change == "suite" else suite
    with pytest.raises(SpecError, match=f"other settings(.|\n)*{said}(.|\n)*another run directory"):
        measured(model, batches(digits, n + (change == "images")), threat, suite=suite,
                 seed=seed + (change == "seed"), run_dir=tmp_path)


# --- the user's model ---


def test_the_users_model_is_untouched(quantized: nn.Module, digits: Digits,
                                      untouched: Untouched) -> None:
    model = copy.deepcopy(quantized).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    loader = DataLoader(TensorDataset(digits[0][:40], digits[1][:40]), batch_size=16, shuffle=True)
    with untouched(model):
        measured(model, loader, device="cpu")
    with untouched(model), pytest.raises(DataError):
        measured(model, [(digits[0][:5].expand(-1, 3, -1, -1), digits[1][:5])])


# --- what loaders and models may be ---


@pytest.mark.slow
def test_every_form_of_batch_gives_the_same_images(quantized: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    expected = measured(quantized, [(x, y)], suite=[PGD("ce", 2)])
    forms: list[Any] = [
        [[x, y]], [{"input": x, "labels": y}], [{"label": y, "input": x}], [(x, y.int())],
        [(x[:3], y[:3]), (x[3:], y[3:])], [(x.double(), y)], ((x, y),),
        DataLoader([{"input": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=6)]
    for form in forms:
        other = measured(quantized, form, suite=[PGD("ce", 2)])
        assert np.array_equal(other.adversarials, expected.adversarials)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, pixel_values: Tensor) -> Any:
        return self.wrap(self.model(pixel_values))


@pytest.mark.parametrize(("dtype", "apart"), [
    pytest.param(torch.float64, 1, marks=pytest.mark.slow), (torch.bfloat16, 3)])
def test_models_of_other_precision_are_attacked_as_they_are(
        dtype: torch.dtype, apart: int, cnn: nn.Module, digits: Digits) -> None:
    other = copy.deepcopy(cnn).to(dtype)
    one = measured(cnn, batches(digits, 64))
    for loader in (batches(digits, 64), batches((digits[0].to(torch.float64), digits[1]), 64)):
        two = measured(other, loader)
        assert next(other.parameters()).dtype == dtype
        assert abs(int(one.survived.sum()) - int(two.survived.sum())) <= apart



@pytest.mark.parametrize("wrap", [lambda z: (z, "more"), lambda z: {"logits": z, "x": 1}])
def test_tuples_and_dicts_of_logits_are_read(wrap: Callable[[Tensor], Any], quantized: nn.Module,
                                             digits: Digits) -> None:
    x, y = digits[0][:20], digits[1][:20]
    expected = measured(quantized, [(x, y)], suite=[PGD("ce", 2)])
    other = measured(Wrapped(quantized, wrap).eval(), [{"pixel_values": x, "labels": y}],
                     suite=[PGD("ce", 2)])
    assert np.array_equal(other.adversarials, expected.adversarials)


class Nan(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.flatten(1)[:, :1] > 2, 0.0, float("nan")) + self.model(x)


def test_nan_logits_and_other_outputs_are_errors(cnn: nn.Module, digits: Digits) -> None:
    with pytest.raises(ConversionError, match="NaN logits(.|\n)*image 0"):
        measured(Nan(cnn).eval(), batches(digits, 5))
    with pytest.raises(ConversionError, match="logits"):
        measured(nn.Sequential(cnn, nn.Flatten(0)).eval(), batches(digits, 5))


ONES = torch.ones(4, dtype=torch.long)
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _generator() -> Iterator[Digits]:
    yield X, ONES


@pytest.mark.parametrize(("loader", "message"), [
    ([(X * 255, ONES)], r"batch 0(.|\n)*0\.\.255: divide them by 255"),
    ([(X, ONES), ((X * 255).byte(), ONES)], r"batch 1(.|\n)*divide them by 255"),
    ([((X - 0.5) / 0.5, ONES)], r"batch 0(.|\n)*normalised: give the mean= and std="),
    ([(X, ONES), (X / 0, ONES)], "batch 1.*NaN or infinite"),
    ([(torch.where(X > 0.9, torch.nan, X), ONES)], "batch 0.*NaN or infinite"),
    ([(X, ONES * 10)], r"labels are 10\.\.10.*0\.\.9: the model has 10 outputs"),
    ([(X, ONES), (X, ONES - 2)], r"batch 1.*labels are -1\.\.-1"),
    ([(X, ONES.float())], "batch 0.*labels are torch.float32"),
    ([(X, torch.eye(10)[:4])], "argmax"),
    ([(X, ONES), (X, ONES[:3])], "batch 1.*4 images and 3 labels"),
    ([(X[:, 0, 0, 0], ONES)], r"shape \(4,\)"),
    ([(X.repeat(1, 3, 1, 1), ONES)], r"does not accept inputs of shape \(4, 3, 8, 8\)"),
    ([(torch.rand(4, 1, 9, 9).repeat(1, 1, 2, 2), ONES)], "does not accept inputs of shape"),
    ([], "the loader is empty"), ([X], "batch 0.*has no labels"), ([(X,)], "has no labels"),
    ([(X, ONES, ONES)], "tuple of 3"), ([(X, [1, 1, 1, 1])], "labels are a list"),
    ([{"labels": ONES}], "without model inputs"),
    ([{"input": X, "mask": X, "labels": ONES}], "'input', 'mask' beside the labels"),
    (_generator(), r"one-shot iterator \(generator\)"), (X, "Tensor, not a loader"),
    (7, "int, not a loader"),
], ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_every_wrong_loader_says_what_is_wrong(loader: Any, message: str, cnn: nn.Module,
                                               untouched: Untouched) -> None:
    with untouched(cnn), pytest.raises(DataError, match=message):
        measured(cnn, loader)


def test_three_channel_models_and_statistics_do_not_eat_grey_images(cnn: nn.Module) -> None:
    rgb = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    with pytest.raises(DataError, match=r"does not accept(.|\n)*channels"):
        measured(rgb, [(X, ONES)])
    with pytest.raises(DataError, match="mean has 3 numbers.*1 channels"):
        measured(cnn, [(X, ONES)], Threat(mean=(0.5,) * 3, std=(0.5,) * 3))


@pytest.mark.parametrize(("options", "message"), [
    ({"suite": "fast"}, "'fast' is unknown"), ({"suite": []}, "no attack"),
    ({"images": 0}, "at least 1")])
def test_impossible_settings(options: dict[str, Any], message: str, cnn: nn.Module) -> None:
    with pytest.raises(SpecError, match=message):
        measured(cnn, [(X, ONES)], **options)


def test_a_device_that_is_not_there_is_our_error(cnn: nn.Module, untouched: Untouched) -> None:
    with untouched(cnn), pytest.raises(SpecError, match="nowhere"):
        measured(cnn, [(X, ONES)], device="nowhere")
