"""Errors are correct and name a remedy; numbers of other libraries are accepted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.nn import functional as F

import quantguard as qg
from quantguard.cli.main import main
from quantguard.core.errors import ConversionError, DataError, SpecError
from quantguard.core.model_calls import run
from quantguard.core.runtime import seconds_of
from quantguard.core.specs import InputSpec, check_seed, plain
from quantguard.data.loader import load_data

X = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 4
BATCHES = [(X[:20], Y[:20]), (X[20:], Y[20:])]


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


# --- numbers ---


INTEGERS: list[Callable[[int], Any]] = [np.int64, np.uint8, np.array, torch.tensor]
REALS: list[Callable[[float], Any]] = [
    np.float32, np.float64, np.float16, np.array, torch.tensor,
    lambda v: torch.tensor(v, requires_grad=True), lambda v: Fraction(v)]


@pytest.mark.parametrize("make", INTEGERS)
def test_integers_of_any_library_are_integers(make: Callable[[int], Any]) -> None:
    assert type(plain(make(3))) is int
    assert qg.QuantSpec(bits=make(3)) == qg.QuantSpec(bits=3)
    assert InputSpec(make(3), [0], [1]) == InputSpec(3, [0], [1])
    recipe = qg.Recipe("pgd", steps=make(2), batch_size=make(8), bit_schedule=[make(4)])  # type: ignore[arg-type]
    assert recipe == qg.Recipe("pgd", steps=2, batch_size=8, bit_schedule=(4,))
    check_seed(make(3))
    images, _ = next(iter(load_data("digits", "test", batch_size=make(5), size=make(6))))
    assert images.shape == (5, 1, 6, 6)
    model = qg.convert(linear(), {"relu": make(3)}, input_bits=make(4), input_range=(0, make(1)))
    assert model.quantguard.plan.converted[0].spec.bits == 3  # type: ignore[union-attr]
    hardened = qg.harden(linear(), BATCHES, qg.Threat(eps=.1), bits=make(3), epochs=make(1),
                         seed=make(3), val=BATCHES, progress=False)
    same = qg.harden(linear(), BATCHES, qg.Threat(eps=.1), bits=3, epochs=1, seed=3, val=BATCHES,
                     progress=False)
    assert all(map(torch.equal, hardened.state_dict().values(), same.state_dict().values()))
    suite = [qg.attacks.PGD(steps=2)]
    result = qg.evaluate(same, BATCHES, qg.Threat(eps=.1), suite=suite, images=make(12),
                         seed=make(3), budget=make(60), progress=False)
    assert type(result.images) is int and type(result.seed) is int
    proof = qg.certify(same, BATCHES, qg.Threat(eps=.1), images=make(5), splits=make(0),
                       progress=False)
    assert proof.to_dict()["images"] == 5


@pytest.mark.parametrize("make", REALS)
def test_real_numbers_of_any_library_are_numbers(make: Callable[[float], Any]) -> None:
    assert type(plain(make(.25))) is float
    threat = qg.Threat(eps=make(.25), bounds=(make(0.), make(1.)), mean=make(.5), std=[make(.5)])
    assert threat == qg.Threat(eps=.25, mean=(.5,), std=(.5,)) and type(threat.eps) is float
    assert qg.QuantSpec(range_factor=make(.5)) == qg.QuantSpec(range_factor=.5)
    assert qg.Recipe("pgd", lr=make(.5), noise=make(.25)) == qg.Recipe("pgd", lr=.5, noise=.25)
    assert seconds_of(make(2.)) == 2
    with qg.soften(qg.convert(linear()), make(2.)):
        pass
    images, _ = next(iter(load_data("digits", "test", mean=make(.5))))
    assert float(images.min()) == -.5


def test_arrays_of_means_are_accepted() -> None:
    for make in (np.array, torch.tensor, tuple):
        assert qg.Threat(mean=make([.5, .25, .5])).mean == (.5, .25, .5)


@pytest.mark.parametrize("value", [np.array([.1, .2]), torch.rand(2), "0.1", None, np.nan, 1j,
                                   np.complex64(1), torch.empty((), device="meta"), True + 0j])
def test_values_that_are_no_numbers_are_refused(value: Any) -> None:
    if value is not None:  # None is the default: 8/255 of the range
        with pytest.raises(SpecError):
            qg.Threat(eps=value)
    with pytest.raises(SpecError):
        qg.QuantSpec(bits=value)
    with pytest.raises(SpecError):
        seconds_of("x" if isinstance(value, str) else value)


# --- what models return, and accept ---


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = linear(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


WRAPS: list[Callable[[Tensor], Any]] = [
    lambda z: {"pred": z}, lambda z: {"pred": z, "loss": None}, lambda z: (None, z), lambda z: [z]]


@pytest.mark.parametrize("wrap", WRAPS)
def test_the_only_tensor_that_a_model_returns_is_its_logits(wrap: Callable[[Tensor], Any]) -> None:
    threat, suite = qg.Threat(eps=.02), [qg.attacks.PGD(steps=2)]
    results = [qg.evaluate(model, BATCHES, threat, suite=suite, progress=False, certify=True)
               for model in (Returns(wrap), Returns(lambda z: z))]
    assert results[0].robust_accuracy == results[1].robust_accuracy
    proofs = [r.certificate.certified_accuracy for r in results if r.certificate is not None]
    assert len(proofs) == 2 and proofs[0] == proofs[1]
    qg.harden(Returns(wrap), BATCHES, threat, epochs=1, val=BATCHES, progress=False)


@pytest.mark.parametrize("verb", [qg.evaluate, qg.harden, qg.certify])
def test_several_tensors_without_logits_are_named(verb: Callable[..., Any]) -> None:
    model = Returns(lambda z: {"out": z, "features": z[:, :2]})
    with pytest.raises(ConversionError, match=r"a dict of 'out': \(\d+, 4\), 'features': \(\d+, 2\)"
                       if verb is not qg.certify else "logits"):
        verb(model, BATCHES, qg.Threat(eps=.1), progress=False)


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
    lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4)),
    lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.InstanceNorm2d(4), nn.Flatten(),
                          nn.Linear(4, 4))])
def test_batches_of_one_image_are_reported_as_too_small(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(DataError, match="larger batches") as caught:
        run(make().train(), X[:1], "batch 3")
    assert "--size" not in str(caught.value)


def test_a_forward_of_several_inputs_is_reported() -> None:
    with pytest.raises(DataError, match="another number of inputs"):
        run(nn.Bilinear(4, 4, 2), torch.rand(2, 4))


class Counts(nn.Module):
    """A net that must be run to be inspected, and whose input cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head, self.calls = nn.Parameter(torch.rand(32, 64)), nn.Linear(32, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        out: Tensor = self.head(F.relu(F.linear(x.flatten(1), self.weight)))
        return out


@pytest.mark.parametrize("verb", [qg.convert, qg.inspect])
def test_a_missing_example_input_is_the_reported_problem(verb: Callable[..., Any]) -> None:
    with pytest.raises(ConversionError, match=r"(?s)no input was found.*sets self\.calls.*exampl"
                       ) as caught:
        verb(Counts())
    assert "no activations" not in str(caught.value)
    with pytest.raises(DataError, match=r"does not accept inputs of shape \(2, 5\)"):
        verb(Counts(), example=torch.rand(2, 5))
    assert verb(Counts(), example=X)


def test_activations_that_no_input_reached_cause_a_warning() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.rest = nn.BatchNorm2d(1), nn.ReLU(), Counts()

        def forward(self, x: Tensor) -> Any:
            return self.rest(self.act(self.norm(x)), 1 / x.sum())

    with pytest.warns(UserWarning, match=r"activations in rest .*stay float.*example="):
        converted = qg.convert(Both())
    assert "no input was found" in str(converted.quantguard)


# --- names ---


@pytest.mark.parametrize(("suite", "similar"), [
    ("fast", "quick"), ("qick", "quick"), ("small", "quick"), ("standart", "standard"),
    ("all", "full"), ("complete", "full"), ("autoattack", None), ("xyz", None)])
def test_an_unknown_suite_suggests_a_similar_one_or_none(suite: str, similar: str | None) -> None:
    with pytest.raises(SpecError, match="Use one of quick, standard") as caught:
        qg.evaluate(linear(), BATCHES, suite=suite)
    assert ("did you mean" in str(caught.value)) is (similar is not None)
    assert similar is None or f"did you mean {similar!r}?" in str(caught.value)


@pytest.mark.parametrize("recipe", ["fast", "madry", "natural", "crown"])
def test_an_unknown_recipe_suggests_no_different_one(recipe: str) -> None:
    with pytest.raises(SpecError) as caught:
        qg.Recipe(recipe)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("spec", ["mnist", "fashion-mnist", "cifar10"])
def test_data_that_cannot_be_downloaded_needs_a_folder(
        spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    from quantguard.data import datasets as sources

    def fail(self: Any, root: Any, train: bool, download: bool = False) -> None:
        raise RuntimeError("no network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path)
    for name in ("MNIST", "FashionMNIST", "CIFAR10"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "__init__", fail)
    with pytest.raises(DataError, match=rf"Name the folder that has it: {spec}:ROOT\."):
        load_data(spec, "test")


def test_digits_without_scikit_learn_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load_data("digits", "test")


def test_a_path_is_no_kind_of_data() -> None:
    for path in ("/no/such/folder", "C:\\images", "none.npz"):
        with pytest.raises(SpecError, match="does not exist"):
            load_data(path, "test")


# --- the command line ---


def quantguard(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model's module and two sets of its weights."""
    (tmp_path / "qg_cli_net.py").write_text(
        "from torch import nn\ndef Net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), "
        "nn.ReLU(), nn.Linear(16, 4))\n")
    state = {f"module.{k}": v for k, v in linear().state_dict().items()}
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "c.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "qg_cli_net", raising=False)
    return tmp_path


@pytest.mark.parametrize("model", ["C:\\models\\m.pt", "C:/models/m.pt", "runs 12:30/m.pt",
                                   "none.pt", "none.pt?weights=ema", "s3://bucket/m.pt"])
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_missing_file_is_reported_as_such(folder: Path, model: str, command: str
                                                       ) -> None:
    result = quantguard(command, model)
    assert result.exit_code == 1 and "does not exist" in result.stderr
    assert "imported" not in result.stderr and isinstance(result.exception, SystemExit)


def test_the_bare_name_of_a_model_suggests_an_architecture(folder: Path) -> None:
    assert "Did you mean torchvision:resnet18?" in quantguard("inspect", "resnet18").stderr
    result = quantguard("inspect", "c.pt", "--arch", "resnet18")
    assert "Did you mean torchvision:resnet18?" in result.stderr


def test_the_command_line_reports_the_used_weights(folder: Path) -> None:
    result = quantguard("convert", "c.pt", "--arch", "qg_cli_net.py:Net")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == (
        "note: c.pt: weights from 'state_dict_ema', averaged over training; 'module.' removed from "
        "their names; others: state_dict (c.pt?weights=raw)")
    assert Path("c.qg").exists()
    result = quantguard("inspect", "c.pt?weights=raw", "--arch", "qg_cli_net:Net")
    assert "weights from 'state_dict';" in result.stderr


def test_the_input_file_is_not_overwritten(folder: Path) -> None:
    result = quantguard("inspect", "c.pt?weights=raw", "--arch", "qg_cli_net:Net", "--json", "c.pt")
    assert result.exit_code == 1 and "would be written over" in result.stderr


def test_outputs_are_named_after_models_without_their_settings(folder: Path) -> None:
    for model, name in (("qg_cli_net.py:Net", "Net.qg"),
                        ("torchvision:squeezenet1_1?num_classes=4", "squeezenet1_1.qg")):
        assert quantguard("convert", model, "--input-shape", "3,64,64" if "?" in model else
                          "1,8,8", "--quiet").exit_code == 0
        assert Path(name).exists()


def test_torch_does_not_warn_of_a_missing_cuda_toolkit(tmp_path: Path) -> None:
    code = ("import sys, torch\nimport quantguard.nn.functional.compiled_kernels as f\n"
            "f._import_compiler()\n"
            "assert 'torch.utils.cpp_extension' in sys.modules\n"
            "import logging; assert not logging.getLogger('torch.utils.cpp_extension').disabled")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={
        **os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0 and "CUDA" not in result.stderr, result.stderr
