"""The recipe `ibp`: its objective, initialisation, schedule, and the models it trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded_nets import norm_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.attacks import PixelModel
from quantguard.certification.training_propagation import worst_case
from quantguard.core.errors import Interrupted, SpecError
from quantguard.core.module_utils import evaluating
from quantguard.nn.quant_activation import quantizers
from quantguard.training import trainer as training
from quantguard.training.certified import (
    CertifiedObjective,
    begin_afresh,
    input_of,
    own_lr,
    schedule,
)
from quantguard.training.hardening import Hardened, hardened
from quantguard.training.inner_attack import attacked_images
from quantguard.training.recipes import Recipe
from quantguard.training.trainer import Trainer

EPS = 0.05

THREAT = qg.Threat(eps=EPS)


def test_radius_and_learning_rate_follow_their_schedules() -> None:
    objective = CertifiedObjective(PixelModel(norm_net(), THREAT), THREAT, Recipe("ibp"))
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


def test_weights_are_initialised_by_their_fan_in() -> None:
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


def test_the_input_quantizer_covers_the_range_without_eps() -> None:
    spec = input_of(qg.Threat(eps=0.1, mean=(0.5, 0.4), std=(0.5, 0.2)), 8)
    assert spec is not None
    torch.testing.assert_close(torch.tensor([spec.low, spec.high]),
                               torch.tensor([[-0.8, -1.5], [0.8, 2.5]]))
    assert input_of(qg.Threat(eps=0.5), 8) is None and input_of(THREAT, 0) is None


@pytest.mark.parametrize("settings", [
    {"steps": 3}, {"mix": 0.5}, {"awp": 0.01}, {"init": "zero"}, {"growth": (0.5, 0.1)},
    {"growth": 3}, {"input_bits": 9}, {"box": 0}, {"box": 1.1}, {"box": 0.5, "steps": 0}])
def test_invalid_settings_are_refused(settings: Any) -> None:
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


def test_training_raises_certified_accuracy(trained: Hardened, digits: Any, cnn: nn.Module) -> None:
    test = [(digits[0], digits[1])]
    before = qg.certify(qg.convert(cnn, 2), test, THREAT, method="ibp", progress=False)
    after = qg.certify(trained.model, test, THREAT, method="ibp", progress=False)
    assert before.certified_accuracy < 0.05 and after.certified_accuracy > 0.5
    history = trained.stages[0].history
    assert (history.kept.validation or 0) > max(e.validation or 0 for e in history.epochs) - 0.05
    # validation equals the certificate, except for its slack
    batches = [(images, labels) for images, labels in DataLoader(
        TensorDataset(*digits), batch_size=100)]
    model = PixelModel(trained.model, THREAT)
    objective = CertifiedObjective(model, THREAT, Recipe("ibp"))
    with evaluating(model), torch.no_grad():
        worst = torch.cat([worst_case(objective.intervals(x, EPS), y).scatter(1, y[:, None], -99)
                           for x, y in batches]).amax(1)
    # where an end lies on a threshold, the certificate's slack moves it to the next level
    lower = torch.from_numpy(after.lower)
    assert (-worst >= lower - 1e-4).all()
    assert (-worst.double() - lower < 1e-3).double().mean() > 0.97


def test_thresholds_are_fixed_unless_dynamic(trained: Hardened,
                                                            loader: DataLoader[Any]) -> None:
    assert not any(m.spec.dynamic for m in quantizers(trained.model).values())
    model = qg.convert(net(), 2, dynamic=True)
    recipe = Recipe("ibp", init="keep", input_bits=0)
    made = certified(model, loader, bits=None, epochs=1, recipe=recipe).model
    for name, module in quantizers(made).items():
        before, t = model.get_submodule(name).thresholds, module.thresholds
        assert not torch.equal(t, before), name
        assert ((t[1:] - t[:-1]) > 0.1 * (before[1:] - before[:-1])).all()  # none merged
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
    moved = attacked_images(model, x, y, boxed.attacker, recipe)
    assert float((moved - x).abs().max()) <= 0.6 * EPS + 1e-6
    # a part of the ball is at most as bad as the whole, and here it is better
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
    assert list(quantizers(made)) == ["input_staircase.staircase"]
    assert isinstance(made[2], nn.ReLU) and len(made) == 9


def test_training_resumes_to_the_same_bits(loader: DataLoader[Any], tmp_path: Path,
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


def test_a_collapse_restarts_from_the_best_epoch(loader: DataLoader[Any],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = training.certified_validation, 0

    def lost(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*args)._replace(attacked=0.6 if calls < 4 else 0.1 if calls == 4 else 0.7)

    monkeypatch.setattr(training, "certified_validation", lost)
    history = certified(net(), loader, epochs=4).stages[0].history
    assert len(history.events) == 1 and "from 60.0% to 10.0%: starting again from epoch 2" in \
        history.events[0]
    assert [e.epoch for e in history.epochs] == [0, 1, 2, 3, 4] and history.lr == 0.01
    assert history.kept.validation == 0.7
