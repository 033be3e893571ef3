"""Certified training: its intervals against the certificate's own, its gradients, its models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_certify import ACTIVATIONS, BLOCKS, QUANTIZERS, images, points, random_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard import bounds, intervals, training
from quantguard.activation import QuantActivation, staircases
from quantguard.attacks import PixelModel
from quantguard.certifying import CertifiedObjective, begin_afresh, input_of, own_lr, schedule
from quantguard.crafting import craft
from quantguard.errors import ConversionError, Interrupted, SpecError
from quantguard.hardening import Hardened, hardened
from quantguard.interval_rules import Interval, between
from quantguard.intervals import graph_of, propagate, worst_case
from quantguard.recipes import Recipe
from quantguard.running import evaluating
from quantguard.training import Trainer

EPS = 0.05
THREAT = qg.Threat(eps=EPS)
# An early softplus jumps, which a certificate counts as rounding.
KINDS = [*(name for name in ACTIVATIONS if name != "softplus, early"), *QUANTIZERS]


def logits_of(model: nn.Module, pixels: Tensor, eps: float = EPS, **threat: Any) -> Interval:
    told = qg.Threat(eps=eps, **threat)
    flat = graph_of(model, told, None, pixels)
    return propagate(flat, intervals.around(pixels, eps, (0.0, 1.0)))


def holds(model: nn.Module, pixels: Tensor) -> None:
    """Check that random points stay inside, and that the certificate's own boxes are the same."""
    found = logits_of(model, pixels)
    labels = torch.arange(len(pixels)) % 3
    worst = worst_case(found, labels)
    for x in points(pixels, THREAT, 32):
        y = model(x)
        slack = 1e-4 * (1 + y.abs().amax())
        assert (y >= found.lower - slack).all() and (y <= found.upper + slack).all()
        assert (y - y.gather(1, labels[:, None]) <= worst + slack).all()
    box = bounds.propagate(bounds.flattened(model, THREAT, None, pixels),
                           bounds.around(pixels, THREAT))
    # 1e-3: where an end lies on a threshold the two may round to different steps, not here
    torch.testing.assert_close(found.lower.double(), box.lower, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.upper.double(), box.upper, rtol=1e-3, atol=1e-3)
    margins = bounds.margins(box, labels, False)
    others = margins.isfinite()
    torch.testing.assert_close(-worst.double()[others], margins[others], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(len(KINDS)))
@torch.no_grad()
def test_every_block_and_activation_agrees_with_the_certificate(seed: int) -> None:
    names = [(BLOCKS[(seed + i) % len(BLOCKS)], KINDS[(seed + 5 * i) % len(KINDS)])
             for i in (0, 4)]
    holds(random_net(names, seed).eval(), images(3, seed))




def _signed(m: nn.Linear, x: Interval) -> Interval:
    return Interval(m(x.center), F.linear(x.radius, m.weight))


@torch.no_grad()
def test_a_broken_twin_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = random_net([("plain", "relu")], 1).eval(), images(3, 1)
    holds(model, pixels)
    for table, key, broken in (
            (intervals.MODULES, nn.Linear, _signed),
            (intervals.MODULES, nn.ReLU, lambda f, x: Interval(f(x.center), f(x.radius)))):
        with monkeypatch.context() as patch:
            patch.setitem(table, key, broken)
            with pytest.raises(AssertionError):
                holds(model, pixels)


@torch.no_grad()
def test_normalised_images_have_the_same_intervals() -> None:
    model, pixels = random_net([("bn", "2 bits")], 3).eval(), images(2, 3)
    mean, std = (0.3, 0.5), (0.2, 0.4)
    scaled = nn.Sequential(_Undo(mean, std), model)
    a, b = logits_of(model, pixels), logits_of(scaled, pixels, mean=mean, std=std)
    torch.testing.assert_close(a.center, b.center, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.radius, b.radius, rtol=1e-3, atol=1e-3)


class _Undo(nn.Module):
    def __init__(self, mean: Any, std: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


# ---- training mode ----

def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
                         nn.Linear(36, 6), nn.BatchNorm1d(6, momentum=None), nn.Softplus(),
                         nn.Linear(6, 3))


