"""What a caller hands over stays as it was, and may come in any state; what cannot be used says so.

Images: written to by the model, with a graph, of inference mode, without numbers. Models: under
activation checkpoints, with results in their attributes, of inference mode, without numbers, or
without a gradient. Around a call: torch.no_grad, no standard error.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foolbox.attacks import LinfFastGradientAttack, LinfPGD
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import quantguard as qg
from quantguard.attacks import PixelModel
from quantguard.attacks.losses import input_gradient
from quantguard.progress import Progress, say
from quantguard.running import duplicate

THREAT = qg.Threat(eps=0.1)
FAST = qg.Recipe("pgd", steps=1, sharpness=(4.0,), lr=1e-3)
Batches = list[tuple[Tensor, Tensor]]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def batches(train_digits: TensorDataset) -> Batches:
    images, labels = train_digits.tensors
    return [(images[i:i + 24].clone(), labels[i:i + 24].clone()) for i in (0, 24)]


class Wrapped(nn.Module):
    """Compute a net's logits in some way."""

    def __init__(self, net: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.net, x)


def harden(model: nn.Module, loader: Any, **options: Any) -> nn.Module:
    return qg.harden(model, loader, THREAT, **{"recipe": FAST, "epochs": 1, "progress": False,
                                               **options})


def evaluate(model: nn.Module, loader: Any, suite: Any = None) -> qg.Evaluation:
    """Evaluate by a few attacks, ours and one of Foolbox's."""
    attacks = [LinfFastGradientAttack(), qg.attacks.PGD(steps=3), qg.attacks.APGD(steps=5)]
    return qg.evaluate(model, loader, THREAT, suite=suite or attacks, images=16, progress=False)


VERBS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "inspect": lambda m, b: qg.inspect(m, example=b[0][0]),
    "convert": lambda m, b: qg.convert(m, data=b),
    "convert example": lambda m, b: qg.convert(m, example=b[0][0]),
    "evaluate": evaluate,
    "certify": lambda m, b: qg.certify(m, b, THREAT, method="ibp", images=8, progress=False),
    "compare": lambda m, b: qg.compare({"one": m, "two": m}, b, THREAT, images=8, progress=False,
                                       suite=[qg.attacks.PGD(steps=2)]),
    "harden": harden,
    "harden clean": lambda m, b: harden(m, b, recipe="clean"),
    "harden val": lambda m, b: harden(m, b, val=b),
}


# --- forwards that write to what they are given ---


def _overwritten(x: Tensor) -> Tensor:
    x[:, :, 0] = 0
    return x


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "normalises": lambda x: x.sub_(0.5), "relu": lambda x: F.relu(x, inplace=True),
    "item": _overwritten, "view": lambda x: x.flatten(1).mul_(0.9).view_as(x),
    "data": lambda x: x.data.mul_(0.9) * x}


@pytest.mark.parametrize(("verb", "name"), [
    pytest.param(verb, name, marks=[pytest.mark.slow] * (name != "normalises"))
    for verb in VERBS for name in WRITES])
def test_no_forward_changes_what_the_caller_gave(verb: str, name: str, cnn: nn.Module,
                                                 batches: Batches) -> None:
    write = WRITES[name]
    before = copy.deepcopy(batches)
    with pytest.raises(qg.ConversionError, match="writes|be traced") if verb == "certify" else \
            nullcontext():
        VERBS[verb](Wrapped(cnn, lambda net, x: net(write(x))).eval(), batches)
    assert all(torch.equal(a, b) for one, two in zip(before, batches, strict=True)
               for a, b in zip(one, two, strict=True))


def test_a_forward_in_place_gets_the_figure_of_one_that_is_not(cnn: nn.Module,
                                                               batches: Batches) -> None:
    one = evaluate(Wrapped(cnn, lambda net, x: net(x.mul_(0.9))).eval(), batches)
    two = evaluate(Wrapped(cnn, lambda net, x: net(x * 0.9)).eval(), batches)
    assert (one.survived == two.survived).all() and one.fidelity == two.fidelity


# --- tensors in any state ---


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda x: x.clone().requires_grad_(),
    "result": lambda x: x.clone().requires_grad_() * 1,
    "inference": torch.inference_mode()(lambda x: x * 1)}


@pytest.mark.parametrize(("verb", "state"), [
    pytest.param(verb, state, marks=[pytest.mark.slow] * (state == "result"))
    for verb in VERBS for state in STATES])
