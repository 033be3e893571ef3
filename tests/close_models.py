"""Three models for closer tests: a ResNet, a vision transformer and torch's own encoder."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from architecture_families import RGB, TEN, VIT, Build, of_timm
from converted_pairs import Pair, images, worn
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from quantguard.conversion.converter import convert


class Transformer(nn.Module):
    """Classifier with torch's own encoder, which uses fused kernels where it can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x).flatten(2).mT).mean(1))


class Close(NamedTuple):
    """A model with the names of a container, a leaf and two modules of equal shape."""

    build: Build
    container: str
    leaf: str
    tied: tuple[str, str]
    activation: str


CLOSE = {
    "resnet": Close(partial(models.ResNet, BasicBlock, [1, 1, 1, 1], **TEN), "layer1.0",
                    "layer1.0.conv1", ("layer1.0.conv1", "layer1.0.conv2"), "layer2.0.relu"),
    "vit": Close(of_timm("vit_tiny_patch16_224", attn_drop_rate=0.1, **VIT), "blocks.0",
                 "blocks.0.mlp.fc1", ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1"), "blocks.1.mlp.act"),
    "encoder": Close(Transformer, "encoder.layers.0", "encoder.layers.0.linear1",
                     ("encoder.layers.0.linear1", "encoder.layers.1.linear1"),
                     "encoder.layers.1.activation"),
}
over_close = pytest.mark.parametrize("close", CLOSE.values(), ids=CLOSE)


def make_close(close: Close, prepare: Callable[[nn.Module], Any] = lambda model: None) -> Pair:
    """Return the pair of a model that was changed before it was converted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = worn(close.build(), RGB).eval()
    prepare(model)
    return Pair(model, convert(model, bits=2, example=images(RGB, 1)), RGB)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    clone = torch.load(file, weights_only=False)
    assert isinstance(clone, nn.Module)
    return clone


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model, "deepcopy": copy.deepcopy,
    "copy of a loaded one": lambda model: copy.deepcopy(reloaded(model))}


def copies(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model and its copies and reloaded copies."""
    yield from (how(model) for how in COPIES.values())
