"""Small models of transformers, and images for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "intermediate_size": 37, "image_size": 32, "patch_size": 8}
PYRAMID: dict[str, Any] = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
RES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2],
                        "num_heads": [2, 2], "window_size": 2}


def vit(**settings: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = transformers.ViTForImageClassification(
            transformers.ViTConfig(**VIT | settings, num_labels=3))
    return model.eval()


def pixels(side: int | None) -> Tensor:
    return torch.rand(2, 3, side or 64, side or 64, generator=torch.Generator().manual_seed(1))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.conv2, self.head = nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv1(x)))
        return self.head(self.conv2(x).relu().mean((2, 3)))