def test_batchnorm_sees_the_centers_as_torch_would() -> None:
    model, pixels = small().train(), images(8, 0)
    twin = copy.deepcopy(model)
    for _ in range(2):
        found = logits_of(model, pixels, 0.0)
        torch.testing.assert_close(found.center, twin(pixels), rtol=1e-4, atol=1e-5)
    assert found.radius.abs().max() < 1e-6
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(),
                                    strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)
    # at any radius the first BatchNorm sees the same centers
    inside = pixels.clamp(0.2, 0.8)
    before = logits_of(model, inside, 0.0), model[1].running_mean.clone()
    model.load_state_dict(twin.state_dict())
    logits_of(model, inside, 0.1)
    torch.testing.assert_close(model[1].running_mean, before[1])


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    model, pixels = small().train(), images(4, 0).double()
    flat = graph_of(model, THREAT, None, pixels.float())
    model.double()  # the graph holds the model itself
    labels = torch.tensor([0, 1, 2, 0])
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = list(parameters)

    def loss(*values: Tensor) -> Tensor:
        wrapped = {f"model.{name}": v for name, v in zip(names, values, strict=True)}
        with torch.nn.utils.stateless._reparametrize_module(flat.root, wrapped):
            found = propagate(flat, intervals.around(pixels, 0.03, (0.0, 1.0)))
            return F.cross_entropy(worst_case(found, labels), labels)

    assert torch.autograd.gradcheck(loss, [v.requires_grad_() for v in parameters.values()],
                                    atol=1e-6)


def test_the_slope_through_a_staircase_is_one_from_end_to_end() -> None:
    q = QuantActivation.from_thresholds([0.5, 1.0, 1.5], step=0.5)
    lower = torch.linspace(-0.5, 2.2, 28).add(1e-3).requires_grad_()
    upper = (lower.detach() + 0.3).requires_grad_()
    found = intervals.MODULES[QuantActivation](q, between(lower, upper))
    assert torch.equal(found.lower, q(lower)) and torch.equal(found.upper, q(upper))
    slopes = torch.autograd.grad(found.lower.sum() + 2 * found.upper.sum(), (lower, upper))
    for ends, slope, factor in zip((lower, upper), slopes, (1, 2), strict=True):
        expected = factor * ((ends > 0.25) & (ends < 1.75)).float()
        torch.testing.assert_close(slope, expected)


def test_wide_last_layers_fall_back_to_the_logits_own_intervals(
        monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = random_net([("plain", "relu")], 2).eval(), images(3, 2)
    labels = torch.tensor([0, 1, 2])
    together = worst_case(logits_of(model, pixels), labels)
    monkeypatch.setattr(intervals, "_PAIRS", 0)
    apart = worst_case(logits_of(model, pixels), labels)
    assert (apart >= together - 1e-6).all() and (apart > together + 1e-3).any()
    assert torch.equal(apart.gather(1, labels[:, None]), torch.zeros(3, 1))


# ---- the recipe ----

def test_radius_and_rate_follow_their_course() -> None:
    objective = CertifiedObjective(PixelModel(small(), THREAT), THREAT, Recipe("ibp"))
    radii = []
    for progress in (0.0, 0.05, 0.275, 0.5, 0.9):
        objective.at(progress)
        radii.append(objective.eps)
    torch.testing.assert_close(torch.tensor(radii), torch.tensor([0, 0, EPS / 2, EPS, EPS]))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    course = schedule(optimizer, 1000)
    rates = []
    for _ in range(1000):
        rates.append(course.get_last_lr()[0])
        optimizer.step()
        course.step()
    assert rates[0] == pytest.approx(1 / 50) and rates[49] == rates[400] == 1
    assert rates[700] == pytest.approx(0.5) and 0 < rates[-1] < 0.01


def test_weights_are_drawn_anew_by_their_fan_in() -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 200),
                          nn.ReLU(), nn.Linear(200, 100))
    model[1].running_mean.fill_(3.0)
    inputs = torch.rand(3, 400)
    begin_afresh(model, inputs, 0)
    for layer, wanted in ((0, (2 * torch.pi) ** 0.5 / 400), (3, 300 ** -0.5),
                          (5, (2 * torch.pi) ** 0.5 / 200)):
        assert float(model[layer].weight.detach().std()) == pytest.approx(wanted, rel=0.02)
        assert not model[layer].bias.any()
    assert not model[1].running_mean.any()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    other = copy.deepcopy(model)
    begin_afresh(other, inputs, 1)
    assert not torch.equal(other[0].weight, model[0].weight)


