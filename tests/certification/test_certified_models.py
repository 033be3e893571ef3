"""Models as people write them are certified: converted, intercepted, normalised, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounded_nets import (
    images,
    sound,
)
from torch import Tensor, nn

import quantguard as qg
from quantguard.certification.graph.graph import model_graph


class Writes(nn.Module):
    """A residual block whose ``+=`` changes a tensor that has a second name."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.conv, self.head, self.apart = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(50, 3), apart

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        other = x if not self.apart else x[:, :]
        x += self.conv(x)
        return self.head((x * 2 - other).relu_().flatten(1))


def test_every_reader_sees_a_write_in_place() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, apart = Writes(False), Writes(True)
    assert sound(model, images(4, 0), qg.Threat(eps=0.01))
    with pytest.raises(qg.ConversionError, match="writes over what is read again"):
        model_graph(apart, qg.Threat(), None, images(4, 0))
    own = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(50, 3))
    with pytest.raises(qg.ConversionError, match=r"0 \(ReLU\) writes over the input images"):
        model_graph(own, qg.Threat(), None, images(4, 0))
    assert sound(own.eval(), images(4, 0), qg.Threat(mean=(0.5,), std=(0.5,)))


def test_converted_models_are_certified_as_they_are(cnn: nn.Module, digits: Any) -> None:
    x, _ = digits
    for bits, dynamic, per_channel in ((2, True, False), (3, False, True), (1, False, False)):
        model = qg.convert(cnn, bits, dynamic=dynamic, per_channel=per_channel)
        assert sound(model, x[:8], qg.Threat(eps=1e-3), 16)
        with qg.bypass(model):
            assert sound(model, x[:8], qg.Threat(eps=1e-3), 4)


def test_converted_layers_of_torch_are_traced_through() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(4), nn.Conv2d(4, 3, 3), nn.PReLU(),
                              nn.Flatten(), nn.Linear(3, 3)).eval()
        linear = nn.Linear(3, 3).eval()
    x = images(8, 0)
    for per_channel in (False, True):
        converted = qg.convert(model, 3, data=[x], per_channel=per_channel)
        assert sound(converted, x, qg.Threat(eps=0.01))
        with torch.no_grad():
            y = converted(x).argmax(1)
        found = qg.certify(converted, [(x, y)], qg.Threat(eps=1e-4), progress=False)
        assert found.certified.any() and len(found.sites) == 2
        with qg.bypass(converted):
            assert sound(converted, x, qg.Threat(eps=0.01), 4)
    entered = qg.convert(linear, 32, input_bits=2, input_range=(0.0, 1.0),
                         example=images(2, 0, (3,)))
    assert sound(entered, images(8, 0, (3,)), qg.Threat(eps=0.01))


class Notes(nn.Module):
    """A forward that conversion cannot trace: its calls are intercepted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return self.head(F.relu(F.relu(self.conv(x)) - 0.1).flatten(1))


def test_intercepted_quantizers_are_certified() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = qg.convert(Notes().eval(), 2, example=images(2, 0))
    assert "by interception" in str(qg.inspect(Notes(), example=images(2, 0)))
    assert sound(model, images(4, 0), qg.Threat(eps=0.01))
    x = images(8, 0)
    with torch.no_grad():
        y = model(x).argmax(1)
    assert len(qg.certify(model, [(x, y)], qg.Threat(eps=0.01), progress=False).sites) == 2


def test_the_same_answer_under_a_normalisation(cnn: nn.Module, digits: Any) -> None:
    x, y = digits
    x, y = x[:40], y[:40]

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = cnn

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.model((images - 0.2) / 0.4)}
    threat = qg.Threat(eps=5e-4, mean=(0.2,), std=(0.4,))
    a = qg.certify(cnn, [((x - 0.2) / 0.4, y)], threat, progress=False)
    b = qg.certify(Pixels(), [{"images": x, "labels": y}], qg.Threat(eps=5e-4), progress=False)
    assert a.lower == pytest.approx(b.lower, abs=1e-3) and a.image_hash == b.image_hash
    assert (a.certified == b.certified).all()
