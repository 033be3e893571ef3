"""What training descends: mixed and TRADES losses, distillation, perturbed weights, bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantguard.attacks import PixelModel
from quantguard.core.distributed import Distributed
from quantguard.core.specs import Threat
from quantguard.nn.contexts import soften
from quantguard.training import inner_attack
from quantguard.training.inner_attack import attacked_images
from quantguard.training.objectives import Objective, perturbed
from quantguard.training.recipes import Recipe
from quantguard.training.train_step import TrainStep

Digits = tuple[Tensor, Tensor]
THREAT = Threat(eps=0.1)


@pytest.fixture
def batch(digits: Digits) -> Digits:
    return digits[0][:32], digits[1][:32]


def log_softmax(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).log_softmax(1)  # type: ignore[no-any-return]


def test_trades_is_clean_cross_entropy_and_beta_times_the_divergence(
        quantized: nn.Module, batch: Digits) -> None:
    x, y = batch
    near = (x + 0.05).clamp(0, 1)
    p, q = log_softmax(quantized, x), log_softmax(quantized, near)
    # KL(clean || attacked), by hand
    expected = F.nll_loss(p, y) + 6 * (p.exp() * (p - q)).sum(1).mean()
    got = Objective(PixelModel(quantized, THREAT), THREAT, Recipe("trades", stability=0.0))(
        near, x, y)
    assert torch.allclose(got, expected, rtol=1e-5)
    other = F.nll_loss(p, y) + 6 * (q.exp() * (q - p)).sum(1).mean()
    assert not torch.allclose(got, other, rtol=1e-3)  # the other way around is another loss


def test_mix_is_the_share_of_the_clean_loss(quantized: nn.Module, batch: Digits) -> None:
    x, y = batch
    near = (x + 0.05).clamp(0, 1)
    losses = {}
    for mix in (0.0, 0.25, 1.0):
        recipe = Recipe("pgd", stability=0.0, mix=mix)
        objective = Objective(PixelModel(quantized, THREAT), THREAT, recipe)
        losses[mix] = float(objective(near, x, y).detach())
    assert losses[0.0] == pytest.approx(float(F.cross_entropy(quantized(near), y).detach()))
    assert losses[1.0] == pytest.approx(float(F.cross_entropy(quantized(x), y).detach()))
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)


def test_distillation_needs_no_labels_and_weighs_by_its_share(
        quantized: nn.Module, cnn: nn.Module, batch: Digits) -> None:
    x, y = batch
    near, half = (x + 0.05).clamp(0, 1), y.clone()
    half[::2] = -1
    model = PixelModel(quantized, THREAT)
    with torch.no_grad():
        p, q = log_softmax(cnn, x), log_softmax(quantized, near)
        away = (q.exp() * 0 + p.exp() * (p - q)).sum(1).mean()
        known = F.nll_loss(q, y, reduction="none")[1::2].sum() / len(y)
        got = Objective(model, THREAT, Recipe("pgd", stability=0.0, distill=0.25),
                        teacher=cnn)(
            near, x, half)
    assert torch.allclose(got, 0.75 * known + 0.25 * away, rtol=1e-4)


def test_trades_maximises_the_divergence_and_needs_no_true_label(quantized: nn.Module,
                                                              batch: Digits) -> None:
    x, y = batch
    model, recipe = PixelModel(quantized, THREAT), Recipe("trades", steps=5, precision="float32")
    torch.manual_seed(0)
    found = attacked_images(model, x, y, THREAT, recipe)
    torch.manual_seed(0)
    assert torch.equal(found, attacked_images(model, x, 0 * y, THREAT, recipe))
    assert float((found - x).abs().max()) <= 0.1 + 1e-6
    with torch.no_grad():
        p = log_softmax(quantized, x)
        random = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        away = [(p.exp() * (p - log_softmax(quantized, z))).sum(1).mean() for z in (random, found)]
    assert away[1] > 1.5 * away[0]


def test_perturbed_weights_raise_the_loss_by_their_share_and_come_back(cnn: nn.Module,
                                                                       batch: Digits) -> None:
    model = copy.deepcopy(cnn)
    x, y = batch
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)
    plain = float(loss().detach())
    with perturbed(model, 0.02, loss):
        raised = float(loss().detach())
        for name, value in model.named_parameters():
            moved = float((value.detach() - before[name]).norm() / before[name].norm())
            assert moved == pytest.approx(0.02 if value.dim() > 1 else 0.0, rel=1e-3)
    assert raised > plain
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError, match="died"), perturbed(model, 0.02, loss):
        raise RuntimeError("died")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with perturbed(model, 0.0, loss):
        assert torch.equal(model[0].weight, before["0.weight"])


def test_an_attack_in_bfloat16_is_nearly_as_strong(quantized: nn.Module,
                                                   digits: Digits) -> None:
    x, y = digits[0][:200], digits[1][:200]
    model, losses = PixelModel(quantized, THREAT), {}
    for low in (False, True):
        torch.manual_seed(0)
        found = attacked_images(model, x, y, THREAT, Recipe("pgd"), low=low)
        assert found.dtype == torch.float32
        with torch.no_grad(), soften(quantized, 16):
            losses[low] = float(F.cross_entropy(quantized(found), y))
    assert losses[True] > 0.9 * losses[False]


class Casts(TorchDispatchMode):
    """Count the tensors of a shape that are cast to another type."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_to_copy" in str(func) and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pgd", "trades"])
