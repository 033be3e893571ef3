"""Edge cases of models, images and environments have correct bounds or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from averaging_model import Averaging, D, X, Y
from torch import Tensor, nn

import quantguard as qg
from quantguard.core.errors import ConversionError


class Twice(nn.Module):
    """One ReLU for two calls, in a forward that torch.fx does not trace at conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.c, self.relu = nn.Linear(D, 2), nn.ReLU()
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight.copy_(torch.eye(D))
            self.c.weight.copy_(torch.stack([torch.ones(D), torch.zeros(D)]) / D)
            self.c.bias.copy_(torch.tensor([-0.44, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return self.c(self.relu(self.b(self.relu(self.a(x)))))  # type: ignore[no-any-return]


def test_calls_distinguished_at_run_time_have_their_own_quantizer() -> None:
    model = qg.convert(Twice().eval(), 8, data=[torch.rand(256, D)])
    t = (torch.arange(255) + 0.5) / 255
    names = [name for name, m in model.named_modules() if type(m).__name__ == "QuantActivation"]
    assert len(names) == 2
    for name, shrink in zip(names, (1.0, 0.97), strict=True):
        model.get_submodule(name).set_thresholds(t, shrink / 255)  # type: ignore[operator]
    found = qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)
    with torch.no_grad():
        logits = model(X - 0.05)
    worst = (logits[:, 0] - logits[:, 1]).double().numpy()
    assert (found.lower <= worst).all() and (found.lower > worst - 1e-3).all()
    assert sorted(found.sites) == sorted(names)


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_a_clamp_with_one_end_is_unbounded_at_the_other(method: str) -> None:
    class Far(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = ((x - 0.5) * 3e31).clamp(max=0.0) * (1 / 3e31)
            return torch.cat([z.mean(1, keepdim=True) + 0.04, 0 * x[:, :1]], 1)
    found = qg.certify(Far().eval(), [(X, Y)], qg.Threat(eps=0.05), method=method, progress=False)
    assert (found.lower <= -0.0099).all() and not found.certified.any()


def test_the_ball_lies_around_the_original_image() -> None:
    class Near(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([(1 / 255 + 0.01 + 5e-7) - x, x * 0], 1)
    original = torch.full((1, 1), 1 / 255 + 9e-7)  # is snapped to 1/255
    found = qg.certify(Near(), [(original, Y[:1])], qg.Threat(eps=0.01), progress=False)
    assert not found.certified.any()


def test_thresholds_that_do_not_ascend_are_refused() -> None:
    model = nn.Sequential(nn.Linear(D, 8), qg.QuantActivation.from_thresholds([0.3, 0.5, 0.7], 1.0),
                          nn.Linear(8, 2)).eval()
    state = model.state_dict()
    state["1.base"] = torch.tensor([0.5, 0.3, 0.7])
    model.load_state_dict(state)
    with pytest.raises(ConversionError, match="do not ascend"):
        qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)


class Calls(nn.Module):
    def __init__(self, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(x).flatten(1)
        return torch.cat([y.mean(1, keepdim=True), y.mean(1, keepdim=True) * 0 - 9], 1)


@pytest.mark.parametrize("call", [
    lambda x: x.clamp(0.5, 0.5), lambda x: torch.add(x, 1.0, alpha=2),
    lambda x: nn.functional.avg_pool2d(x.reshape(-1, 1, 8, 8), [2, 2])])
def test_calls_that_look_odd_have_bounds(call: Callable[[Any], Any]) -> None:
    assert qg.certify(Calls(call), [(X, Y)], qg.Threat(eps=0.05), progress=False).certified.all()


def test_a_window_of_padding_alone_is_refused() -> None:
    model = Calls(lambda x: nn.functional.max_pool2d(
        x[:, :1].reshape(-1, 1, 1, 1), 2, 2, padding=1, dilation=2))
    with pytest.raises(ConversionError):
        qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)


def test_inference_mode_around_certify_changes_nothing(tmp_path: Path) -> None:
    model = Averaging().eval()
    with torch.inference_mode():
        found = qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), method="crown",
                           progress=False)
    assert found.certified.all()


def test_one_class_alone_is_certain_and_stays_so_in_json(tmp_path: Path) -> None:
    model = nn.Linear(D, 1).eval()
    found = qg.certify(model, [(X, Y)], qg.Threat(eps=0.05), progress=False)
    found.save(tmp_path / "c.json")
    again = type(found).load(tmp_path / "c.json")
    assert (again.lower == found.lower).all() and again.certified.all()


def test_a_sequence_of_three_channels_is_normalised_by_channel() -> None:
    from quantguard.data.batches import from_pixels
    x, threat = torch.rand(2, 2, 5), qg.Threat(mean=(0.1, 0.9), std=(0.5, 0.25))
    wanted = (x - torch.tensor([[0.1], [0.9]])) / torch.tensor([[0.5], [0.25]])
    torch.testing.assert_close(from_pixels(x, threat), wanted)


def test_matrix_products_are_float32_whatever_torch_allows() -> None:
    from torch.backends import cuda, cudnn, mkldnn

    from quantguard.core.runtime import true_float32

    def now() -> list[Any]:
        return [cuda.matmul.allow_tf32, cudnn.allow_tf32,
                mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision]  # type: ignore[attr-defined]
    before, precision = now(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        loose = now()
        with true_float32():
            assert now() == [False, False, "ieee", "ieee"]
        assert now() == loose != [False, False, "ieee", "ieee"]
    finally:
        torch.set_float32_matmul_precision(precision)
    assert now()[:2] == before[:2]
