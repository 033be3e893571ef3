"""On a GPU the numbers are those of the CPU; skipped where there is no GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantguard as qg
from quantguard.conversion.converter import convert
from quantguard.core.nested_tensors import device_of
from quantguard.nn.contexts import backward, soften
from quantguard.nn.functional import compiled_kernels as fused
from quantguard.nn.quant_activation import QuantActivation, quantizers

pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
THREAT = qg.Threat(eps=0.1)


def _activation(bits: int, dynamic: bool, *rows: int) -> QuantActivation:
    """A staircase with uneven thresholds; rows: another one for each of so many channels."""
    count = 2**bits - 1
    t = (torch.linspace(-1, 1, count) ** 3 + torch.linspace(-1, 1, count)).expand(*rows, count)
    t = t + 0.1 * torch.arange(rows[0]).unsqueeze(1) if rows else t
    return QuantActivation.from_thresholds(t, torch.full(rows, 0.3), dynamic=dynamic)


@pytest.mark.parametrize("clone", [False, True])
@pytest.mark.parametrize("size", [(3, 4, 5, 7), (64, 4, 96, 96)], ids=["small", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_staircase_is_the_same(bits: int, dynamic: bool, dtype: torch.dtype,
                                 size: tuple[int, ...], clone: bool) -> None:
    module = _activation(bits, dynamic)
    torch.manual_seed(0)
    x, up = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    found: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(module).to(device)
        leaf = x.detach().to(device).requires_grad_()
        model = nn.Sequential(there)
        if clone:
            with soften(model, 4.0):
                y = model(leaf)
        else:
            with backward(model, "sigmoid(8)"):
                y = model(leaf)
        y.backward(up.to(device))
        found.append([v.detach().cpu() for v in (
            y, leaf.grad, *(p.grad for p in there.parameters() if p.grad is not None))])
    for a, b in zip(*found, strict=True):
        if not a.numel():  # one threshold has no gaps
            continue
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))
    if not clone:
        assert torch.equal(found[0][0], found[1][0])


def test_what_is_compiled_was_compiled() -> None:
    module = _activation(2, False).cuda()
    x = torch.randn(64, 4, 96, 96, device="cuda", requires_grad=True)
    module(x).sum().backward()
    assert any(key[1] == "cuda" for key in fused._ready)
    assert not any(key[1] == "cuda" for key in fused._failed)


def test_channels_have_their_own_thresholds() -> None:
    module, x = _activation(2, False, 4), torch.randn(64, 4, 96, 96)
    assert torch.equal(module(x), copy.deepcopy(module).cuda()(x.cuda()).cpu())


def test_a_model_on_a_gpu_is_converted_there(cnn: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    loader = DataLoader(TensorDataset(images, labels), batch_size=100)
    here = convert(cnn, 2, dynamic=True, data=loader)
    there = convert(copy.deepcopy(cnn).cuda(), 2, dynamic=True, data=loader)
    assert device_of(there).type == "cuda"
    for a, b in zip(quantizers(here).values(), quantizers(there).values(), strict=True):
        assert torch.allclose(a.thresholds, b.thresholds.cpu(), rtol=1e-3, atol=1e-4)
    same = (here(images).argmax(1) == there(images.cuda()).argmax(1).cpu()).float().mean()
    assert same > 0.98


def _loader(digits: tuple[Tensor, Tensor], images: int = 500) -> DataLoader[Any]:
    return DataLoader(TensorDataset(digits[0][:images], digits[1][:images]), batch_size=100)


def test_an_evaluation_finds_as_much(quantized: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    torch_state = torch.cuda.get_rng_state()
    results = [qg.evaluate(quantized, _loader(digits, 200), THREAT, suite="quick", progress=False,
                           device=device) for device in ("cpu", "cuda")]
    assert device_of(quantized).type == "cpu"
    assert torch.equal(torch_state, torch.cuda.get_rng_state())
    a, b = (r.robust_accuracy for r in results)
    assert abs(a - b) < 0.04
    assert results[1].environment["device"].startswith("cuda")


def test_the_standard_suite_runs(quantized: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = qg.evaluate(quantized, _loader(digits, 32), THREAT, progress=False, device="cuda")
    assert 0 <= found.robust_accuracy <= found.clean_accuracy


@pytest.mark.parametrize("threat", [THREAT, qg.Threat(eps=0.3, norm="l2")], ids=["linf", "l2"])
def test_certificates_agree(quantized: nn.Module, digits: tuple[Tensor, Tensor],
                            threat: qg.Threat) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    small = qg.Threat(eps=threat.eps / 1000, norm=threat.norm)
    try:
        here, there = (qg.certify(quantized, _loader(digits), small, method="ibp", device=device,
                                  progress=False) for device in ("cpu", "cuda"))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (
            True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert here.certified_accuracy > 0.05
    assert abs(here.certified_accuracy - there.certified_accuracy) <= 0.01
    known = torch.as_tensor(here.lower).isfinite() & torch.as_tensor(there.lower).isfinite()
    a, b = (torch.as_tensor(c.lower, dtype=torch.float64)[known] for c in (here, there))
    # rounded apart by a little; a staircase may fall on either side of a threshold
    assert float((a - b).abs().median()) < 1e-3


@pytest.mark.parametrize(("recipe", "bits"), [("pgd", 2), ("pgd", 32), ("ibp", 2), ("nfgsm", 4),
                                              ("trades", 2), ("clean", 2)])
def test_hardening(cnn: nn.Module, train_digits: TensorDataset, recipe: str, bits: int) -> None:
    before = torch.cuda.get_rng_state()
    model = qg.harden(cnn, DataLoader(train_digits, batch_size=64, shuffle=True), THREAT, bits=bits,
                      recipe=recipe, epochs=2, device="cuda", progress=False)
    assert device_of(model) == device_of(cnn)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_run_on_a_gpu_is_taken_up(cnn: nn.Module, train_digits: TensorDataset,
                                    tmp_path: Path) -> None:
    loader = DataLoader(train_digits, batch_size=64, shuffle=True)
    same: dict[str, Any] = {"bits": 2, "epochs": 2, "device": "cuda", "progress": False,
                            "run_dir": tmp_path / "run"}
    first = qg.harden(cnn, loader, THREAT, **same)
    again = qg.harden(cnn, loader, THREAT, **same)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_model_comes_back(cnn: nn.Module, digits: tuple[Tensor, Tensor],
                                  tmp_path: Path) -> None:
    there = convert(copy.deepcopy(cnn).cuda(), 2, dynamic=True)
    qg.save(there, tmp_path / "model.qg")
    back = qg.load(tmp_path / "model.qg")
    same = (back(digits[0].to(device_of(back))).argmax(1).cpu()
            == there(digits[0].cuda()).argmax(1).cpu()).float().mean()
    assert same > 0.98
