"""Attacks against classifiers whose margins are known in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import Problem
from torch import Tensor, nn

import quantguard as qg
from quantguard.attacks import (
    APGD,
    PGD,
    Entry,
    FoolboxModel,
    Noise,
    PixelModel,
    Square,
    build_suite,
    logits_of,
)
from quantguard.attacks import pgd as pgd_room
from quantguard.attacks._foolbox import fb
from quantguard.attacks.losses import ascend, attack_loss, margin, project, rival
from quantguard.attacks.noise import image_noise
from quantguard.attacks.pgd import Kept
from quantguard.errors import ConversionError, SpecError
from quantguard.spec import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
def distance(x: Tensor, center: Tensor, norm: str) -> Tensor:
    delta = (x - center).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


def assert_finds_what_is_there(attack: Any, problem: Problem, model: nn.Module) -> None:
    """The oracle: 99 % of the images inside eps are broken, none outside, all candidates legal."""
    threat = Threat(problem.norm, problem.eps)
    criterion = fb.criteria.Misclassification(problem.y)
    found = attack.run(FoolboxModel(model, threat), problem.x, criterion, epsilon=problem.eps)
    assert found.shape == problem.x.shape and found.dtype == problem.x.dtype
    assert distance(found, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1
    with torch.no_grad():
        fooled = model(found).argmax(1) != problem.y
    inside = problem.margin < problem.eps
    assert fooled[inside].float().mean() >= 0.99
    assert not fooled[~inside].any()


@pytest.fixture(scope="module", params=["linf", "l2"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("options", [
    {}, {"noise": 0.0}, {"decay": True, "rel_step": 0.2}, {"twin": (2, 16)},
    {"mode": "sigmoid(8)"}, {"mode": "ste"}, {"bits": 32}], ids=str)
def test_pgd_breaks_a_linear_model_up_to_its_margin(problem: Problem, loss: str,
                                                    options: dict[str, Any]) -> None:
    attack = PGD(loss, 60, norm=problem.norm, **{"rel_step": 0.1, **options})
    assert_finds_what_is_there(attack, problem, problem.linear())


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("options", [
    {"mode": "ramp"}, {"mode": "ste"}, {"mode": "sigmoid"}, {"mode": "sigmoid(2)"},
    {"mode": "parent"}, {"twin": (2, 16)}, {"twin": (8, 8)}], ids=str)
def test_pgd_breaks_a_staircase_up_to_its_margin(problem: Problem, loss: str,
                                                 options: dict[str, Any]) -> None:
    attack = PGD(loss, 60, rel_step=0.1, norm=problem.norm, **options)
    assert_finds_what_is_there(attack, problem, problem.staircase(width=100.0))


class EpsIgnored(PGD):
    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float,
            **kwargs: Any) -> Any:
        return super().run(model, inputs, criterion, epsilon=3 * epsilon)


def _flipped(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda gradient, norm: -original(gradient, norm)


def _unprojected(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, center, eps, norm, bounds: x.clamp(*bounds)


@pytest.mark.parametrize(("name", "breaking"), [("ascend", _flipped), ("project", _unprojected)])
def test_the_oracle_rejects_a_broken_pgd(problem: Problem, name: str, breaking: Any,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgd_room, name, breaking(getattr(pgd_room, name)))
    with pytest.raises(AssertionError):
        assert_finds_what_is_there(PGD("ce", 60, rel_step=0.1, norm=problem.norm), problem,
                                   problem.linear())


def test_the_oracle_rejects_a_pgd_that_ignores_eps(problem: Problem) -> None:
    with pytest.raises(AssertionError):
        assert_finds_what_is_there(EpsIgnored("ce", 60, norm=problem.norm), problem,
                                   problem.linear())


def test_the_oracle_rejects_an_attack_that_does_nothing(problem: Problem) -> None:
    with pytest.raises(AssertionError):
        assert_finds_what_is_there(Noise(problem.norm), problem, problem.linear())


def test_twin_finds_what_ramp_misses_behind_a_narrow_window(problem: Problem) -> None:
    """No image lies in the window, so ramp's gradient is 0 everywhere; the twin's never is."""
    model = problem.staircase(width=0.03)
    fmodel, criterion = FoolboxModel(model), fb.criteria.Misclassification(problem.y)
    options: dict[str, Any] = {"rel_step": 0.1, "norm": problem.norm, "noise": 0.0}
    for loss in ("ce", "margin"):
        ramp = PGD(loss, 60, **options).run(fmodel, problem.x, criterion, epsilon=problem.eps)
        assert torch.equal(ramp, problem.x)
        assert_finds_what_is_there(PGD(loss, 60, twin=(0.2, 2), **options), problem, model)


@pytest.mark.parametrize("options", [
    {"loss": "margin", "target": 1}, {"loss": "scaled"}, {"average": 3}, {"noise": 0.3},
    {"loss": "margin", "target": 5}])
def test_every_way_of_climbing_finds_what_is_there(problem: Problem,
                                                   options: dict[str, Any]) -> None:
    options = {"loss": "ce", "rel_step": 0.4, "decay": True, "norm": problem.norm, **options}
    attack = PGD(steps=60, **options)
    assert_finds_what_is_there(attack, problem, problem.linear())
    assert_finds_what_is_there(attack, problem, problem.staircase(width=100.0))


def test_targets_are_ranked_among_the_wrong_classes() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.0, 1.0, 3.0, 2.0]])
    labels = torch.tensor([0, 2])
    assert [rival(logits, labels, k).tolist() for k in (1, 2, 3, 9)] == [
        [2, 3], [3, 1], [1, 0], [1, 0]]
    loss = attack_loss(logits, labels, "margin", torch.tensor([3, 0]))
    assert float(loss) == (2 - 5) + (0 - 3)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-3])
def test_the_scaled_loss_knows_no_scale(scale: float) -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.zeros(20, dtype=torch.long)
    gradients = [torch.autograd.grad(attack_loss(s * logits, labels, "scaled"), logits)[0]
                 for s in (1.0, scale)]
    torch.testing.assert_close(*gradients)
    huge = torch.autograd.grad(attack_loss(1e3 * logits, labels, "ce"), logits)[0]
    assert (huge == 0).flatten(1).all(1).any()  # which cross-entropy does


def test_what_stands_is_returned_where_it_came_nearest(problem: Problem) -> None:
    model, criterion = problem.linear(), fb.criteria.Misclassification(problem.y)
    standing = problem.margin > problem.eps
    margins = []
    for steps in (3, 30):  # one long step that overshoots must not be the last word
        x = PGD("ce", steps, rel_step=3.0, norm=problem.norm).run(
            FoolboxModel(model), problem.x, criterion, epsilon=problem.eps)
        with torch.no_grad():
            margins.append(margin(model(x), problem.y)[standing])
    assert (margins[1] >= margins[0] - 1e-6).all()


def test_a_restart_starts_where_it_is_told(problem: Problem) -> None:
    model = problem.linear()
    criterion = fb.criteria.Misclassification(problem.y)
    fell = PGD("ce", 60, rel_step=0.1, norm=problem.norm).run(
        FoolboxModel(model), problem.x, criterion, epsilon=problem.eps)
    for restart in (True, False):
        attack = PGD("ce", 1, rel_step=1e-6, noise=0.0, norm=problem.norm, restart=restart)
        x = attack.run(FoolboxModel(model), problem.x, criterion, epsilon=problem.eps,
                       starting_points=fell)
        with torch.no_grad():
            broken = int((model(x).argmax(1) != problem.y).sum())
        assert broken == (int((problem.margin < problem.eps).sum()) if restart else 0)
        assert distance(x, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)


@pytest.mark.parametrize("options", [{"average": 0}, {"target": 1}, {"noise": 1.5},
                                     {"noise": -0.1}])
def test_impossible_climbs(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        PGD("ce", 3, **options)


def test_an_image_that_fell_is_kept_as_it_fell(problem: Problem) -> None:
    """With one huge step the last iterate may be right again; the first that fooled is returned."""
    model = problem.linear()
    weak = problem.margin < 0.02 * problem.eps
    x = problem.x.clone()
    wrong = problem.y.clone()
    wrong[~weak] = 1 - wrong[~weak]  # as good as misclassified from the start
    found = PGD("ce", 5, norm=problem.norm, noise=0.0).run(
        FoolboxModel(model, Threat()), x, fb.criteria.Misclassification(wrong),
        epsilon=problem.eps)
    assert torch.equal(found[~weak], x[~weak])


@pytest.mark.parametrize("attack", [PGD("ce", 20), PGD("margin", 20, twin=(2, 16), target=1),
                                    APGD("ce", 20, twin=(2, 16)), APGD("dlr", 20, target=1),
                                    Square(100)], ids=lambda a: type(a).__name__)
def test_leaving_out_what_fell_changes_no_image(quantized: nn.Module, attack: Any,
                                                digits: tuple[Tensor, Tensor],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    right = (quantized(digits[0]).argmax(1) == digits[1]).nonzero().flatten()[:100]
    x, y = digits[0][right], digits[1][right]
    found = {}
    for least in (pgd_room._LEAST, 100):
        monkeypatch.setattr(pgd_room, "_LEAST", least)
        model = PixelModel(quantized, Threat(eps=0.2))
        points = attack.run(FoolboxModel(model), x, fb.criteria.Misclassification(y), epsilon=0.2)
        found[least] = points, model.queries
    (some, few), (every, all_) = found.values()
    assert torch.equal(some, every)
    assert few < 0.9 * all_


def test_rows_are_left_out_by_the_quarter_and_standing_ones_kept() -> None:
    labels = torch.zeros(100, dtype=torch.long)
    kept = Kept(torch.zeros(100, 2), labels)
    standing = torch.tensor([3, 4, 50, 98])

    def judge(falls: Tensor) -> None:
        logits = torch.stack([~falls, falls], 1).float()[kept.rows]
        kept.judge(torch.full((len(kept.rows), 2), 1.0), logits)

    falls = torch.zeros(100, dtype=torch.bool)
    falls[:24] = True
    judge(falls)
    assert kept.standing() is None  # 76 stand
    falls[:] = True
    falls[standing] = False
    judge(falls)
    keep = kept.standing()
    assert keep is not None and len(keep) == len(kept.rows) == 9  # 100, 75, 57, ..., not under 8
    assert torch.isin(standing, kept.rows).all() and torch.equal(kept.rows, kept.rows.sort().values)



@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_candidates_stay_within_bounds_at_the_edge_of_the_range(bounds: tuple[float, float],
                                                                problem: Problem) -> None:
    low, high = bounds
    x = torch.where(problem.x > 0.5, high, low)
    eps = 0.2 * (high - low)
    threat = Threat(problem.norm, eps, bounds)
    fmodel = FoolboxModel(problem.linear(), threat)
    for attack in (PGD("ce", 5, norm=problem.norm), PGD("ce", 5, norm=problem.norm, twin=(2, 8)),
                   Noise(problem.norm, 4)):
        found = attack.run(fmodel, x, fb.criteria.Misclassification(problem.y), epsilon=eps)
        assert low <= found.min() and found.max() <= high
        assert distance(found, x, problem.norm).max() <= eps * (1 + 1e-5)


# --- plain Foolbox calls ---


def test_usable_through_a_plain_foolbox_call(problem: Problem) -> None:
    fmodel = qg.attacks.FoolboxModel(problem.linear(), Threat(problem.norm, problem.eps))
    attack = qg.attacks.PGD("ce", 60, rel_step=0.1, norm=problem.norm)
    raw, clipped, fooled = attack(fmodel, problem.x, problem.y, epsilons=problem.eps)
    assert (fooled == (problem.margin < problem.eps)).float().mean() >= 0.99
    assert distance(clipped, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    assert raw.shape == problem.x.shape
    several = attack(fmodel, problem.x, problem.y, epsilons=[0.0, problem.eps / 2, problem.eps])[2]
    counts = several.sum(1).tolist()
    assert counts[0] == 0 and counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("attack", [
    fb.attacks.LinfPGD(steps=10), fb.attacks.L2PGD(rel_stepsize=0.5, steps=10),
    fb.attacks.LinfFastGradientAttack()], ids=lambda a: type(a).__name__)
def test_foolbox_model_works_with_foolboxs_own_attacks(attack: Any) -> None:
    problem = Problem("linf", 20)
    fmodel = FoolboxModel(problem.linear())
    raw, _, fooled = attack(fmodel, problem.x, problem.y, epsilons=1.0)
    assert fooled.all() and raw.shape == problem.x.shape


def test_a_plain_foolbox_model_is_told_to_use_ours(problem: Problem) -> None:
    plain = fb.PyTorchModel(problem.linear(), bounds=(0, 1), device="cpu")
    with pytest.raises(ConversionError, match="hides it(.|\n)*quantguard.attacks.FoolboxModel"):
        PGD()(plain, problem.x, problem.y, epsilons=0.1)
    _, _, fooled = Noise("linf", 2)(plain, problem.x, problem.y, epsilons=0.1)
    assert fooled.shape == problem.y.shape


def test_a_targeted_criterion_is_refused_and_not_misread(problem: Problem) -> None:
    target = fb.criteria.TargetedMisclassification(1 - problem.y)
    with pytest.raises(ValueError, match=r"(?i)criterion|untargeted"):
        PGD("ce", 2)(FoolboxModel(problem.linear()), problem.x, target, epsilons=0.1)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"loss": "dlr"}, "ce, margin"), ({"steps": 0}, "at least 1")])
def test_impossible_settings_of_pgd(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PGD(**arguments)


def test_an_unknown_mode_is_refused(problem: Problem) -> None:
    with pytest.raises(SpecError, match="straight"):
        PGD("ce", 2, mode="straight")(FoolboxModel(problem.staircase(1.0)), problem.x, problem.y,
                                      epsilons=0.1)


# --- the pieces ---


def test_margin_is_positive_exactly_where_misclassified() -> None:
    z = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 7
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)
    assert margin(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([1])).item() == -2.0


@pytest.mark.parametrize("scale", [1e3, 1.0, 1e-9, 1e-20])
def test_the_steepest_direction_has_unit_length_however_small_the_gradient(scale: float) -> None:
    g = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    flat = torch.zeros(1, 1, 3, 3)
    for norm in ("linf", "l2"):
        steps = ascend(torch.cat([g * scale, flat]), norm)
        expected = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        assert torch.allclose(steps[:5], expected, atol=1e-5)
        assert torch.equal(steps[5:], flat)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_project_leaves_what_is_inside_and_shortens_what_is_not(norm: str) -> None:
    g = torch.Generator().manual_seed(0)
    center = torch.rand(50, 1, 4, 4, generator=g)
    near = center + 1e-3 * torch.randn(center.shape, generator=g)
    far = center + torch.randn(center.shape, generator=g)
    eps = 0.1
    assert torch.allclose(project(near, center, eps, norm, (-9, 9)), near, atol=1e-6)
    shorter = project(far, center, eps, norm, (-9, 9))
    assert torch.allclose(distance(shorter, center, norm), torch.full((50,), eps), rtol=1e-4)
    legal = project(far, center, eps, norm, (0, 1))
    assert legal.min() >= 0 and legal.max() <= 1
    assert (distance(legal, center, norm) <= eps * (1 + 1e-5)).all()
    assert torch.equal(project(center, center, 0.0, norm, (0, 1)), center)


@dataclass
class Answer:
    """What some models return of their own."""

    pred: Tensor | None
    aux: Tensor | None = None


class Output(dict[str, Tensor]):
    """What Hugging Face models return."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


