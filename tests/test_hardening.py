"""Hardening in stages: the walk down in bits, the goal, what each site costs."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard import hardening
from quantguard.activation import staircases
from quantguard.attacks import PGD
from quantguard.batching import hold_out
from quantguard.entrance import is_input
from quantguard.errors import DataError, SpecError
from quantguard.hardening import hardened
from quantguard.history import Epoch, History
from quantguard.probing import reestimate
from quantguard.recipes import Recipe, stages
from quantguard.sensitive import costs, one_float
from quantguard.spec import Threat

Digits = tuple[Tensor, Tensor]
THREAT = Threat(eps=0.1)
FAST = Recipe("pgd", steps=2, lr=1e-3)


@pytest.fixture(scope="module")
def loader(train_digits: TensorDataset) -> DataLoader[Any]:
    return DataLoader(train_digits, batch_size=64, shuffle=True)


@pytest.mark.parametrize(("walk", "bits", "epochs", "expected"), [
    ((32,), 2, 1, [(2, 1)]), ((32,), 2, 2, [(32, 1), (2, 1)]), ((32,), 2, 3, [(32, 1), (2, 2)]),
    ((32,), 2, 6, [(32, 3), (2, 3)]), ((32,), 32, 6, [(32, 6)]), ((), 2, 6, [(2, 6)]),
    ((32, 8, 4), 2, 12, [(32, 2), (8, 2), (4, 2), (2, 6)]),
    ((32, 8, 4), 2, 4, [(8, 1), (4, 1), (2, 2)]), ((32, 8, 4), 4, 4, [(32, 1), (8, 1), (4, 2)])])
def test_stages_share_the_epochs_and_the_last_has_half(walk: tuple[int, ...], bits: int,
                                                       epochs: int, expected: Any) -> None:
    assert stages(Recipe("pgd", walk=walk), bits, epochs) == expected


def inner(model: nn.Module) -> dict[str, qg.QuantActivation]:
    """Return the staircases of a model but for the one on its input."""
    return {name: m for name, m in staircases(model).items() if not is_input(name)}


def walked(model: nn.Module, loader: Any, **options: Any) -> hardening.Hardened:
    options = {"bits": 2, "dynamic": True, "recipe": FAST, "epochs": 2, "train": "all", "val": None,
               "run_dir": None, "seed": 0, "device": None, "progress": False, **options}
    return hardened(model, loader, THREAT, **options)


def test_a_quantized_row_starts_from_the_float_stage(cnn: nn.Module, loader: DataLoader[Any],
                                                     tmp_path: Path) -> None:
    before = copy.deepcopy(cnn.state_dict())
    recipe = Recipe("pgd", steps=2, lr=1e-3, walk=(32,))
    made = walked(cnn, loader, run_dir=tmp_path, recipe=recipe)
    assert [(s.name, s.epochs) for s in made.stages] == [("float", 1), ("2 bits", 1)]
    assert {m.spec.bits for m in inner(made.model).values()} == {2}
    assert all(torch.equal(v, before[k]) for k, v in cnn.state_dict().items())
    told = json.loads((tmp_path / "walk.json").read_text())
    assert [row["bits"] for row in told] == [32, 2] and told[0]["history_epochs"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-float", "2-2-bits", "walk.json"]
    # what the float stage learned is where the second starts
    alone = walked(cnn, loader, recipe=Recipe("pgd", steps=2, lr=1e-3, walk=()), epochs=1)
    assert alone.stages[0].history.epochs[0] != made.stages[1].history.epochs[0]
    # and the same call again reads what is there
    again = walked(cnn, loader, run_dir=tmp_path, recipe=recipe)
    assert all(torch.equal(v, again.model.state_dict()[k])
               for k, v in made.model.state_dict().items())


@pytest.mark.slow
def test_a_converted_model_and_thresholds_alone_take_no_walk(
        cnn: nn.Module, quantized: nn.Module, loader: DataLoader[Any]) -> None:
    assert len(walked(quantized, loader, bits=None, dynamic=None).stages) == 1
    recipe = dataclasses.replace(FAST, lr=None)
    assert len(walked(cnn, loader, recipe=recipe, train="thresholds").stages) == 1


def told(clean: float) -> History:
    return History((Epoch(0, None, clean, 0.5, 1e-3, 0.0),), 0, 1e-3, {})


def faked(clean: dict[str, float], monkeypatch: pytest.MonkeyPatch,
          sites: dict[str, tuple[float, float]]) -> list[str]:
    """Let every stage have the clean accuracy that is said, and train nothing."""
    seen: list[str] = []

    def fit(model: nn.Module, *_: Any, **options: Any) -> History:
        bits = sorted({m.spec.bits for m in inner(model).values()})
        seen.append("+".join(map(str, bits)) or "float")
        return told(clean[seen[-1]])
    monkeypatch.setattr(hardening, "fit", fit)
    monkeypatch.setattr(hardening, "costs", lambda *_: sites)
    return seen


NONE = {"2": (0.0, 0.0), "5": (0.0, 0.01), "9": (0.0, 0.0), "12": (0.0, 0.0)}
# of those that give back half of what lacks the one that robustness gains most from
ONE = {**NONE, "2": (0.0, 0.2), "5": (0.03, 0.1), "9": (0.04, 0.05)}


@pytest.mark.parametrize(("clean", "sites", "expected", "bits"), [
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.885, "2": 0.88}, NONE, ["8", "4", "3", "2"], [2]),
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.87}, NONE, ["8", "4", "3"], [4]),
    ({"float": 0.9, "8": 0.87}, NONE, ["8"], []),
    # one site is what hurts: it keeps its bits, and that holds, or not
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.87, "3+4": 0.885}, ONE,
     ["8", "4", "3", "3+4"], [3, 4]),
    ({"float": 0.9, "8": 0.9, "4": 0.89, "3": 0.87, "3+4": 0.875}, ONE,
     ["8", "4", "3", "3+4"], [4])])
def test_the_lowest_bits_that_hold_are_returned(
        clean: dict[str, float], sites: Any, expected: list[str], bits: list[int], cnn: nn.Module,
        loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    seen = faked(clean, monkeypatch, sites)
    made = walked(cnn, loader, bits=None, max_clean_drop=0.02, progress=True)
    # float learns first, and then as long again as every other
    assert seen == ["float", "float", *expected]
    assert sorted({m.spec.bits for m in inner(made.model).values()}) == bits
    said = capsys.readouterr().err
    assert said.count("held-out clean") == len(seen)
    assert [s.holds for s in made.stages] == [clean[name] >= 0.88 - 1e-9 for name in seen]


def test_bits_are_held_against_float_with_as_many_epochs(
        cnn: nn.Module, loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, Tensor]] = []
    clean = iter([0.80, 0.90, 0.89, 0.87])  # the second float has learned on

    def fit(model: nn.Module, *_: Any, **options: Any) -> History:
        starts.append({k: v.clone() for k, v in model.state_dict().items() if "weight" in k})
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return told(next(clean))
    monkeypatch.setattr(hardening, "fit", fit)
    monkeypatch.setattr(hardening, "costs", lambda *_: NONE)
    made = walked(cnn, loader, bits=4, max_clean_drop=0.02)
    assert [s.holds for s in made.stages] == [True, True, True, False]
    assert [s.name for s in made.stages] == ["float", "float control", "8 bits", "4 bits"]
    first = "0.weight"
    assert torch.equal(starts[0][first] + 1, starts[1][first])
    assert all(torch.equal(starts[1][first], other[first]) for other in starts[2:])
    # what draws its weights anew has nothing to learn on from
    clean = iter([0.9, 0.89, 0.885])
    made = walked(cnn, loader, bits=4, max_clean_drop=0.02, recipe=Recipe("ibp"))
    assert [s.name for s in made.stages] == ["float control", "8 bits", "4 bits"]


def test_a_goal_walks_on_real_digits(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    model = qg.harden(cnn, loader, THREAT, bits=4, recipe=Recipe("clean", lr=1e-3), epochs=1,
                      max_clean_drop=0.2, progress=False)
    assert {m.spec.bits for m in staircases(model).values()} == {4}


def test_one_site_more_is_one_site_though_others_are_of_a_kind_called_so(
        monkeypatch: pytest.MonkeyPatch, loader: DataLoader[Any]) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))  # type: ignore[no-any-return]

    model = Functional().eval()
    names = [site.name for site in qg.inspect(model).sites]
    assert names[0] == "relu" and len(names) == 2  # both are of kind relu
    faked({"float": 0.9, "8": 0.9, "4": 0.87, "4+8": 0.89}, monkeypatch,
          {names[0]: (0.03, 0.1), names[1]: (0.0, 0.0)})
    made = walked(model, loader, bits=None, max_clean_drop=0.02)
    assert made.stages[-1].name == f"4 bits, {names[0]} 8"
    assert {n: m.spec.bits for n, m in inner(made.model).items()} == {names[0]: 8, names[1]: 4}


def test_bits_by_site(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    table = {"*": 2, "first": 4}
    made = walked(cnn, loader, bits=table, epochs=1)
    assert [m.spec.bits for m in inner(made.model).values()] == [4, 2, 2, 2]
    # the walk before them is that of the lowest
    made = walked(cnn, loader, bits=table, recipe=Recipe("clean", lr=1e-3, walk=(4, 3)), epochs=4)
    assert [s.bits for s in made.stages] == [4, 3, 2]
    assert [m.spec.bits for m in inner(made.model).values()] == [4, 2, 2, 2]
    assert [s.name for s in made.stages] == ["4 bits", "3 bits", "* 2, first 4"]
    with pytest.raises(SpecError, match="this one is converted"):
        walked(made.model, loader, bits=table)
    one = walked(cnn, loader, bits={"*": 32}, dynamic=None, recipe=Recipe("clean", lr=1e-3))
    assert not staircases(one.model)


@pytest.mark.parametrize("bits", [{"*": 2, "no such site": 4}, {"*": 2, "first": 9},
                                  {"*": "2", "first": 4}])
def test_wrong_bits_by_site_are_found_before_any_work(
        bits: Any, cnn: nn.Module, loader: DataLoader[Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "fit", lambda *_, **__: pytest.fail("it has trained"))
    with pytest.raises(SpecError, match=r"no such site|9|must give each pattern"):
        walked(cnn, loader, bits=bits, recipe=Recipe("pgd", walk=(32,)))


@pytest.mark.parametrize(("options", "message"), [
    ({"max_clean_drop": 2.0}, "from 0 to 1"), ({"max_clean_drop": 0.1, "bits": 32}, "none of them"),
    ({"max_clean_drop": 0.1, "bits": 0}, "none of them"),
    ({"max_clean_drop": 0.1, "bits": 9}, "none of them"),
    ({"max_clean_drop": 0.1, "train": "thresholds"}, "leaves nothing to train"),
    ({"max_clean_drop": 0.1, "recipe": Recipe("pgd", walk=(32,))}, "a walk of its own"),
    ({"max_clean_drop": 0.1, "bits": {"*": 2, "first": 4}}, "the same at every site")])
def test_impossible_goals(options: dict[str, Any], message: str, cnn: nn.Module,
                          loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardening, "fit", lambda *_, **__: pytest.fail("it has trained"))
    with pytest.raises(SpecError, match=message):
        walked(cnn, loader, **options)


def test_a_goal_needs_a_float_model_and_held_out_images(
        cnn: nn.Module, quantized: nn.Module, loader: DataLoader[Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="this one is converted"):
        walked(quantized, loader, max_clean_drop=0.1)
    monkeypatch.setattr(hardening, "fit", lambda *_, **__: pytest.fail("it has trained"))
    images = TensorDataset(torch.cat([x for x, _ in loader]))
    for data, recipe in ((list(loader)[:2], FAST),
                         (DataLoader(images, batch_size=64), Recipe("clean", distill=1.0))):
        with pytest.raises(SpecError, match="needs held-out images with labels"):
            walked(cnn, data, max_clean_drop=0.1, epochs=1, recipe=recipe)


def test_statistics_are_those_of_the_new_activations(cnn: nn.Module,
                                                     loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    model[0].weight.data *= 3.0
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    reestimate(model, loader)
    with torch.no_grad():
        x = torch.cat([images for images, _ in loader])
        inner = model[0](x)
    assert torch.allclose(model[1].running_mean, inner.mean((0, 2, 3)), atol=1e-2)
    assert torch.allclose(model[1].running_var, inner.var((0, 2, 3)), rtol=0.05)
    assert momenta == [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not model.training and not model[1].training


@pytest.mark.parametrize("recipe", ["pgd", "ibp"])
def test_a_last_batch_of_one_image_has_no_statistics(recipe: str,
                                                     train_digits: TensorDataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(),
                          nn.Linear(32, 10)).eval()
    x, y = (t[:65] for t in train_digits.tensors)
    batches = DataLoader(TensorDataset(x, y), batch_size=64)
    walked(model, batches, dynamic=False, recipe=recipe, epochs=1, val=[(x, y)])
    reestimate(model, batches)
    assert torch.allclose(model[2].running_mean, model[1](x[:64].flatten(1)).mean(0), atol=1e-5)


def test_training_starts_from_statistics_of_what_is_trained(cnn: nn.Module,
                                                            loader: DataLoader[Any]) -> None:
    """Behind a staircase on the input those that came with the weights are of other images."""
    def start(bits: int, train: str) -> float | None:
        recipe = dataclasses.replace(FAST, lr=None if train == "thresholds" else FAST.lr)
        return walked(cnn, loader, bits=bits, dynamic=None if bits == 32 else True, epochs=1,
                      recipe=recipe, train=train).stages[0].history.epochs[0].clean
    frozen, renewed, control = start(2, "thresholds"), start(2, "all"), start(32, "all")
    assert frozen and renewed and control
    print(frozen, renewed, control)
    assert renewed > frozen + 0.1 and control > 0.9


def test_the_float_parent_keeps_its_statistics(cnn: nn.Module, loader: DataLoader[Any],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    from quantguard import training
    seen: list[float | None] = []

    class Watched(training.Trainer):
        def _begin(self, told: Any) -> None:
            super()._begin(told)
            seen.append(self.parent_clean)
            teacher = self.gradients.objective.teacher
            assert teacher is not None
            x, y = self.batches(next(iter(self.source.val)), 0)
            seen.append(float((teacher(x).argmax(1) == y).float().mean()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Trainer", Watched)
        walked(cnn, loader, recipe=Recipe("pgd", steps=1, lr=1e-3, distill=0.5), epochs=1)
    assert all(value is not None and value > 0.93 for value in seen) and len(seen) == 2


# --- what each site costs ---


def test_one_site_is_float_whatever_is_switched(quantized: nn.Module, digits: Digits) -> None:
    model, x = copy.deepcopy(quantized), digits[0][:8]
    names = list(staircases(model))
    expected = copy.deepcopy(model)
    expected[int(names[1])] = nn.ReLU()
    with torch.no_grad(), one_float(model, names[1]):
        assert list(staircases(model)) == [names[0], *names[2:]]
        assert torch.equal(model(x), expected(x))
        with qg.soften(model, 3.0), qg.soften(expected, 3.0):
            assert torch.equal(model(x), expected(x))
    with torch.no_grad():
        assert torch.equal(model(x), quantized(x)) and list(staircases(model)) == names


@pytest.mark.slow
def test_the_site_that_is_broken_costs_most(quantized: nn.Module, digits: Digits,
                                            loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(quantized)
    names = list(staircases(model))
    bad = staircases(model)[names[2]]
    bad.set_thresholds(bad.thresholds + 3, bad.step)  # hardly anything passes
    found = qg.sensitivity(model, [(digits[0][:64], digits[1][:64])], Threat(eps=0.05),
                           suite=[qg.attacks.PGD("ce", 3)], progress=False)
    assert list(found.sites) == names
    assert max(names, key=lambda name: found.cost(name)[0]) == names[2]
    assert found.cost(names[2])[0] > 20 and names[2] in str(found).splitlines()[2]
    assert json.loads(json.dumps(found.to_dict()))["sites"].keys() == set(names)
    assert list(staircases(model)) == names
    quick = costs(model, [(digits[0][:64], digits[1][:64])], Threat(eps=0.05), 0)
    assert max(names, key=lambda name: quick[name][0]) == names[2]


def test_a_float_model_has_no_site_to_cost(cnn: nn.Module, digits: Digits) -> None:
    with pytest.raises(SpecError, match="no quantized site"):
        qg.sensitivity(cnn, [(digits[0][:8], digits[1][:8])], progress=False)


def test_a_float64_model_is_hardened_with_images_as_loaders_give_them(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    made = walked(copy.deepcopy(cnn).double(), loader, epochs=1, recipe=Recipe("pgd", steps=1))
    assert {p.dtype for n, p in made.model.named_parameters() if "weight" in n} == {torch.float64}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_hardened_as_it_is(kind: torch.dtype, cnn: nn.Module,
                                                     loader: DataLoader[Any]) -> None:
    made = walked(copy.deepcopy(cnn).to(kind), loader, epochs=1)
    assert {p.dtype for n, p in made.model.named_parameters() if "weight" in n} == {kind}
    x, y = next(iter(loader))
    assert float((made.model(x.to(kind)).argmax(1) == y).float().mean()) > 0.8


def test_ibp_refuses_frozen_weights_which_it_would_draw_and_not_train(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(SpecError, match="draws weights anew, and 1 are frozen"):
        walked(model, loader, recipe="ibp")


@pytest.mark.parametrize("recipe", ["ibp", "clean"])
def test_random_numbers_of_the_caller_stay(recipe: str, cnn: nn.Module,
                                           loader: DataLoader[Any]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    walked(cnn, loader, recipe=recipe, epochs=1)
    assert torch.equal(torch.rand(1), expected)


def test_a_frozen_batchnorm_keeps_its_statistics_in_training(cnn: nn.Module,
                                                             loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    first, *others = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    first.requires_grad_(False)
    made = walked(model, loader, bits=32, dynamic=None, recipe=Recipe("clean", lr=1e-3), epochs=1)
    after, *rest = [m for m in made.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.equal(after.running_mean, first.running_mean)
    assert not any(torch.equal(a.running_mean, b.running_mean)
                   for a, b in zip(rest, others, strict=True))


def test_statistics_of_a_frozen_batchnorm_are_not_estimated_anew(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    model = copy.deepcopy(cnn)
    first, *others = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    first.requires_grad_(False)
    made = walked(model, loader, bits=32, dynamic=None, recipe=FAST, epochs=1)  # input staircase
    after, *rest = [m for m in made.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.equal(after.running_mean, first.running_mean)
    assert torch.equal(after.running_var, first.running_var)
    assert not any(torch.equal(a.running_mean, b.running_mean)
                   for a, b in zip(rest, others, strict=True))


def test_rows_of_other_images_are_no_sensitivity(quantized: nn.Module, digits: Digits) -> None:
    loader = DataLoader(TensorDataset(*digits), batch_size=20, shuffle=True,
                        generator=torch.Generator())
    with pytest.raises(DataError, match="other images"):
        qg.sensitivity(quantized, loader, THREAT, suite=[PGD("ce", 1)], images=20, progress=False)


def test_what_a_site_costs_depends_on_no_random_numbers_of_the_caller(
        quantized: nn.Module, digits: Digits, loader: DataLoader[Any]) -> None:
    val = DataLoader(TensorDataset(*digits), batch_size=50, shuffle=True)

    def found() -> dict[str, tuple[float, float]]:
        some = hold_out(loader, val, None, 0).some
        assert some is not None
        return costs(quantized, some, THREAT, 0)
    before = torch.get_rng_state()
    first = found()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert found() == first


def test_a_stage_of_a_converted_model_has_its_bits(cnn: nn.Module,
                                                   loader: DataLoader[Any]) -> None:
    made = walked(qg.convert(cnn, bits=4), loader, bits=None, dynamic=None, epochs=1,
                  recipe=Recipe("nfgsm", lr=1e-3))
    assert [(stage.name, stage.bits) for stage in made.stages] == [("4 bits", 4)]


def test_calibration_sees_all_classes_of_a_sorted_data_set(cnn: nn.Module,
                                                           train_digits: TensorDataset) -> None:
    x, y = train_digits.tensors
    order = y.argsort()
    data = TensorDataset(x[order], y[order])
    one = walked(cnn, DataLoader(data, batch_size=16), epochs=1, recipe=Recipe("nfgsm", lr=1e-9),
                 dynamic=False)
    other = walked(cnn, DataLoader(data, batch_size=16, shuffle=True), epochs=1,
                   recipe=Recipe("nfgsm", lr=1e-9), dynamic=False)
    mine, shuffled = (inner(made.model) for made in (one, other))
    assert all(torch.equal(mine[n].thresholds, shuffled[n].thresholds) for n in mine)
