"""The fine-tuning loop: batches, the held-out slice, resuming to the bit, what wrong input says."""

from __future__ import annotations

import copy
import itertools
import json
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from quantguard import gradients, training
from quantguard.activation import QuantActivation, staircases
from quantguard.attacks import PixelModel
from quantguard.batching import hold_out
from quantguard.contexts import listening
from quantguard.conversion import convert
from quantguard.crafting import Objective
from quantguard.errors import DataError, Interrupted, SpecError
from quantguard.history import History
from quantguard.probing import Probed
from quantguard.progress import Progress
from quantguard.recipes import Recipe
from quantguard.spec import Threat
from quantguard.training import fit

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Digits = tuple[Tensor, Tensor]
THREAT = Threat(eps=0.1)
FAST = Recipe("pgd", steps=1, lr=1e-3)


# --- resuming ---


def loader_of(data: Dataset[Any], batch: int = 64) -> DataLoader[Any]:
    return DataLoader(data, batch_size=batch, shuffle=True)


@pytest.fixture(scope="module")
def small(train_digits: TensorDataset) -> TensorDataset:
    """400 images: 80 are held out, five batches are left."""
    return TensorDataset(*(t[:400] for t in train_digits.tensors))


def trained(model: nn.Module, loader: Any, **options: Any) -> tuple[nn.Module, History]:
    twin = copy.deepcopy(model)
    options = {"epochs": 2, "progress": False, **options}
    return twin, fit(twin, loader, THREAT, options.pop("recipe", FAST), **options)