def test_images_come_in_any_state(verb: str, state: str, cnn: nn.Module, batches: Batches) -> None:
    given = [(STATES[state](x), y * 1) for x, y in batches]
    VERBS[verb](cnn, given)
    assert all(x.grad is None for x, _ in given if x.is_leaf)


@pytest.mark.parametrize(("verb", "at"), [
    (verb, at) for verb in VERBS for at in (0, 1)
    if at == 0 or verb not in ("inspect", "convert example")])  # these take no labels
def test_tensors_without_numbers_are_refused(verb: str, at: int, cnn: nn.Module,
                                             batches: Batches) -> None:
    given = [tuple(t.to("meta") if i == at else t for i, t in enumerate(b)) for b in batches]
    with pytest.raises(qg.DataError, match="on the meta device"):
        VERBS[verb](cnn, given)


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "inspect"])
@pytest.mark.parametrize("part", ["", "0"], ids=["all", "one layer"])
def test_models_without_numbers_are_refused(verb: str, part: str, cnn: nn.Module,
                                            batches: Batches) -> None:
    model = copy.deepcopy(cnn)
    model.get_submodule(part).to("meta")
    with pytest.raises(qg.ConversionError, match="on the meta device"):
        VERBS[verb](model, batches)


def test_no_model_is_moved_to_the_meta_device(cnn: nn.Module, batches: Batches) -> None:
    for verb in (qg.evaluate, qg.certify, qg.harden):
        with pytest.raises(qg.SpecError, match="device 'meta'"):
            verb(cnn, batches, THREAT, device="meta", progress=False)  # type: ignore[operator]
    assert not any(p.is_meta for p in cnn.parameters())


