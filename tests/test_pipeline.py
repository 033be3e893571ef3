"""harden, compare and ablate: what they return, what they leave alone, what they refuse."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard import pipeline, schedule
from quantguard.activation import staircases
from quantguard.attacks import PGD
from quantguard.data import load_data
from quantguard.entrance import is_input
from quantguard.errors import ConversionError, DataError, QuantguardError, SpecError
from quantguard.pipeline import Comparison
from quantguard.progress import Progress
from quantguard.recipes import Recipe
from quantguard.spec import Threat

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Digits = tuple[Tensor, Tensor]
THREAT = Threat(eps=0.1)
FAST = Recipe("pgd", steps=1, lr=1e-3)


@pytest.fixture(scope="module")
def loader(train_digits: TensorDataset) -> DataLoader[Any]:
    """400 images: 80 are held out, five batches are left."""
    return DataLoader(TensorDataset(*(t[:400] for t in train_digits.tensors)), batch_size=64,
                      shuffle=True)


@pytest.fixture(scope="module")
def test_loader(digits: Digits) -> DataLoader[Any]:
    return DataLoader(TensorDataset(digits[0][:60], digits[1][:60]), batch_size=60)


def hardened(model: nn.Module, loader: Any, **options: Any) -> nn.Module:
    options = {"epochs": 1, "recipe": FAST, "progress": False, **options}
    return qg.harden(model, loader, options.pop("threat", THREAT), **options)


def inner(model: nn.Module) -> dict[str, qg.QuantActivation]:
    """Return the staircases of a model but for the one on its input."""
    return {name: m for name, m in staircases(model).items() if not is_input(name)}


def same_state(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- harden ---


class Named(nn.Sequential):
    """A user's class."""


def test_harden_returns_a_copy_of_the_same_class_and_leaves_the_original(
        cnn: nn.Module, loader: DataLoader[Any], untouched: Untouched) -> None:
    model = Named(*copy.deepcopy(cnn)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    batches = list(loader)
    with untouched(model):
        result = hardened(model, batches, val=batches[:1], epochs=2)
    assert isinstance(result, Named) and result is not model
    kept = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in result.named_parameters() if n in kept} == kept
    assert [result.training, result[1].training, result[3].training] == [True, False, True]
    assert torch.equal(result[0].weight, model[0].weight)
    assert not torch.equal(result[3].weight, model[3].weight)
    assert all(p.grad is None for p in result.parameters())
    specs = {(m.spec.bits, m.spec.dynamic) for m in inner(result).values()}
    assert specs == {(2, False)} and len(inner(result)) == 4
    assert staircases(result)["input_staircase.staircase"].spec.bits == 8
    batch = torch.rand(2, 1, 8, 8)
    assert (result.eval()(batch) - model.eval()(batch)).abs().max() > 0


