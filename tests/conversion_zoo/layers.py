"""Zoo models with attention, recurrent cells and gates."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import CELL, PERHAPS, SOFTMAX, Case, Net, image, sequence, two


class Attention(Net):
    def forward(self, x: Tensor) -> Tensor:
        q, k = self.first(x), self.second(x)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(6)).softmax(-1)
        x = F.scaled_dot_product_attention(F.elu(q) + 1, F.elu(k) + 1, F.relu(scores @ x))
        return self.head(F.softmax(x, -1))


class HeadsAttend(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x)
        return self.head(F.gelu(self.first(y))) + weights.sum()


class Encoder(nn.Module):
    def __init__(self, activation: Any, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, 0.1, activation, batch_first=True,
                                           norm_first=norm_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(6, 2, 8, activation="gelu", batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.decoder(F.relu(x), memory))


class WholeTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Transformer(6, 2, 1, 1, 8, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.whole(x, y))


class Recurrent(Net):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.rnn(torch.tanh(x))[0]))


class Cells(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(6, 6), nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.lstm(x[:, 0])
        for step in range(1, 3):
            h, c = self.lstm(F.relu(x[:, step]), (h, c))
        return self.head(self.gru(c, torch.tanh(h)))


class OwnCell(Net):
    """Recurrent cell in plain code: its gates stay float, its tanh does not."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            gate = torch.sigmoid(self.first(step) + self.second(h))
            h = gate * h + (1 - gate) * torch.tanh(self.second(step))
        return self.head(h)


class SqueezeExcite(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(True)
        self.down, self.up, self.gate = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), gate
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        share = self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head((x * share).mean((2, 3)))


class OwnGate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


class GatedUnits(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.glu = nn.Linear(6, 12), nn.GLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(self.glu(self.wide(x))).chunk(2, -1)
        x = F.glu(self.wide(a * F.gelu(b))) + torch.tanh(a) * torch.sigmoid(b)
        return self.head(x)



def padded(batch: int) -> dict[str, Tensor]:
    mask = torch.zeros(batch, 4, dtype=torch.bool)
    mask[0, 3:] = True
    return {"x": sequence(batch), "mask": mask}


CASES: dict[str, Case] = {
    "attention": Case(Attention, "elu elu relu", (
        SOFTMAX, "softmax: attention softmax", "softmax: attention softmax"), sequence),
    "MultiheadAttention": Case(HeadsAttend, "gelu", (SOFTMAX,), sequence),
    "encoder, relu": Case(functools.partial(Encoder, "relu", False), "relu relu", (SOFTMAX,) * 2,
                          sequence, fused=True),
    "encoder, gelu, padded": Case(functools.partial(Encoder, "gelu", False), "gelu gelu",
                                  (SOFTMAX,) * 2, padded, fused=True),
    "encoder, function, norm first": Case(functools.partial(Encoder, F.gelu, True), "gelu gelu",
                                          (SOFTMAX,) * 2, sequence, fused=True),
    "encoder, module, norm first, padded": Case(lambda: Encoder(nn.SiLU(), True), "silu silu",
                                                (SOFTMAX,) * 2, padded, fused=True),
    "encoder, relu module": Case(lambda: Encoder(nn.ReLU(), False), "relu relu", (SOFTMAX,) * 2,
                                 sequence, fused=True),
    "encoder, unusual function": Case(functools.partial(Encoder, F.silu, False), "silu silu",
                                      (SOFTMAX,) * 2, sequence, fused=True),
    "decoder": Case(Decoder, "gelu relu", (SOFTMAX,) * 2, lambda n: two(n, 4, 6), fused=True),
    "transformer": Case(WholeTransformer, "relu relu", (SOFTMAX,) * 3, lambda n: two(n, 4, 6),
                        fused=True),
    "LSTM": Case(lambda: Recurrent(nn.LSTM(6, 6, batch_first=True)), "relu tanh", (CELL,),
                 sequence),
    "GRU": Case(lambda: Recurrent(nn.GRU(6, 6, 2, batch_first=True)), "relu tanh", (CELL,),
                sequence),
    "cells": Case(Cells, "relu relu tanh", (CELL, CELL), sequence),
    "own cell": Case(OwnCell, "tanh tanh tanh tanh", ("sigmoid: gate",) * 4, sequence),
    "squeeze and excite": Case(lambda: SqueezeExcite(nn.Sigmoid()), "relu silu",
                               ("sigmoid: gate",), image),
    "squeeze and excite, own gate": Case(lambda: SqueezeExcite(OwnGate()), "relu silu",
                                         (f"hardsigmoid: {PERHAPS}",), image),
    "squeeze and excite, gate converted": Case(
        lambda: SqueezeExcite(nn.Hardsigmoid()), "hardsigmoid relu silu", (), image,
        {"gates": True}),
    "gated units": Case(GatedUnits, "gelu tanh", ("glu: gate", "glu: gate", "sigmoid: gate")),
}