def test_wide_layers_without_batchnorm_take_smaller_steps() -> None:
    def rate(*layers: nn.Module) -> float:
        return own_lr(nn.Sequential(nn.Flatten(), *layers), torch.rand(2, 1, 8, 8))

    last = nn.Linear(64, 10)
    assert rate(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), last) == rate(last) == 2e-2
    wide = rate(nn.Linear(64, 6400), nn.ReLU(), nn.Linear(6400, 64), nn.ReLU(), last)
    assert wide == pytest.approx(0.3 / 80) and wide < rate(nn.Linear(64, 64), nn.ReLU(), last)


def test_the_input_keeps_what_eps_leaves_of_the_range() -> None:
    spec = input_of(qg.Threat(eps=0.1, mean=(0.5, 0.4), std=(0.5, 0.2)), 8)
    assert spec is not None
    torch.testing.assert_close(torch.tensor([spec.low, spec.high]),
                               torch.tensor([[-0.8, -1.5], [0.8, 2.5]]))
    assert input_of(qg.Threat(eps=0.5), 8) is None and input_of(THREAT, 0) is None


@pytest.mark.parametrize("settings", [
    {"steps": 3}, {"mix": 0.5}, {"awp": 0.01}, {"init": "zero"}, {"growth": (0.5, 0.1)},
    {"growth": 3}, {"input_bits": 9}, {"box": 0}, {"box": 1.1}, {"box": 0.5, "steps": 0}])
def test_settings_that_make_no_sense_are_refused(settings: Any) -> None:
    with pytest.raises(SpecError, match="recipe ibp"):
        Recipe("ibp", **settings)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 10))


@pytest.fixture(scope="module")
def loader(train_digits: TensorDataset) -> DataLoader[Any]:
    return DataLoader(train_digits, batch_size=32, shuffle=True)


def certified(model: nn.Module, loader: Any, **options: Any) -> Hardened:
    options = {"bits": 2, "dynamic": None, "recipe": "ibp", "epochs": 6, "train": "all",
               "val": None, "run_dir": None, "seed": 0, "device": None, "progress": False,
               **options}
    return hardened(model, loader, THREAT, **options)


@pytest.fixture(scope="module")
def trained(loader: DataLoader[Any], one_thread: None) -> Hardened:
    torch.manual_seed(0)
    return certified(net(), loader)


def test_a_net_without_batchnorm_learns_as_well(loader: DataLoader[Any], digits: Any) -> None:
    bare = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))
    made = certified(bare, loader).model
    test = [(digits[0][:200], digits[1][:200])]
    assert qg.certify(made, test, THREAT, method="ibp", progress=False).certified_accuracy > 0.5


def test_it_raises_what_can_be_certified(trained: Hardened, digits: Any, cnn: nn.Module) -> None:
    test = [(digits[0], digits[1])]
    before = qg.certify(qg.convert(cnn, 2), test, THREAT, method="ibp", progress=False)
    after = qg.certify(trained.model, test, THREAT, method="ibp", progress=False)
    assert before.certified_accuracy < 0.05 and after.certified_accuracy > 0.5
    history = trained.stages[0].history
    assert (history.kept.probe or 0) > max(e.probe or 0 for e in history.epochs) - 0.05
    # the probe is what the certificate finds, but for its slack
    held = [(images, labels) for images, labels in DataLoader(
        TensorDataset(*digits), batch_size=100)]
    model = PixelModel(trained.model, THREAT)
    objective = CertifiedObjective(model, THREAT, Recipe("ibp"))
    with evaluating(model), torch.no_grad():
        worst = torch.cat([worst_case(objective.intervals(x, EPS), y).scatter(1, y[:, None], -99)
                           for x, y in held]).amax(1)
    # where an end lies on a threshold, the certificate's slack takes it to the next step
    lower = torch.from_numpy(after.lower)
    assert (-worst >= lower - 1e-4).all()
    assert (-worst.double() - lower < 1e-3).double().mean() > 0.97