@pytest.mark.parametrize("context", [
    torch.inference_mode, pytest.param(torch.no_grad, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_switched_off_around_a_call_is_on_inside(
        verb: str, context: Any, cnn: nn.Module, batches: Batches) -> None:
    plain = VERBS[verb](cnn, batches)
    with context():
        found = VERBS[verb](cnn, [(x * 1, y * 1) for x, y in batches])
    if isinstance(found, nn.Module):
        one, two = plain.state_dict(), found.state_dict()
        assert all(torch.equal(one[k], two[k]) and not two[k].is_inference() for k in one)
        assert [p.requires_grad for p in found.parameters()] == \
            [p.requires_grad for p in plain.parameters()]
    elif isinstance(found, qg.Evaluation):
        assert (found.survived == plain.survived).all()


@pytest.mark.parametrize("verb", VERBS)
def test_models_of_inference_mode_are_as_good_as_others(verb: str, cnn: nn.Module,
                                                        batches: Batches) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(cnn)
    assert next(model.parameters()).is_inference()
    found = VERBS[verb](model, batches)
    if isinstance(found, qg.Evaluation):
        assert (found.survived == evaluate(cnn, batches).survived).all()
    assert next(model.parameters()).is_inference()


# --- activation checkpoints ---


class Checkpointed(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.function = form, None
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                                  nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(128, 10)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Do as Hugging Face's models do."""
        self.function = functools.partial(checkpoint, **options)

    def forward(self, x: Tensor) -> Tensor:
        again: dict[str, Any] = {"use_reentrant": self.form.startswith("reentrant")}
        if self.form == "none":
            x = self.body(self.stem(x))
        elif self.form.endswith("sequential"):
            x = checkpoint_sequential(self.body, 2, self.stem(x), **again)
        elif self.form == "nested":
            x = checkpoint(lambda v: checkpoint(self.body, self.stem(v), **again), x, **again)
        elif self.function is not None:
            x = self.stem(x)
            x = self.function(self.body.__call__, x) if self.training else self.body(x)
        else:
            x = checkpoint(self.body, checkpoint(self.stem, x, **again), **again)
        return self.head(x.flatten(1))


FORMS = ["reentrant", "not reentrant", "reentrant sequential", "sequential", "nested", "enabled",
         "enabled reentrant"]


def checkpointed(form: str) -> Checkpointed:
    torch.manual_seed(0)
    model = Checkpointed(form).eval()
    if form.startswith("enabled"):
        model.gradient_checkpointing_enable(use_reentrant=form.endswith("reentrant"))
    return model


RECIPES: dict[str, dict[str, Any]] = {
    "trades": {"recipe": "trades", "dynamic": True}, "pgd": {"recipe": FAST},
    "nfgsm": {"recipe": "nfgsm"}, "clean": {"recipe": "clean", "dynamic": True},
    "awp": {"recipe": qg.Recipe("pgd", awp=0.01)}, "ibp": {"recipe": "ibp"}}


@pytest.mark.parametrize(("form", "name"), [
    pytest.param(form, name, marks=[pytest.mark.slow] * (name != "trades"))
    for form in FORMS for name in RECIPES])
def test_checkpoints_change_nothing_that_is_learned(form: str, name: str,
                                                    batches: Batches) -> None:
    options = RECIPES[name]
    plain = harden(checkpointed("none"), batches, **options).state_dict()
    found = harden(checkpointed(form), batches, **options).state_dict()
    assert plain.keys() == found.keys() and all(torch.equal(plain[k], found[k]) for k in plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("converted", [
    True, pytest.param(False, marks=pytest.mark.slow)])
def test_checkpoints_change_no_gradient_and_no_figure(form: str, converted: bool,
                                                      batches: Batches) -> None:
    found = []
    for model in (checkpointed("none"), checkpointed(form)):
        net = qg.convert(model, data=batches, dynamic=True) if converted else model
        gradient = input_gradient(PixelModel(net, THREAT), *batches[0], "ce")[0]
        found.append((gradient, evaluate(net, batches).survived))
    assert torch.equal(found[0][0], found[1][0]) and bool(found[0][0].any())
    assert (found[0][1] == found[1][1]).all()


def test_a_checkpoint_outside_of_a_call_is_one(batches: Batches) -> None:
    """What is inlined while attacking keeps and recomputes afterwards as before."""
    model = checkpointed("not reentrant")
    evaluate(model, batches)
    calls = []
    model.body.register_forward_pre_hook(lambda *_: calls.append(0))
    model(batches[0][0]).sum().backward()
    assert len(calls) == 2


# --- results that a model keeps ---


class Keeps(nn.Module):
    def __init__(self, net: nn.Module, where: str) -> None:
        super().__init__()
        self.net, self.where, self.kept = net, where, None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        self.kept = {"attribute": y, "list": [y], "object": types.SimpleNamespace(y=y),
                     "set": {y}, "dict": {"a": (y,)}}[self.where]
        return y


@pytest.mark.parametrize("where", ["attribute", "list", "object", "set", "dict"])
@pytest.mark.parametrize("converted", [False, True])
def test_results_that_a_model_keeps_are_copied_without_their_graph(
        where: str, converted: bool, cnn: nn.Module, batches: Batches) -> None:
    model: Any = Keeps(copy.deepcopy(cnn), where).eval()
    model = qg.convert(model, data=batches) if converted else model
    answers = model(batches[0][0])
    twin: Any = duplicate(model)
    kept = twin.kept
    kept = kept.y if where == "object" else next(iter(kept.values()))[0] if where == "dict" else \
        next(iter(kept)) if where in ("list", "set") else kept
    assert torch.equal(kept, answers) and not kept.requires_grad
    harden(model, batches)
    assert torch.equal(twin(batches[0][0]), answers)


def test_what_cannot_be_copied_is_named(cnn: nn.Module, batches: Batches) -> None:
    model = copy.deepcopy(cnn)
    model.lock = threading.Lock()  # type: ignore[assignment]
    for verb in ("inspect", "convert", "harden"):
        with pytest.raises(qg.ConversionError, match="cannot be copied(.|\n)*lock"):
            VERBS[verb](model, batches)
    evaluate(model, batches)  # copies nothing


# --- no gradient ---


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class Unwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


CUTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a backward of None": lambda net, x: net(Cut.apply(x)),
    "no backward": lambda net, x: net(Unwritten.apply(x)),
    "detach": lambda net, x: net(x.detach()),
    "numpy": lambda net, x: net(torch.from_numpy(x.numpy() * 1)),
    "numbers": lambda net, x: net(torch.tensor(x.tolist())),
    "out": lambda net, x: net(torch.add(x, 0, out=torch.empty_like(x))),
    "no derivative": lambda net, x: net(x + 0 * torch.special.zeta(x + 2, torch.ones(()))),
    "no derivative of steps": lambda net, x: net(torch.floor_divide(x, 0.01) * 0.01),
    "index": lambda net, x: net(torch.linspace(0, 1, 256)[(x * 255).round().long().clamp(0, 255)]),
    "no_grad": torch.no_grad()(lambda net, x: net(x)),
    "inference mode": torch.inference_mode()(lambda net, x: net(x))}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("converted", [
    False, pytest.param(True, marks=pytest.mark.slow)])
def test_where_no_gradient_comes_through_no_figure_is_resolved_and_nothing_is_trained(
        cut: str, converted: bool, cnn: nn.Module, batches: Batches) -> None:
    model: nn.Module = Wrapped(copy.deepcopy(cnn), CUTS[cut]).eval()
    with pytest.raises(qg.ConversionError, match="cannot be trained"):
        harden(model, batches)
    model = qg.convert(model, data=batches) if converted else model
    found = evaluate(model, batches, "quick")
    # a foreign Function is seen through while attacking, but what gave no gradient is flagged
    assert found.verdict != "resolved" or found.robust_accuracy == 0
    if found.robust_accuracy > 0:
        assert next(f for f in found.flags if f.name == "zero input gradients").raised


def test_an_operation_without_a_derivative_is_named(cnn: nn.Module, batches: Batches) -> None:
    model = Wrapped(copy.deepcopy(cnn), CUTS["no derivative of steps"]).eval()
    with pytest.warns(UserWarning, match="floor_divide"):
        evaluate(model, batches)
    with pytest.raises(qg.ConversionError, match="floor_divide"):
        harden(model, batches)


def test_foolbox_attacks_see_zeros_where_there_is_no_derivative(cnn: nn.Module,
                                                                batches: Batches) -> None:
    model = Wrapped(copy.deepcopy(cnn), CUTS["no derivative of steps"]).eval()
    for attack in (LinfPGD(steps=2), qg.attacks.DeepFool("linf", 2), qg.attacks.DDN(2)):
        found = qg.evaluate(model, batches, THREAT, suite=[attack], images=8, progress=False)
        assert found.robust_accuracy <= found.clean_accuracy


def test_a_backward_that_is_wrong_is_one_error(cnn: nn.Module, batches: Batches) -> None:
    def how(net: nn.Module, x: Tensor) -> Tensor:
        kept = net(x).exp()
        product = kept * kept
        kept.add_(1)
        return product
    model = Wrapped(copy.deepcopy(cnn), how).eval()
    for verb in ("evaluate", "harden", "harden clean"):
        with pytest.raises(qg.ConversionError, match="inplace operation"):
            VERBS[verb](model, batches)


def test_who_starts_at_a_constant_has_a_gradient_to_come(cnn: nn.Module, batches: Batches) -> None:
    """A head of zeros, as timm's transformers begin, has none in the images; nor has it answers."""
    model = copy.deepcopy(cnn)
    head: Any = list(model.modules())[-1]
    nn.init.zeros_(head.weight)
    assert bool(list(harden(model, batches).modules()))


def test_recipe_clean_needs_no_gradient_in_the_images(cnn: nn.Module, batches: Batches) -> None:
    harden(Wrapped(copy.deepcopy(cnn), CUTS["detach"]).eval(), batches, recipe="clean")


def test_weights_that_torch_has_packed_are_refused_by_harden_alone(cnn: nn.Module,
                                                                   batches: Batches) -> None:
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(cnn), {nn.Linear})
    assert evaluate(model, batches).verdict != "resolved"
    assert qg.convert(model, data=batches).quantguard.plan.converted  # type: ignore[union-attr]
    with pytest.raises(qg.QuantguardError, match="quantized its weights"):
        harden(model, batches)


def test_weights_that_torchao_has_quantized(cnn: nn.Module, batches: Batches,
                                            tmp_path: Any) -> None:
    import torchao.quantization as ao
    model = copy.deepcopy(cnn)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    converted = qg.convert(model, data=batches)
    for net in (model, converted):
        assert evaluate(net, batches).images == 16
        with pytest.raises(qg.SpecError, match="of class Int8Tensor(.|\n)*Harden the float model"):
            harden(net, batches)
    with pytest.raises(qg.LoadError, match="of class Int8Tensor"):
        qg.save(converted, tmp_path / "model.qg")


# --- batches of one image in front of a BatchNorm ---


class Stream(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in range(len(self.data))])


class Again:
    """Make its batches each time that it is gone through, without a length."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(),
                         nn.Linear(16, 10)).eval()


LOADERS: dict[str, Callable[[TensorDataset], Any]] = {
    "list": lambda d: [(d.tensors[0][i:i + 16], d.tensors[1][i:i + 16]) for i in (0, 16, 32)],
    "first": lambda d: [(d.tensors[0][i:j], d.tensors[1][i:j]) for i, j in
                        ((0, 1), (1, 17), (17, 33))],
    "iterable": lambda d: Again([(d.tensors[0][i:i + 16], d.tensors[1][i:i + 16])
                                 for i in (0, 16, 32)]),
    "IterableDataset": lambda d: DataLoader(Stream(d), batch_size=16),
    "sampler": lambda d: DataLoader(d, batch_size=16, sampler=WeightedRandomSampler(
        torch.ones(33), 33)),
    "shuffled": lambda d: DataLoader(d, batch_size=16, shuffle=True)}


WAYS: dict[str, dict[str, Any]] = {
    "own lr": {"recipe": qg.Recipe("pgd", steps=1)}, "lr": {}, "ibp": {"recipe": "ibp"},
    "val": {"recipe": "clean", "val": True}, "float": {"bits": 32}}


@pytest.mark.parametrize(("kind", "way"), [
    pytest.param(kind, way, marks=[pytest.mark.slow] * (way != "own lr"))
    for kind in LOADERS for way in WAYS])
def test_a_batch_of_one_among_others_is_left_out(kind: str, way: str,
                                                 train_digits: TensorDataset) -> None:
    options = WAYS[way]
    loader = LOADERS[kind](TensorDataset(*(t[:33] for t in train_digits.tensors)))
    options = {**options, **({"val": LOADERS["list"](train_digits)} if "val" in options else {})}
    hardened = harden(normed(), loader, **options)
    assert all(v.isfinite().all() for v in hardened.state_dict().values())


@pytest.mark.parametrize("loader", [
    lambda d: [(d[i][0][None], d[i][1][None]) for i in range(8)],
    lambda d: DataLoader(d, batch_size=1)], ids=["list", "DataLoader"])
def test_batches_of_one_alone_are_refused_in_words(loader: Callable[[Any], Any],
                                                   train_digits: TensorDataset) -> None:
    with pytest.raises(qg.DataError, match="one image each(.|\n)*batches of two"):
        harden(normed(), loader(train_digits))


def test_batches_of_one_are_trained_where_that_can_be(cnn: nn.Module, batches: Batches) -> None:
    images, labels = batches[0]
    harden(cnn, [(images[i:i + 1], labels[i:i + 1]) for i in range(4)])


# --- a standard error that is none ---


class Log:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


class Deaf(Log):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def _closed() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [lambda: None, _closed, Log, Deaf],
                         ids=["None", "closed", "write alone", "broken"])
def test_work_does_not_need_a_standard_error(stream: Callable[[], Any], quantized: nn.Module,
                                             batches: Batches,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    there = stream()
    monkeypatch.setattr(sys, "stderr", there)
    if not isinstance(there, Deaf):
        warnings.simplefilter("always")  # Python's own go to standard error, too
    options: dict[str, Any] = {"images": 8, "suite": [qg.attacks.PGD(steps=2)]}
    qg.evaluate(quantized, batches, THREAT, **options)
    qg.harden(quantized, batches, THREAT, recipe=FAST, epochs=1)
    qg.compare({"a": quantized}, batches, THREAT, **options)
    qg.sensitivity(quantized, batches, THREAT, **options)
    qg.certify(quantized, batches, THREAT, images=2, method="ibp")
    assert sys.stderr is there
    if type(there) is Log:
        assert "harden (pgd)" in there.text and "\r" not in there.text


def test_lines_go_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, _closed(), Deaf()):
        bar = Progress("x", 2, stream=stream)
        monkeypatch.setattr(sys, "stderr", stream)
        for written in (bar, Progress("y", 2)):
            written.advance(1)
            written.say("text")
            written.close()
        say("text")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_the_command_line_runs_without_streams(closed: str, cnn: nn.Module, tmp_path: Any) -> None:
    torch.save(cnn, tmp_path / "m.pt")
    command = (f"exec {sys.executable} -m quantguard evaluate {tmp_path / 'm.pt'} --data digits "
               f"--suite quick --images 8 --json {tmp_path / 'r.json'} "
               f"--run-dir {tmp_path / 'run'} {closed}")
    assert subprocess.run(command, shell=True, env=os.environ).returncode == 0
    assert qg.Evaluation.load(tmp_path / "r.json").images == 8