@pytest.mark.parametrize("wrap", [
    lambda z: z, lambda z: (z, None), lambda z: [z], lambda z: {"logits": z, "loss": 0},
    lambda z: Output(logits=z), lambda z: {"pred": z}, lambda z: {"pred": z, "loss": None},
    lambda z: (None, z), lambda z: Answer(z), lambda z: Answer(None, z), lambda z: ({"pred": z},),
    lambda z: {"logits": (z, z + 1)}])
def test_logits_are_found_in_what_models_return(wrap: Callable[[Tensor], Any]) -> None:
    z = torch.randn(3, 4)
    assert logits_of(wrap(z)) is z


@pytest.mark.parametrize(("output", "said"), [
    (torch.zeros(3), r"\(3,\)"), (torch.zeros(3, 4, 2, 2), r"\(3, 4, 2, 2\)"),
    ({}, "a dict of nothing"), ((), "a tuple of nothing"), ("text", "str"), (None, "None"),
    (({"logits": 1},), "a tuple of a dict of 'logits': int"),
    ({"out": torch.zeros(3, 4), "h": torch.zeros(3, 9)},
     r"a dict of 'out': \(3, 4\), 'h': \(3, 9\)"),
    ((None, torch.zeros(3, 4), torch.zeros(3, 9)), r"a tuple of None, \(3, 4\), \(3, 9\)")])