def assert_same_run(one: tuple[nn.Module, History], two: tuple[nn.Module, History]) -> None:
    states = one[0].state_dict(), two[0].state_dict()
    different = [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
    assert not different
    rows = [[(e.epoch, repr(e.loss), e.clean, e.probe, e.lr) for e in h.epochs]
            for h in (one[1], two[1])]
    assert rows[0] == rows[1] and one[1].chosen == two[1].chosen


def press() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def press_twice() -> None:
    press()
    press()


def fail() -> None:
    raise OSError("died")


def at_call(calls: int, action: Callable[[], None],
            original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is like the original, but for what happens in one call."""
    count = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if next(count) == calls:
            action()
        return result
    return call


class Noisy(TensorDataset):
    """Augments with torch's random numbers."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        items = [self[i] for i in indices]
        return [((x + 0.02 * torch.rand(())).clamp(0, 1), y) for x, y in items]


@pytest.fixture(scope="module")
def noisy(small: TensorDataset) -> DataLoader[Any]:
    return loader_of(Noisy(*small.tensors))


@pytest.fixture(scope="module")
def undisturbed(quantized: nn.Module, noisy: DataLoader[Any]) -> tuple[nn.Module, History]:
    return trained(quantized, noisy)


@pytest.mark.parametrize(("owner", "name", "calls", "action"), [
    (Noisy, "__getitems__", 9, press),  # eight calls are looks at what the data are
    (gradients, "craft", 8, press), (Progress, "advance", 5, press),
    (training, "probe", 2, press), (training, "probe", 3, press),
    (Noisy, "__getitems__", 8, press_twice), (gradients, "craft", 3, press_twice),
    (Progress, "advance", 2, press_twice), (training, "probe", 2, press_twice)],
    ids=lambda v: getattr(v, "__name__", str(v)))
def test_an_interrupted_run_goes_on_to_the_same_bits(
        owner: Any, name: str, calls: int, action: Callable[[], None], quantized: nn.Module,
        noisy: DataLoader[Any], undisturbed: tuple[nn.Module, History], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(calls, action, getattr(owner, name)))
        with pytest.raises(Interrupted, match="saved in(.|\n)*same command again"):
            trained(quantized, noisy, run_dir=tmp_path)
    torch.rand(3)  # another process has other random numbers
    assert_same_run(trained(quantized, noisy, run_dir=tmp_path), undisturbed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_died_goes_on_from_its_last_epoch_to_the_same_bits(
        quantized: nn.Module, noisy: DataLoader[Any], undisturbed: tuple[nn.Module, History],
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "craft", at_call(7, fail, gradients.craft))
        with pytest.raises(OSError, match="died"):
            trained(quantized, noisy, run_dir=tmp_path)
    assert_same_run(trained(quantized, noisy, run_dir=tmp_path), undisturbed)


@pytest.mark.parametrize("calls", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_a_run_over_a_list_of_batches_goes_on_to_the_same_bits(
        calls: int, quantized: nn.Module, small: TensorDataset, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list(DataLoader(small, batch_size=64))
    val = batches[:1]
    whole = trained(quantized, batches, val=val)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", at_call(calls, press, Progress.advance))
        with pytest.raises(Interrupted, match="same command again"):
            trained(quantized, batches, val=val, run_dir=tmp_path)
    assert_same_run(trained(quantized, batches, val=val, run_dir=tmp_path), whole)


def test_a_finished_run_is_read_and_not_run_again(quantized: nn.Module, small: TensorDataset,
                                                  tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(quantized, loader_of(small), run_dir=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "run.json",
                                                          "training.pt"]
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["finished"] and told["settings"]["epochs"] == 2
    assert told["chosen"] == whole[1].chosen and told["levels"] == whole[1].levels
    assert told["recipe"] == told["settings"]["recipe"] and told["environment"]["torch"]
    monkeypatch.setattr(Objective, "__call__", None)
    assert_same_run(trained(quantized, loader_of(small), run_dir=tmp_path), whole)


def test_without_a_run_dir_ctrl_c_says_what_would_have_kept_it(quantized: nn.Module,
                                                               small: TensorDataset,
                                                               monkeypatch: pytest.MonkeyPatch,
                                                               ) -> None:
    monkeypatch.setattr(Progress, "advance", at_call(2, press, Progress.advance))
    with pytest.raises(Interrupted, match="nothing was kept(.|\n)*--run-dir") as caught:
        trained(quantized, loader_of(small))
    assert isinstance(caught.value, KeyboardInterrupt)


@pytest.mark.parametrize(("change", "said"), [
    ("eps", "threat"), ("recipe", "recipe"), ("epochs", r"epochs \(2, now 1\)"), ("seed", "seed"),
    ("train", "train"), ("batches", "data"), ("weights", "weights at the start"),
    ("model", "activations"),
    ("bits", r'activations \(\["2: 2 bits, dynamic"\], now \["2: 3 bits, dynamic"\]\)')])
def test_a_run_dir_of_other_settings_is_refused(change: str, said: str, cnn: nn.Module,
                                                quantized: nn.Module, small: TensorDataset,
                                                tmp_path: Path) -> None:
    model, threat, recipe, data = copy.deepcopy(quantized), THREAT, FAST, small
    options: dict[str, Any] = {"epochs": 1 + (change == "epochs"), "seed": 0, "train": "all",
                               "progress": False}
    fit(model, loader_of(data), threat, recipe, run_dir=tmp_path, **options)
    model = copy.deepcopy(cnn if change == "model" else quantized)
    if change == "bits":
        model = convert(cnn, {"*": 2, "first": 3}, dynamic=True)
    if change == "weights":
        with torch.no_grad():
            model[0].weight.add_(0.1)
    threat = Threat(eps=0.2) if change == "eps" else threat
    recipe = Recipe("pgd", steps=2, lr=1e-3) if change == "recipe" else recipe
    options |= {"epochs": {"epochs": 1}, "seed": {"seed": 1}, "train": {"train": "thresholds"}}.get(
        change, {})
    data = TensorDataset(*(t[:200] for t in small.tensors)) if change == "batches" else data
    with pytest.raises(SpecError, match=f"other settings(.|\n)*{said}(.|\n)*another run directory"):
        fit(model, loader_of(data), threat, recipe, run_dir=tmp_path, **options)


# --- what is trained ---


def test_thresholds_only_changes_staircases_and_nothing_else(
        quantized: nn.Module, small: TensorDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "probe", lambda *_: Probed(None, None, 0))  # keeps the last
    model, _ = trained(quantized, loader_of(small), recipe=Recipe("pgd", steps=1),
                       train="thresholds")
    own = {f"{name}.{p}" for name, m in staircases(model).items() for p, _ in m.named_parameters()}
    before, after = quantized.state_dict(), model.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == own


def test_thresholds_only_needs_learned_thresholds(cnn: nn.Module, quantized: nn.Module,
                                                  small: TensorDataset) -> None:
    for model in (cnn, nn.Sequential(*(m for m in quantized if not staircases(m)))):
        with pytest.raises(SpecError, match="no learnable thresholds(.|\n)*dynamic=True"):
            trained(model, loader_of(small), train="thresholds")


def test_frozen_thresholds_stay(cnn: nn.Module, small: TensorDataset) -> None:
    model = convert(cnn, bits=2, dynamic=True)
    for module in staircases(model).values():
        module.requires_grad_(False)
    with pytest.raises(SpecError, match="no learnable thresholds(.|\n)*They are frozen"):
        trained(model, loader_of(small), train="thresholds", recipe=Recipe("pgd", steps=1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(SpecError, match="every parameter is frozen"):
        trained(model, loader_of(small))
    model[0].requires_grad_(True)
    after, _ = trained(model, loader_of(small), epochs=1)
    assert not torch.equal(after[0].weight, model[0].weight)
    for name, module in staircases(after).items():
        assert torch.equal(module.thresholds, staircases(model)[name].thresholds)


@pytest.mark.parametrize("recipe", [FAST, Recipe("pgd")], ids=["lr", "no lr"])
def test_nothing_to_train_is_an_error(recipe: Recipe, cnn: nn.Module,
                                      small: TensorDataset) -> None:
    model = copy.deepcopy(cnn).requires_grad_(False)
    with pytest.raises(SpecError, match="every parameter is frozen"):
        trained(model, loader_of(small), recipe=recipe)


@pytest.mark.parametrize("recipe", [FAST, Recipe("pgd"), Recipe("nfgsm"), Recipe("clean"),
                                    Recipe("trades", awp=0.01),
                                    Recipe("pgd", mix=0.5, distill=0.5)],
                         ids=lambda r: f"{r.name} lr={r.lr}")
def test_every_recipe_trains_logs_and_leaves_modes_and_random_numbers(
        recipe: Recipe, quantized: nn.Module, small: TensorDataset) -> None:
    model = copy.deepcopy(quantized)
    model[1].train()
    model[0].weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    history = fit(model, loader_of(small), THREAT, recipe, epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[0].weight, quantized[0].weight)
    assert [e.epoch for e in history.epochs] == [0, 1] and history.chosen in (0, 1)
    told = history.to_dict()
    assert json.loads(json.dumps(told)).keys() == told.keys() == {
        "epochs", "chosen", "lr", "levels", "events", "precision"}


@pytest.mark.parametrize(("scores", "images", "chosen"), [
    ([0.3, 0.5, 0.4, 0.5, 0.1], 512, 3),  # of equals the later one
    ([0.3, 0.5, 0.48, 0.49, 0.1], 512, 3),  # within a standard error, 2.2 %: the later one
    ([0.3, 0.5, 0.48, 0.47, 0.46], 512, 2),  # of the best, not of the one before
    ([0.3, 0.5, 0.48, 0.47, 0.46], 100, 4),  # fewer images tell less apart
    ([0.3, 0.5, 0.48, 0.49, 0.4], 100_000, 1)])
def test_the_latest_epoch_that_is_not_worse_than_the_best_is_returned(
        scores: list[float], images: int, chosen: int, quantized: nn.Module, small: TensorDataset,
        monkeypatch: pytest.MonkeyPatch) -> None:
    left, states = iter(scores), []

    def probe(model: PixelModel, *_: Any) -> Probed:
        states.append(copy.deepcopy(model.model.state_dict()))
        return Probed(0.9, next(left), images)

    monkeypatch.setattr(training, "probe", probe)
    recipe = Recipe("pgd", steps=2, lr=1e-3)
    model, history = trained(quantized, loader_of(small), epochs=4, recipe=recipe)
    assert history.chosen == chosen
    assert all(torch.equal(v, states[chosen][k]) for k, v in model.state_dict().items())


def test_a_learning_rate_that_wrecks_the_model_is_lowered_and_said(
        cnn: nn.Module, small: TensorDataset, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(training, "auto_lr", lambda *_: 0.5)
    _, history = trained(cnn, loader_of(small), epochs=1, recipe=Recipe("clean"), progress=True)
    assert history.lr in [pytest.approx(0.5 / 5**n) for n in (1, 2, 3)]
    said = capsys.readouterr().err
    assert "starting again from epoch 0 with lr times 0.2" in said
    assert history.events and all(event in said for event in history.events)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5])
def test_any_number_of_steps_is_trained(batches: int, epochs: int) -> None:
    model = nn.Linear(3, 2).eval()
    before = model.weight.detach().clone()
    loader = [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))] * batches
    history = fit(model, loader, THREAT, FAST, epochs=epochs, val=loader[:1], progress=False)
    assert len(history.epochs) == epochs + 1
    assert not torch.equal(model.weight, before) or history.chosen == 0
    assert model.weight.isfinite().all()


# --- loaders ---


def test_a_list_of_batches_warns_once_and_trains(quantized: nn.Module,
                                                 small: TensorDataset) -> None:
    batches = list(DataLoader(small, batch_size=64))
    with pytest.warns(UserWarning, match="nothing can be held out(.|\n)*val=") as record:
        model, history = trained(quantized, batches)
    assert len(record) == 1
    assert history.chosen == 2 and history.epochs[-1].clean is None
    assert not torch.equal(model[0].weight, quantized[0].weight)


def test_dicts_and_streams_train_as_well(quantized: nn.Module, small: TensorDataset) -> None:
    dicts = [{"input": x, "labels": y} for x, y in small]
    one = trained(quantized, loader_of(dicts), epochs=1)  # type: ignore[arg-type]
    assert_same_run(one, trained(quantized, loader_of(small), epochs=1))

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(small)

    loader = DataLoader(Stream(), batch_size=64)
    val = list(DataLoader(small, batch_size=64))[:1]
    _, history = trained(quantized, loader, epochs=2, val=val)
    assert [e.epoch for e in history.epochs] == [0, 1, 2]


@pytest.mark.parametrize("said", [3, 30])
@pytest.mark.parametrize("recipe", [FAST, Recipe("ibp", lr=1e-3)], ids=["one cycle", "ibp"])
def test_a_length_that_is_not_true_is_said_and_does_not_end_the_run(
        said: int, recipe: Recipe, quantized: nn.Module, small: TensorDataset) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(small)

        def __len__(self) -> int:
            return 64 * said

    val = list(DataLoader(small, batch_size=64))[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the length
        model, history = trained(quantized, DataLoader(Stream(), batch_size=64), val=val,
                                 recipe=recipe)
    assert [e.epoch for e in history.epochs] == [0, 1, 2]
    assert f"an epoch had 7 batches, and the loader says that it has {said}" in history.events[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("labels", ["none", "-1"])
def test_images_without_labels_train_from_a_data_loader_too(labels: str, quantized: nn.Module,
                                                            small: TensorDataset) -> None:
    x = small.tensors[0]
    data = TensorDataset(x) if labels == "none" else TensorDataset(x, torch.full((len(x),), -1))
    model, history = trained(quantized, loader_of(data), epochs=1,
                             recipe=Recipe("pgd", steps=1, lr=1e-3, distill=1.0))
    assert "no held-out image has a label" in history.events[0]
    assert history.epochs[-1].clean is None and history.chosen == 1
    assert not torch.equal(model[0].weight, quantized[0].weight)


def test_a_held_out_batch_without_any_label_is_passed_over(quantized: nn.Module,
                                                           small: TensorDataset) -> None:
    class Strict(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x)  # what is given no image cannot reshape it
            return super().forward(x)  # type: ignore[no-any-return]

    x, y = small.tensors
    val = [(x[:10], torch.full((10,), -1)), (x[10:40], y[10:40])]
    recipe = Recipe("nfgsm", lr=1e-3, distill=0.5)
    _, history = trained(Strict(*copy.deepcopy(quantized)), loader_of(small), epochs=1, val=val,
                         recipe=recipe)
    assert history.epochs[-1].clean is not None


def broken(kind: str, x: Tensor, y: Tensor) -> Any:
    return {"nan": (torch.where(x > 0.9, torch.nan, x), y), "range": (x * 255, y),
            "labels": (x, y + 5), "negative": (x, y - 5), "float labels": (x, y.float()),
            "channels": (x.repeat(1, 3, 1, 1), y), "size": (x[..., :5, :5], y),
            "lengths": (x, y[:-1]), "unlabelled": x, "one-hot": (x, torch.eye(10)[y])}[kind]


@pytest.mark.parametrize("place", [0, 2, 6])
@pytest.mark.parametrize("kind", ["nan", "range", "labels", "negative", "float labels", "channels",
                                  "size", "lengths", "unlabelled", "one-hot"])
@pytest.mark.parametrize("lr", [None, 1e-3])
def test_a_bad_batch_is_named(kind: str, place: int, lr: float | None, cnn: nn.Module,
                              small: TensorDataset) -> None:
    batches: list[Any] = list(DataLoader(small, batch_size=40))
    val = batches[:1]
    batches[place] = broken(kind, *batches[place])
    with pytest.raises(DataError, match=f"batch {place}"):
        trained(cnn, batches, epochs=1, val=val, recipe=Recipe("pgd", steps=1, lr=lr))


@pytest.mark.parametrize("kind", ["nan", "labels", "channels", "unlabelled", "negative", "lengths",
                                  "float labels", "one-hot"])
def test_a_bad_batch_of_val_is_named_as_such(kind: str, cnn: nn.Module,
                                             small: TensorDataset) -> None:
    batches = list(DataLoader(small, batch_size=64))
    with pytest.raises(DataError, match="batch 1 of val"):
        trained(cnn, batches, epochs=1, val=[batches[0], broken(kind, *batches[1])])


@pytest.mark.parametrize(("loader", "message"), [
    ([], "the loader is empty"), (iter([]), "one-shot iterator"),
    (DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8))), "empty")])
def test_loaders_that_give_nothing(loader: Any, message: str, cnn: nn.Module,
                                   small: TensorDataset) -> None:
    with pytest.raises(DataError, match=message):
        trained(cnn, loader, val=list(DataLoader(small, batch_size=64)))


@pytest.mark.parametrize("val", [[], iter([])], ids=["empty", "one-shot"])
def test_a_val_that_gives_nothing(val: Any, cnn: nn.Module, small: TensorDataset) -> None:
    with pytest.raises(DataError, match="val"):
        trained(cnn, loader_of(small), val=val)


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "epochs=0"), ({"epochs": 1.5}, "epochs=1.5"),
    ({"train": "steps"}, "Use all or thresholds")])
def test_impossible_settings(options: dict[str, Any], message: str, cnn: nn.Module,
                             small: TensorDataset) -> None:
    with pytest.raises(SpecError, match=message):
        trained(cnn, loader_of(small), **options)


@pytest.mark.parametrize(("lr", "message"), [
    (None, "NaN or infinite on the first batches"), (1e-3, "the loss is nan at epoch 1, batch 2")])
def test_a_loss_that_is_not_finite_is_an_error_and_not_a_result(
        lr: float | None, message: str, cnn: nn.Module, small: TensorDataset,
        monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = Objective.__call__, itertools.count()

    def loss(self: Objective, *batch: Tensor) -> Tensor:
        return original(self, *batch) * (torch.nan if next(count) == 3 else 1.0)

    monkeypatch.setattr(Objective, "__call__", loss)
    with pytest.raises(DataError, match=message):
        trained(cnn, loader_of(small), recipe=Recipe("clean", lr=lr))


def test_a_model_in_train_mode_trains_without_a_warning(quantized: nn.Module, small: TensorDataset,
                                                        recwarn: pytest.WarningsRecorder) -> None:
    model, _ = trained(copy.deepcopy(quantized).train(), loader_of(small), epochs=1)
    assert model.training and not [str(w.message) for w in recwarn]


# --- memory order ---


class Viewing(nn.Module):
    """Asks for a view that channels-last order cannot give, or for a copy where there is none."""

    def __init__(self, channels: int, view: bool) -> None:
        super().__init__()
        self.first, self.conv = (nn.Conv2d(n, 4, 3, padding=1) for n in (channels, 4))
        self.last, self.view = nn.Linear(256, 2), view

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x).relu()).relu()
        flat = y.view(len(y), -1) if self.view else y.reshape(len(y), -1)
        return self.last(flat)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("channels", "view"), [(3, False), (3, True), (1, False), (1, True)])
