"""ablate: four rows, resuming, and refusals before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tuning import FAST, THREAT
from hardened_models import SUITE, hardened, same_state
from torch import Tensor, nn
from torch.utils.data import DataLoader

import quantguard as qg
from quantguard.attacks import PGD
from quantguard.core.errors import ConversionError, DataError, SpecError
from quantguard.core.progress import Progress
from quantguard.evaluation.comparison import Comparison
from quantguard.nn.quant_activation import quantizers
from quantguard.training import ablation as ablation_module


@pytest.fixture(scope="module")
def ablation(cnn: nn.Module, loader: DataLoader[Any], test_loader: DataLoader[Any]) -> Comparison:
    return qg.ablate(cnn, loader, test_loader, THREAT, dynamic=True, recipe=FAST, epochs=1,
                     suite=SUITE, progress=False)


def test_ablate_has_four_rows_and_pairs_the_last_with_the_second(ablation: Comparison,
                                                                 cnn: nn.Module) -> None:
    assert list(ablation.rows) == list(ablation.models) == [
        "float", "float + fine-tune", "2-bit dynamic", "2-bit dynamic + fine-tune"]
    assert [len(quantizers(m)) for m in ablation.models.values()] == [0, 1, 4, 5]
    assert ablation.models["float"] is cnn and ablation.notes == ()
    assert "2-bit dynamic + fine-tune against float + fine-tune:" in str(ablation)
    settings = json.loads(json.dumps(ablation.settings))
    assert settings["recipe"]["name"] == "pgd" and settings["epochs"] == 1
    assert settings["bits"] == 2 and settings["dynamic"] is True and settings["seed"] == 0
    assert settings["batch_size"] == 64 and settings["training_images"] == 320
    assert set(settings["training"]) == {"float + fine-tune", "2-bit dynamic + fine-tune"}
    assert Comparison.from_dict(json.loads(json.dumps(ablation.to_dict()))).settings == settings


def test_the_json_of_ablate_is_strict_json(ablation: Comparison, tmp_path: Path) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    ablation.save(tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)


def test_the_fine_tuned_rows_of_ablate_equal_hardens_result(ablation: Comparison, cnn: nn.Module,
                                                       loader: DataLoader[Any]) -> None:
    control = hardened(cnn, loader, bits=32)
    assert same_state(ablation.models["float + fine-tune"], control)


def test_ablate_resumes_after_an_interruption(cnn: nn.Module, loader: DataLoader[Any],
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


def test_ablate_of_other_bits_resumes_in_the_same_run_dir(
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


def test_ablate_takes_bits_by_site(cnn: nn.Module, loader: DataLoader[Any],
                                               test_loader: DataLoader[Any]) -> None:
    first, *others = [site.name for site in qg.inspect(cnn).sites]
    made = qg.ablate(cnn, loader, test_loader, THREAT, bits={"*": 8, first: 2}, recipe="nfgsm",
                     epochs=1, suite=[PGD("ce", 1)], images=10, progress=False)
    assert list(made.rows)[2:] == ["2-to-8-bit fixed", "2-to-8-bit fixed + fine-tune"]
    assert made.settings["bits"] == {"*": 8, first: 2}
    assert made.settings["sites"] == {first: 2, **dict.fromkeys(others, 8)}
    for model in list(made.models.values())[2:]:
        assert {n: m.spec.bits for n, m in quantizers(model).items()} == made.settings["sites"]
    rates = {row["stages"][-1]["lr"] for row in made.settings["training"].values()}
    assert len(rates) == 2 and any(n.startswith("peak learning rates") for n in made.notes)


@pytest.mark.parametrize(("options", "message"), [
    ({"suite": "standrad"}, "did you mean 'standard'"), ({"images": 0}, "images=0"),
    ({"suite": []}, "no attack"), ({"train": "threshold"}, "train='threshold'"),
    ({"train": "thresholds"}, "no learnable thresholds"), ({"epochs": 0}, "epochs=0")])
def test_ablate_refuses_before_it_trains(options: dict[str, Any], message: str, cnn: nn.Module,
                                         loader: DataLoader[Any], test_loader: DataLoader[Any],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_module, "hardened", lambda *_, **__: pytest.fail("it has trained"))
    with pytest.raises(SpecError, match=message):
        qg.ablate(cnn, loader, test_loader, THREAT, progress=False, **options)
    with pytest.raises(SpecError, match="leaves them out"):
        qg.ablate(cnn, loader, test_loader, THREAT, recipe="ibp", train="thresholds", dynamic=True,
                  progress=False)
    with pytest.raises(DataError, match="the test loader is a one-shot"):
        qg.ablate(cnn, loader, iter(test_loader), THREAT, progress=False)


def test_ablate_refuses_a_model_without_certificate_before_it_trains(
        cnn: nn.Module, loader: DataLoader[Any], test_loader: DataLoader[Any],
        monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)  # type: ignore[no-any-return]
    monkeypatch.setattr(ablation_module, "hardened", lambda *_, **__: pytest.fail("it has trained"))
    before = torch.get_rng_state()
    with pytest.raises(ConversionError, match="cannot be traced"):
        qg.ablate(Branching(*cnn), loader, test_loader, THREAT, certify=True, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_a_float_control_may_have_an_input_quantizer(
        ablation: Comparison, test_loader: DataLoader[Any]) -> None:
    models = {name: m for name, m in ablation.models.items() if "fine-tune" in name}
    again = qg.compare(models, test_loader, THREAT, suite=[PGD("ce", 1)], images=10,
                       progress=False)
    assert again.notes == ()


def test_ablate_refuses_a_model_that_cannot_be_converted(cnn: nn.Module, loader: DataLoader[Any],
                                               test_loader: DataLoader[Any]) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ConversionError, match="no activations"):
        qg.ablate(linear, loader, test_loader, THREAT, progress=False)
    with pytest.raises(SpecError, match="bits"):
        qg.ablate(cnn, loader, test_loader, THREAT, bits=32, progress=False)