def test_other_outputs_are_refused_by_what_they_are(output: Any, said: str) -> None:
    with pytest.raises(ConversionError, match=f"returns {said} where logits"):
        logits_of(output)


def test_pixel_model_counts_and_undoes_the_normalisation() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x.flatten(1)

    threat = Threat(mean=(0.5, 0.25, 0.0), std=(0.5, 2.0, 1.0))
    model = PixelModel(Spy(), threat)
    x = torch.rand(4, 3, 2, 2)
    model(x)
    model(x.clone().requires_grad_())
    assert (model.queries, model.gradients) == (8, 4)
    mean, std = torch.tensor(threat.mean).view(3, 1, 1), torch.tensor(threat.std).view(3, 1, 1)
    assert torch.allclose(seen[0], (x - mean) / std)


# --- noise ---


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_image_noise_belongs_to_the_image_and_not_to_its_batch(norm: str) -> None:
    x = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = image_noise(x, norm, 3, "tag")
    order = torch.randperm(9)
    assert torch.equal(image_noise(x[order], norm, 3, "tag"), whole[order])
    assert torch.equal(image_noise(x[4:5], norm, 3, "tag"), whole[4:5])
    assert torch.equal(image_noise(x.to(memory_format=torch.channels_last), norm, 3, "tag"), whole)
    assert torch.equal(image_noise(x.double(), norm, 3, "tag"), whole)
    assert whole.dtype == torch.float32 and whole.shape == x.shape


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_image_noise_depends_on_image_seed_and_tag_and_on_nothing_global(norm: str) -> None:
    x = torch.rand(2, 1, 4, 4)
    before = torch.get_rng_state()
    first = image_noise(x, norm, 0, "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(image_noise(x, norm, 0, "a"), first)
    changed = x.clone()
    changed[0, 0, 0, 0] += 1e-6
    for other in (image_noise(x, norm, 1, "a"), image_noise(x, norm, 0, "b"),
                  image_noise(changed, norm, 0, "a")):
        assert not torch.equal(other[0], first[0])


def test_image_noise_is_uniform_in_its_ball() -> None:
    x = torch.rand(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    box = image_noise(x, "linf", 0, "t")
    assert box.abs().max() <= 1 and abs(box.mean()) < 0.02 and abs(box.var() - 1 / 3) < 0.01
    radius = image_noise(x, "l2", 0, "t").flatten(1).norm(dim=1)
    # P(radius <= r) = r^d in a ball of d dimensions
    assert radius.max() <= 1 + 1e-6
    for r in (0.5, 0.8, 0.95):
        assert abs((radius <= r).float().mean() - r**4) < 0.03


def test_noise_finds_only_points_of_the_ball_and_some_of_them(problem: Problem) -> None:
    model = problem.linear()
    attack = Noise(problem.norm, 20)
    found = attack.run(FoolboxModel(model), problem.x, fb.criteria.Misclassification(problem.y),
                       epsilon=problem.eps)
    assert distance(found, problem.x, problem.norm).max() <= problem.eps * (1 + 1e-5)
    fooled = model(found).argmax(1) != problem.y
    assert fooled.any() and not fooled[problem.margin > problem.eps].any()


# --- no trace ---


class Exploding(nn.Module):
    """Raise at the n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError
        return x


ATTACKS = [PGD("ce", 3), PGD("margin", 3, twin=(2, 16)), PGD("ce", 3, bits=32),
           PGD("ce", 3, mode="sigmoid(4)"), Noise("linf", 3), PGD("ce", 3, norm="l2")]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: str(a)[:60])
@pytest.mark.parametrize("calls", [1, 2, 1000])
def test_attacks_leave_no_trace_even_when_the_model_fails(attack: Any, calls: int,
                                                          untouched: Untouched) -> None:
    problem = Problem("linf", 30)
    model = problem.staircase(width=1.0)
    model.append(Exploding(calls))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[1].bias.requires_grad_(False)
    fmodel = FoolboxModel(model)
    fails = pytest.raises(ZeroDivisionError) if calls < 1000 else nullcontext()
    with untouched(model), fails:
        attack.run(fmodel, problem.x, fb.criteria.Misclassification(problem.y), epsilon=0.1)
    assert not problem.x.requires_grad


# --- suites ---


@pytest.mark.parametrize(("suite", "message"), [
    ("standart", "did you mean 'standard'"), ("", "Use one of quick, standard"),
    ([], "holds no attack"), ([PGD(), "quick"], "attack 2 of the suite is a str"),
    ([PGD], "attack 1 of the suite is a")])
def test_impossible_suites_say_what_is_possible(suite: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_suite(suite, Threat(), seed=0, quantized=True)


@pytest.mark.parametrize("suite", [
    "quick", "standard", "paper", "full",
    [PGD("ce", 3, twin=(2, 4)), Noise(), fb.attacks.L2DeepFoolAttack(),
     fb.attacks.BoundaryAttack()]], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("quantized", [True, False])
def test_settings_of_every_entry_are_json(suite: Any, norm: str, quantized: bool) -> None:
    entries = build_suite(suite, Threat(norm), seed=5, quantized=quantized, saturated=True).every
    settings = [entry.settings() for entry in entries]
    assert json.loads(json.dumps(settings)) == settings
    assert len({s["label"] for s in settings}) == len(entries)
    assert all(entry.cost >= 1 for entry in entries)
    # beside them in the JSON stands what the attack did
    done = {"queries", "gradients", "seconds", "own_success", "median_norm", "attacked_images",
            "broke_images"}
    assert not any(done & set(s) for s in settings)
    assert not [s for s in settings if " at 0x" in json.dumps(s)]


@pytest.mark.parametrize("suite", ["quick", "standard", "full"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_float_row_gets_the_same_budget_as_a_quantized_one(suite: str, norm: str) -> None:
    float_row, quantized_row = (build_suite(suite, Threat(norm), seed=0, quantized=q)
                                for q in (False, True))
    assert sum(e.cost for e in float_row.every) == sum(e.cost for e in quantized_row.every)
    for entry in float_row.every + quantized_row.every:
        if isinstance(entry.attack, PGD | Noise):
            assert entry.attack.norm == norm
    assert {e.group for e in quantized_row.entries} - {"cw", "other"} == {
        "noise", "fgsm", "pgd", "modes", "twin"}
    assert not {e.group for e in quantized_row.entries} & {"transfer", "black-box", "escalation"}
    assert {e.group for e in quantized_row.reseeded} == {"reseeded"}
    assert {e.group for e in quantized_row.blind} - {"black-box"} == {"transfer"}
    trained = {"transfer"} if suite == "full" else set()  # a substitute, on any model
    assert {e.group for e in float_row.blind} - {"black-box"} == trained
    assert {e.group for e in quantized_row.rounds} == {"escalation"}


def test_a_list_may_hold_entries_with_names_of_their_own() -> None:
    mine = Entry("mine", PGD("ce", 2), "pgd", everywhere=True)
    suite = build_suite([mine, PGD("ce", 2)], Threat(), seed=0, quantized=False)
    entries = suite.entries
    assert not suite.rounds and not suite.blind
    assert entries[0] is mine and entries[1].group == "pgd" and entries[1].everywhere


@pytest.mark.parametrize(("attack", "group"), [
    (PGD("ce", 2), "pgd"), (PGD("ce", 2, twin=(2, 16)), "twin"), (PGD(bits=32), "transfer"),
    (Noise(), "noise"), (fb.attacks.LinfPGD(), "pgd"), (fb.attacks.FGSM(), "fgsm"),
    (fb.attacks.L2CarliniWagnerAttack(), "cw"), (fb.attacks.BoundaryAttack(), "other")])
def test_an_attack_of_a_list_is_known_for_what_it_is(attack: Any, group: str) -> None:
    assert build_suite([attack], Threat(), seed=0, quantized=True).entries[0].group == group