def test_every_learned_number_moves_and_thresholds_stay_ordered(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.warns(UserWarning, match="no probe"):  # without one the last epoch is kept
        result = hardened(cnn, list(loader), recipe=Recipe("pgd", lr=1e-3, threshold_lr=0.05),
                          epochs=2, dynamic=True)
    for module in inner(result).values():
        for parameter in (module.shift, module.log_gaps, module.log_step):
            assert (parameter != 0).all()
        t = module.thresholds
        assert (t[1:] > t[:-1]).all() and t.isfinite().all() and module.step > 0


def test_the_same_seed_gives_the_same_bits_whatever_torchs_random_numbers_are(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    results = []
    for other in (1, 2):
        torch.manual_seed(other)
        results.append(hardened(cnn, loader, seed=5))
    assert same_state(*results)
    assert not same_state(results[0], hardened(cnn, loader, seed=6))


def test_harden_leaves_the_callers_random_numbers(cnn: nn.Module, loader: DataLoader[Any],
                                                  untouched: Untouched) -> None:
    with untouched(cnn):
        hardened(cnn, loader)


def test_a_converted_model_is_trained_as_it_is(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    fixed = qg.convert(cnn, 3)
    result = hardened(fixed, loader)
    assert {(m.spec.bits, m.spec.dynamic) for m in inner(result).values()} == {(3, False)}
    for name, module in staircases(fixed).items():
        assert torch.equal(module.thresholds, staircases(result)[name].thresholds)
    again = inner(hardened(fixed, loader, bits=3, dynamic=False))
    assert {m.spec.bits for m in again.values()} == {3}


def test_a_float_control_is_converted_behind_the_staircase_on_its_input(
        cnn: nn.Module, loader: DataLoader[Any]) -> None:
    control = hardened(cnn, loader, bits=32)
    own = control.quantguard.plan.input  # type: ignore[union-attr]
    for walk in ((), (32,), (32, 8)):
        recipe = Recipe("pgd", steps=1, lr=1e-3, walk=walk)
        result = hardened(control, loader, recipe=recipe, epochs=3, threat=Threat(eps=0.2))
        assert {m.spec.bits for m in inner(result).values()} == {2} and len(inner(result)) == 4
        assert result.quantguard.plan.input == own  # type: ignore[union-attr]


@pytest.mark.parametrize(("bits", "dynamic", "message"), [
    (3, None, "bits=3 contradicts.*bits=2"), (None, False, "dynamic=False contradicts"),
    (32, None, "bits=32 contradicts"), (2, False, "dynamic=False contradicts")])
def test_bits_that_contradict_the_conversion(bits: int | None, dynamic: bool | None, message: str,
                                             quantized: nn.Module,
                                             loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match=message):
        hardened(quantized, loader, bits=bits, dynamic=dynamic)


@pytest.mark.slow
def test_bits_that_do_not_contradict_are_accepted(quantized: nn.Module,
                                                  loader: DataLoader[Any]) -> None:
    assert same_state(hardened(quantized, loader, bits=2, dynamic=True),
                      hardened(quantized, loader))


@pytest.mark.parametrize("bits", [0, 9, 16, -1, 1.5])
def test_impossible_bits(bits: Any, cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match=f"bits={bits}"):
        hardened(cnn, loader, bits=bits)


def test_32_bits_are_the_float_control(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    result = hardened(cnn, loader, bits=32, epochs=2, recipe=Recipe("pgd", lr=1e-3, input_bits=0))
    assert not staircases(result) and [type(m) for m in result] == [type(m) for m in cnn]
    assert list(staircases(hardened(cnn, loader, bits=32))) == ["input_staircase.staircase"]
    assert not staircases(hardened(cnn, loader, bits=32, threat=Threat("l2", 0.5)))  # Linf's alone
    assert not same_state(result, cnn)
    with pytest.raises(SpecError, match="no learnable thresholds"):
        hardened(cnn, loader, bits=32, train="thresholds")
    with pytest.raises(SpecError, match="no learnable thresholds"):
        hardened(cnn, loader, dynamic=False, train="thresholds")


@pytest.mark.parametrize("settings", [{"lr": 1e-3}, {"weight_decay": 0.0}, {"awp": 0.01}])
def test_settings_of_weights_are_refused_where_thresholds_alone_are_trained(
        settings: dict[str, float], cnn: nn.Module, loader: DataLoader[Any]) -> None:
    recipe = Recipe("clean", **settings)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=f"train='thresholds' has no {next(iter(settings))}: .*\n"
                                        ".*threshold_lr"):
        hardened(cnn, loader, dynamic=True, recipe=recipe, train="thresholds")


def test_wrappers_are_taken_off(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    assert same_state(hardened(nn.DataParallel(cnn), loader, bits=32),
                      hardened(cnn, loader, bits=32))


@pytest.mark.parametrize("kind", ["nan", "range", "labels", "channels", "size"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_bad_batch_is_named_also_where_it_first_calibrates(kind: str, place: int, cnn: nn.Module,
                                                             loader: DataLoader[Any]) -> None:
    batches: list[Any] = list(loader)
    val = batches[:1]
    x, y = batches[place]
    batches[place] = {"nan": (torch.where(x > 0.9, torch.nan, x), y), "range": (x * 255, y),
                      "labels": (x, y + 5), "channels": (x.repeat(1, 3, 1, 1), y),
                      "size": (x[..., :5, :5], y)}[kind]
    with pytest.raises(DataError, match=f"batch {place}"):
        hardened(cnn, batches, val=val)


@pytest.mark.parametrize(("loader", "message"), [
    ([], "empty"), (iter([]), "one-shot"), (torch.zeros(2, 1, 8, 8), "not a loader")])
def test_loaders_that_give_nothing(loader: Any, message: str, cnn: nn.Module) -> None:
    with pytest.raises(DataError, match=message):
        hardened(cnn, loader, val=[(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))])


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"recipe": "pdg"}, SpecError, "did you mean 'pgd'"), ({"epochs": 0}, SpecError, "epochs=0"),
    ({"train": "none"}, SpecError, "all or thresholds"),
    ({"device": "nowhere"}, SpecError, "nowhere")])
def test_impossible_settings(options: dict[str, Any], error: type[QuantguardError], message: str,
                             cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(error, match=message):
        hardened(cnn, loader, **options)


def test_a_normalised_loader_is_attacked_in_pixels(cnn: nn.Module,
                                                   loader: DataLoader[Any]) -> None:
    batches = [((x - 0.3) / 0.4, y) for x, y in loader]
    result = hardened(cnn, batches, bits=32, val=batches[:1], epochs=2,
                      threat=Threat(eps=0.1, mean=(0.3,), std=(0.4,)))
    assert not same_state(result, cnn)
    with pytest.raises(DataError, match="batch 0.*outside 0..1(.|\n)*mean= and std="):
        hardened(cnn, batches, bits=32, val=batches[:1])


@pytest.mark.slow
def test_adversarial_training_beats_no_training(cnn: nn.Module, digits: Digits) -> None:
    loader = load_data("digits", "train", batch_size=64)
    result = hardened(cnn, loader, bits=32, recipe="pgd", epochs=5)
    figures = [qg.evaluate(model, [digits], THREAT, suite=[PGD("ce", 20)], images=300,
                           progress=False).robust_accuracy for model in (cnn, result)]
    assert figures[1] > figures[0] + 0.15


# --- compare and ablate ---


SUITE = [PGD("ce", 4), PGD("margin", 6, twin=(2, 16))]


def compared(models: dict[str, nn.Module], loader: Any, **options: Any) -> Comparison:
    return qg.compare(models, loader, THREAT, **{"suite": SUITE, "progress": False, **options})


@pytest.fixture(scope="module")
def comparison(cnn: nn.Module, quantized: nn.Module, test_loader: DataLoader[Any]) -> Comparison:
    return compared({"float": cnn, "2 <bit>": quantized}, test_loader)


def test_compare_evaluates_every_row_on_the_same_images(comparison: Comparison, cnn: nn.Module,
                                                        quantized: nn.Module,
                                                        test_loader: DataLoader[Any]) -> None:
    assert list(comparison.rows) == ["float", "2 <bit>"]
    one, two = comparison.rows.values()
    assert one.image_hash == two.image_hash and one.images == two.images == 60
    one_suite, two_suite = ([a.settings for a in row.attacks if a.settings["class"] != "crossed"]
                            for row in (one, two))
    assert one_suite == two_suite
    alone = qg.evaluate(quantized, test_loader, THREAT, suite=SUITE, progress=False)
    crossed = two.attacks[-1].broke if two.attacks[-1].settings["class"] == "crossed" else \
        np.zeros(60, dtype=bool)
    assert np.array_equal(alone.adversarials[~crossed], two.adversarials[~crossed])
    assert np.array_equal(alone.survived & ~crossed, two.survived)
    assert comparison.models == {"float": cnn, "2 <bit>": quantized}
    only, other, p = comparison.paired("float", "2 <bit>")
    assert only == (one.survived & ~two.survived).sum() and 0 <= p <= 1
    assert other == (two.survived & ~one.survived).sum()


def test_compare_says_when_there_is_no_float_control(quantized: nn.Module, cnn: nn.Module,
                                                     comparison: Comparison,
                                                     test_loader: DataLoader[Any]) -> None:
    assert comparison.notes == ()
    alone = compared({"a": quantized}, test_loader, images=5)
    assert alone.notes == ("no float control among the rows",)
    assert "Note: no float control" in str(alone) and "no float control" in alone._repr_html_()
    assert compared({"a": cnn}, test_loader, images=5).notes == ()
    with pytest.raises(SpecError, match="no models"):
        compared({}, test_loader)
    with pytest.raises(SpecError, match="no time"):
        compared({"a": cnn}, test_loader, budget="soon")


def test_comparison_json_round_trip_and_save(comparison: Comparison, tmp_path: Path) -> None:
    told = json.loads(json.dumps(comparison.to_dict()))
    read = Comparison.from_dict(told)
    assert json.loads(json.dumps(read.to_dict())) == told and str(read) == str(comparison)
    assert read.paired("float", "2 <bit>") == comparison.paired("float", "2 <bit>")
    comparison.save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == told
    comparison.save(str(tmp_path / "c.html"))
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.html", "c.json"]
    for damaged in ({}, {"rows": {}}, {**told, "rows": {"a": {}}}):
        with pytest.raises(DataError, match="JSON"):
            Comparison.from_dict(damaged)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_a_loader_that_shuffles_does_not_make_rows_of_different_images(
        generator: torch.Generator | None, cnn: nn.Module, digits: Digits) -> None:
    loader = DataLoader(TensorDataset(*digits), batch_size=10, shuffle=True, generator=generator)
    hashes: set[str] = set()
    with suppress(DataError):  # to refuse such a loader is right, too
        rows = compared({"a": cnn, "b": cnn}, loader, images=10, suite=[PGD("ce", 1)]).rows
        hashes = {row.image_hash for row in rows.values()}
    assert len(hashes) <= 1


@pytest.mark.slow
def test_compare_resumes_each_row_in_a_place_of_its_own(
        cnn: nn.Module, quantized: nn.Module, comparison: Comparison,
        test_loader: DataLoader[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"float": cnn, "2 <bit>": quantized}
    compared(models, test_loader, run_dir=tmp_path)
    monkeypatch.setattr(schedule, "_attack", None)
    again = compared(models, test_loader, run_dir=tmp_path)
    for name, row in again.rows.items():
        assert np.array_equal(row.survived, comparison.rows[name].survived)


@pytest.fixture(scope="module")
def ablation(cnn: nn.Module, loader: DataLoader[Any], test_loader: DataLoader[Any]) -> Comparison:
    return qg.ablate(cnn, loader, test_loader, THREAT, dynamic=True, recipe=FAST, epochs=1,
                     suite=SUITE, progress=False)


def test_ablate_has_four_rows_and_pairs_the_last_with_the_second(ablation: Comparison,
                                                                 cnn: nn.Module) -> None:
    assert list(ablation.rows) == list(ablation.models) == [
        "float", "float + fine-tune", "2-bit dynamic", "2-bit dynamic + fine-tune"]
    assert [len(staircases(m)) for m in ablation.models.values()] == [0, 1, 4, 5]
    assert ablation.models["float"] is cnn and ablation.notes == ()
    assert "2-bit dynamic + fine-tune against float + fine-tune:" in str(ablation)
    settings = json.loads(json.dumps(ablation.settings))
    assert settings["recipe"]["name"] == "pgd" and settings["epochs"] == 1
    assert settings["bits"] == 2 and settings["dynamic"] is True and settings["seed"] == 0
    assert settings["batch_size"] == 64 and settings["training_images"] == 320
    assert set(settings["training"]) == {"float + fine-tune", "2-bit dynamic + fine-tune"}
    assert Comparison.from_dict(json.loads(json.dumps(ablation.to_dict()))).settings == settings


def test_the_json_of_ablate_is_json_for_every_reader(ablation: Comparison, tmp_path: Path) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    ablation.save(tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)


def test_ablates_fine_tuned_rows_are_what_harden_gives(ablation: Comparison, cnn: nn.Module,
                                                       loader: DataLoader[Any]) -> None:
    control = hardened(cnn, loader, bits=32)
    assert same_state(ablation.models["float + fine-tune"], control)


def test_ablate_goes_on_after_an_interruption(cnn: nn.Module, loader: DataLoader[Any],
                                              test_loader: DataLoader[Any], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Comparison:
        return qg.ablate(cnn, loader, test_loader, THREAT, bits=1, dynamic=False, recipe=FAST,
                         epochs=1, suite=SUITE, images=10, run_dir=tmp_path, progress=False)

    original, left = Progress.advance, [7]

    def advance(self: Progress, *args: Any) -> None:
        original(self, *args)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", advance)
        with pytest.raises(KeyboardInterrupt, match="same command"):
            run()
    result = run()
    assert list(result.rows)[2:] == ["1-bit fixed", "1-bit fixed + fine-tune"]


def test_ablate_of_other_bits_goes_on_in_the_same_run_dir(
        cnn: nn.Module, loader: DataLoader[Any], test_loader: DataLoader[Any],
        tmp_path: Path) -> None:
    for bits in (2, 4):
        qg.ablate(cnn, loader, test_loader, THREAT, bits=bits, recipe=FAST, epochs=1,
                  suite=[PGD("ce", 1)], images=10, run_dir=tmp_path, progress=False)
    assert sorted(p.name for p in (tmp_path / "evaluation").iterdir()) == [
        "0-float", "1-float-fine-tune", "2-2-bit-fixed", "2-4-bit-fixed",
        "3-2-bit-fixed-fine-tune", "3-4-bit-fixed-fine-tune"]


def test_ablate_refuses_a_converted_model(quantized: nn.Module, loader: DataLoader[Any],
                                          test_loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match="this one is converted(.|\n)*restore"):
        qg.ablate(quantized, loader, test_loader, THREAT, progress=False)


def test_ablate_takes_bits_by_site_and_says_so(cnn: nn.Module, loader: DataLoader[Any],
                                               test_loader: DataLoader[Any]) -> None:
    first, *others = [site.name for site in qg.inspect(cnn).sites]
    made = qg.ablate(cnn, loader, test_loader, THREAT, bits={"*": 8, first: 2}, recipe="nfgsm",
                     epochs=1, suite=[PGD("ce", 1)], images=10, progress=False)
    assert list(made.rows)[2:] == ["2-to-8-bit fixed", "2-to-8-bit fixed + fine-tune"]
    assert made.settings["bits"] == {"*": 8, first: 2}
    assert made.settings["sites"] == {first: 2, **dict.fromkeys(others, 8)}
    for model in list(made.models.values())[2:]:
        assert {n: m.spec.bits for n, m in staircases(model).items()} == made.settings["sites"]
    rates = {row["stages"][-1]["lr"] for row in made.settings["training"].values()}
    assert len(rates) == 2 and any(n.startswith("peak learning rates") for n in made.notes)


@pytest.mark.parametrize(("options", "message"), [
    ({"suite": "standrad"}, "did you mean 'standard'"), ({"images": 0}, "images=0"),
    ({"suite": []}, "no attack"), ({"train": "threshold"}, "train='threshold'"),
    ({"train": "thresholds"}, "no learnable thresholds"), ({"epochs": 0}, "epochs=0")])
def test_ablate_refuses_before_it_trains(options: dict[str, Any], message: str, cnn: nn.Module,
                                         loader: DataLoader[Any], test_loader: DataLoader[Any],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "hardened", lambda *_, **__: pytest.fail("it has trained"))
    with pytest.raises(SpecError, match=message):
        qg.ablate(cnn, loader, test_loader, THREAT, progress=False, **options)
    with pytest.raises(SpecError, match="leaves them out"):
        qg.ablate(cnn, loader, test_loader, THREAT, recipe="ibp", train="thresholds", dynamic=True,
                  progress=False)
    with pytest.raises(DataError, match="the test loader is a one-shot"):
        qg.ablate(cnn, loader, iter(test_loader), THREAT, progress=False)


def test_ablate_refuses_what_has_no_certificate_before_it_trains(
        cnn: nn.Module, loader: DataLoader[Any], test_loader: DataLoader[Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)  # type: ignore[no-any-return]
    monkeypatch.setattr(pipeline, "hardened", lambda *_, **__: pytest.fail("it has trained"))
    before = torch.get_rng_state()
    with pytest.raises(ConversionError, match="cannot be traced"):
        qg.ablate(Branching(*cnn), loader, test_loader, THREAT, certify=True, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_attacks_may_come_from_a_generator(cnn: nn.Module, test_loader: DataLoader[Any]) -> None:
    made = qg.compare({"a": cnn, "b": cnn}, test_loader, THREAT, images=10, progress=False,
                      suite=(PGD("ce", steps) for steps in (1, 2)))  # type: ignore[arg-type]
    assert [len(row.attacks) >= 2 for row in made.rows.values()] == [True, True]


def test_comparing_leaves_the_callers_random_numbers(cnn: nn.Module, digits: Digits) -> None:
    before = torch.get_rng_state()
    shuffling = DataLoader(TensorDataset(*digits), batch_size=50, shuffle=True)
    qg.compare({"a": cnn}, shuffling, THREAT, suite=[PGD("ce", 1)], images=10, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_a_float_control_with_a_staircase_on_its_input_is_one(
        ablation: Comparison, test_loader: DataLoader[Any]) -> None:
    models = {name: m for name, m in ablation.models.items() if "fine-tune" in name}
    again = qg.compare(models, test_loader, THREAT, suite=[PGD("ce", 1)], images=10,
                       progress=False)
    assert again.notes == ()


def test_ablate_refuses_what_it_cannot_convert(cnn: nn.Module, loader: DataLoader[Any],
                                               test_loader: DataLoader[Any]) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ConversionError, match="no activations"):
        qg.ablate(linear, loader, test_loader, THREAT, progress=False)
    with pytest.raises(SpecError, match="bits"):
        qg.ablate(cnn, loader, test_loader, THREAT, bits=32, progress=False)


@pytest.mark.parametrize("verb", [qg.evaluate, qg.certify, qg.harden])
def test_a_number_is_no_threat(verb: Any, cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match=r"Write Threat\(eps=0.1\)"):
        verb(cnn, loader, 0.1, progress=False)


@pytest.mark.parametrize("seed", [-1, 1.5, 1 << 32, "0"])
def test_a_seed_that_not_everything_takes_is_refused_before_any_work(
        seed: Any, quantized: nn.Module, cnn: nn.Module, loader: DataLoader[Any]) -> None:
    for verb in (qg.harden, qg.evaluate, qg.sensitivity):
        with pytest.raises(SpecError, match=f"seed={seed!r} must be an integer from 0 to 42949"):
            verb(quantized, loader, seed=seed, progress=False)
    with pytest.raises(SpecError, match="seed="):
        qg.ablate(cnn, loader, None, seed=seed, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["function", "lazy"])
def test_what_is_no_model_yet_is_one_clear_error_and_stays_as_it_was(
        kind: str, loader: DataLoader[Any], tmp_path: Path) -> None:
    last = nn.LazyLinear(10) if kind == "lazy" else nn.Linear(8, 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), last)
    said = {"function": "is a function(.|\n)*in the forward of one",
            "lazy": "3.weight(.|\n)* no shape yet(.|\n)*once on a batch"}[kind]
    asked: Any = (lambda x: x) if kind == "function" else model
    for verb in (qg.evaluate, qg.certify):
        with pytest.raises(ConversionError, match=said):
            verb(asked, loader, THREAT, progress=False)
    with pytest.raises(ConversionError, match=said):
        qg.ablate(asked, loader, None, THREAT, progress=False)  # type: ignore[arg-type]
    if kind == "function":
        for verb in (qg.harden, qg.sensitivity):
            with pytest.raises(ConversionError, match=said):
                verb(asked, loader, THREAT, progress=False)
    if kind == "lazy":
        with pytest.raises(ConversionError, match=said):
            qg.convert(asked)
    with pytest.raises(QuantguardError, match=said.replace("3.weight", "")):
        qg.save(asked, tmp_path / "m.qg")
    assert all(p.requires_grad for p in model.parameters())


def test_an_attacker_without_room_is_no_teacher(cnn: nn.Module, loader: DataLoader[Any]) -> None:
    with pytest.raises(SpecError, match="eps=0 leaves recipe pgd nothing"):
        hardened(cnn, loader, threat=qg.Threat(eps=0))
    hardened(cnn, loader, threat=qg.Threat(eps=0), recipe=Recipe("clean", lr=1e-3))