def test_images_are_laid_out_as_the_model_takes_them_and_weights_come_back(
        channels: int, view: bool) -> None:
    model = Viewing(channels, view).eval()
    loader = [(torch.rand(8, channels, 8, 8), torch.tensor([0, 1] * 4))] * 2
    seen = []
    handle = model.conv.register_forward_hook(lambda _, __, y: seen.append(
        y.is_contiguous(memory_format=torch.channels_last)))
    fit(model, loader, THREAT, FAST, epochs=1, val=loader[:1], progress=False)
    handle.remove()
    assert seen[-1] is not view and model.conv.weight.is_contiguous()


class Writes(nn.Module):
    """Writes a float32 tensor into its features, which bfloat16 ones do not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
        self.register_buffer("value", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1))
        y[:, [0]] = self.value
        return self.last(self.relu(y))  # type: ignore[no-any-return]


def test_what_does_not_run_in_bfloat16_is_refused(small: TensorDataset) -> None:
    with pytest.raises(SpecError, match="does not run in bfloat16"):
        trained(Writes().eval(), loader_of(small), epochs=1,
                recipe=Recipe("pgd", steps=1, precision="bfloat16"))


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"of": "mine"}

    def set_extra_state(self, state: Any) -> None:
        assert state


def test_state_that_is_no_tensor_is_refused_before_any_work(small: TensorDataset) -> None:
    net = nn.Sequential(nn.Flatten(), Extra(64, 10))
    with pytest.raises(SpecError, match="1._extra_state in the model's state is a dict"):
        trained(net, loader_of(small), epochs=1)


# --- what thresholds do ---


@pytest.mark.parametrize(("bits", "per_channel", "train"), [
    (2, False, "all"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (3, True, "thresholds"), (2, False, "thresholds"), (3, True, "all"), (4, False, "all"),
        (4, False, "thresholds")))])
def test_thresholds_move_stay_ordered_and_inside_the_data(
        cnn: nn.Module, train_digits: TensorDataset, bits: int, per_channel: bool, train: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "probe", lambda *_: Probed(None, None, 0))  # the last is kept
    images = train_digits.tensors[0]
    converted = convert(cnn, bits, dynamic=True, per_channel=per_channel, data=[images[:512]])
    before = {name: m.thresholds.detach() for name, m in staircases(converted).items()}
    touched = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in before.items()}

    def note(module: Any, gradient: Tensor) -> None:
        touched[module.name] |= gradient != 0

    def noting(module: QuantActivation) -> Tensor:
        t: Tensor = thresholds(module)
        if t.requires_grad:
            t.register_hook(lambda g: note(module, g))
        return t

    for name, module in staircases(converted).items():
        module.name = name  # type: ignore[assignment]
    thresholds = QuantActivation.thresholds.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(QuantActivation, "thresholds", property(noting))
    loader = DataLoader(Subset(train_digits, range(640)), batch_size=8)
    model, history = trained(converted, loader, epochs=4, recipe=Recipe("clean"), train=train)
    assert history.chosen == 4 and 4 * hold_out(loader, None, None, 0).count() >= 200
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), listening(model, {name: lambda z, name=name: seen.update({name: z})
                                            for name in before}):
        model.eval()(images[:1000])
    assert history.levels.keys() == before.keys()
    for name, module in staircases(model).items():
        t, z = module.thresholds.detach(), seen[name]
        moved = t != before[name]
        assert moved[touched[name]].all(), name
        assert (t[..., 1:] > t[..., :-1]).all()
        assert t.max() <= z.max() and t.min() >= z.min()


def test_levels_that_nothing_takes_are_said(cnn: nn.Module, small: TensorDataset,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    converted = convert(cnn, 2, dynamic=False)
    name, module = next(iter(staircases(converted).items()))
    module.set_thresholds([0.1, 0.2, 1e6], 0.1)  # nothing reaches the last level
    _, history = trained(converted, loader_of(small), epochs=1, recipe=Recipe("clean", lr=1e-5),
                         progress=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "levels" in line]
    assert history.levels[name] == 3 and set(list(history.levels.values())[1:]) == {4}
    assert len(said) == 1 and said[0].startswith(f"{name} takes 3 of its 4 levels")