def test_weights_are_cast_once_for_all_steps(monkeypatch: pytest.MonkeyPatch, quantized: nn.Module,
                                             batch: Digits, name: str) -> None:
    # the first convolution is cast by itself
    _, weight, *_ = (p for p in quantized.parameters() if p.dim() == 4)
    found, counts = [], []
    for cast in (inner_attack._CAST, ()):
        monkeypatch.setattr(inner_attack, "_CAST", cast)
        torch.manual_seed(0)
        with Casts(weight.shape) as casts:
            found.append(
                attacked_images(quantized, *batch, THREAT, Recipe(name, steps=4), low=True)
            )
        counts.append(casts.count)
    assert counts == [1, 4]
    assert torch.equal(*found) and all(p.grad is None for p in quantized.parameters())
    assert all(p.requires_grad for p in quantized.parameters())


@pytest.mark.parametrize("recipe", [Recipe("pgd"), Recipe("trades"), Recipe("pgd", mix=0.5)])
def test_a_loss_in_bfloat16_is_nearly_the_same_and_its_gradients_are_float32(
        quantized: nn.Module, digits: Digits, recipe: Recipe) -> None:
    x, y = digits[0][:200], digits[1][:200]
    model, dtypes = PixelModel(quantized, THREAT), set()
    near, found = (x + 0.05).clamp(0, 1), []
    handle = quantized[0].register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    for low in (False, True):
        loss = Objective(model, THREAT, recipe, low)(near, x, y)
        assert loss.dtype == torch.float32
        weights = [p for p in quantized.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, weights)
        assert all(g.dtype == torch.float32 for g in gradients)
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    handle.remove()
    assert dtypes == {torch.float32, torch.bfloat16}
    # TRADES' term is how far two answers lie apart, six times: each rounded, they lie further, by
    # 0 to 8 per cent of the loss from CPU to CPU
    assert torch.isclose(found[0][0], found[1][0], rtol=0.15 if recipe.beta else 0.05)
    # rounding moves some pre-activations over a threshold
    assert F.cosine_similarity(found[0][1], found[1][1], 0) > 0.8


def test_precision_is_that_of_the_recipe_on_every_machine(
        quantized: nn.Module, batch: Digits) -> None:
    assert Recipe("pgd").precision == "float32"
    for precision, low in (("float32", False), ("bfloat16", True)):
        gradients = TrainStep(PixelModel(quantized, THREAT), THREAT,
                              Recipe("pgd", precision=precision), True, torch.device("cpu"),
                              Distributed(), print)
        assert gradients.objective.low is low


def test_the_attack_starts_from_the_noise_argument(quantized: nn.Module, batch: Digits) -> None:
    x, y = batch
    model, recipe = PixelModel(quantized, THREAT), Recipe("pgd", rel_step=0.0)
    noise: Any = 2 * torch.rand_like(x) - 1
    assert torch.equal(
        attacked_images(model, x, y, THREAT, recipe, noise), (x + 0.1 * noise).clamp(0, 1)
    )