def test_thresholds_are_fixed_unless_they_are_to_be_learned(trained: Hardened,
                                                            loader: DataLoader[Any]) -> None:
    assert not any(m.spec.dynamic for m in staircases(trained.model).values())
    model = qg.convert(net(), 2, dynamic=True)
    recipe = Recipe("ibp", init="keep", input_bits=0)
    made = certified(model, loader, bits=None, epochs=1, recipe=recipe).model
    for name, module in staircases(made).items():
        before, t = model.get_submodule(name).thresholds, module.thresholds
        assert not torch.equal(t, before), name
        assert ((t[1:] - t[:-1]) > 0.1 * (before[1:] - before[:-1])).all()  # none has merged
    assert not torch.equal(made[0].weight, model[0].weight)
    with pytest.raises(SpecError, match="train='thresholds' leaves them out"):
        certified(model, loader, bits=None, train="thresholds")
    with pytest.raises(SpecError, match="linf"):
        hardened(model, loader, qg.Threat("l2", eps=0.1), **{
            "bits": None, "dynamic": None, "recipe": "ibp", "epochs": 1, "train": "all",
            "val": None, "run_dir": None, "seed": 0, "device": None, "progress": False})


@pytest.mark.slow
def test_smaller_boxes_lie_around_attacked_images_within_the_ball(
        loader: DataLoader[Any], digits: Any) -> None:
    recipe = Recipe("ibp", box=0.4)
    assert recipe.attacks and not Recipe("ibp").attacks
    with pytest.raises(SpecError, match="no box"):
        Recipe("pgd", box=0.5)
    model = PixelModel(qg.convert(net(), 2), THREAT).eval()
    x, y = digits[0][:20], digits[1][:20]
    plain, boxed = (CertifiedObjective(model, THREAT, r) for r in (Recipe("ibp"), recipe))
    for objective in (plain, boxed):
        objective.at(1.0)
    assert plain.attacker.eps == 0 and boxed.attacker.eps == pytest.approx(0.6 * EPS)
    moved = craft(model, x, y, boxed.attacker, recipe)
    assert float((moved - x).abs().max()) <= 0.6 * EPS + 1e-6
    # a part of the ball is never worse than the whole, and here it is better
    assert boxed(moved, x, y) < plain(x, x, y)
    assert boxed(x, x, y) < boxed(moved, x, y)
    made = certified(net(), loader, recipe=recipe, epochs=4).model
    test = [(digits[0][:200], digits[1][:200])]
    assert qg.certify(made, test, THREAT, method="ibp", progress=False).certified_accuracy > 0.3


def test_intervals_are_trained_without_tf32(loader: DataLoader[Any],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen = torch.backends.cudnn, set()
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    inner = CertifiedObjective.intervals

    def intervals(self: CertifiedObjective, *args: Any) -> Any:
        seen.add(cudnn.allow_tf32)
        return inner(self, *args)

    monkeypatch.setattr(CertifiedObjective, "intervals", intervals)
    certified(net(), loader, epochs=1)
    assert seen == {False} and cudnn.allow_tf32


def test_float_has_the_same_recipe(loader: DataLoader[Any]) -> None:
    made = certified(net(), loader, bits=32, epochs=1).model
    assert list(staircases(made)) == ["input_staircase.staircase"]
    assert isinstance(made[2], nn.ReLU) and len(made) == 9


def test_it_resumes_to_the_same_bits(loader: DataLoader[Any], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    whole = certified(model, loader, epochs=2).model.state_dict()
    plain, steps = Trainer._step, 0

    def stopping(self: Trainer, *args: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 23:
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(training.Trainer, "_step", stopping)
    with pytest.raises(Interrupted, match="saved in"):
        certified(model, loader, epochs=2, run_dir=tmp_path)
    monkeypatch.undo()
    again = certified(model, loader, epochs=2, run_dir=tmp_path).model.state_dict()
    assert again.keys() == whole.keys() and "input_staircase.low" in whole
    assert all(torch.equal(v, whole[k]) for k, v in again.items())


def test_a_collapse_goes_back_to_the_best_epoch(loader: DataLoader[Any],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = training.certified_probe, 0

    def lost(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*args)._replace(attacked=0.6 if calls < 4 else 0.1 if calls == 4 else 0.7)

    monkeypatch.setattr(training, "certified_probe", lost)
    history = certified(net(), loader, epochs=4).stages[0].history
    assert len(history.events) == 1 and "from 60.0% to 10.0%: starting again from epoch 2" in \
        history.events[0]
    assert [e.epoch for e in history.epochs] == [0, 1, 2, 3, 4] and history.lr == 0.01
    assert history.kept.probe == 0.7


def test_what_has_no_rule_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(50, 3)
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var)
            return self.head(x.flatten(1))

    with pytest.raises(ConversionError, match="batch_norm(.|\n)*no rule"):
        logits_of(Odd(), images(2, 0))
