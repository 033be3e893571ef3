"""Bounds hold through random programs of constants, views, writes in place and repeated reads.

A program works on a pool of tensors (N, 8), some of which are views of others. Either it is refused
by name, or all values stay within their bounds.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bounded_nets import images, quantizer, sound
from torch import nn

import quantguard as qg

SCALE, OFFSETS = 1.25, (0.3, -0.2)
STEPS = ("linear", "linear", "quantize", "number", "made", "buffer", "alpha", "cached", "counted",
         "relu_", "mul_", "add_", "iadd", "write", "out", "window", "chunk", "rows", "flip", "cat",
         "clamp", "same")


class Program(nn.Module):
    """Run random steps, each on random members of the pool."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.quantizers = nn.ModuleList(quantizer(bits, g, function=nn.ReLU()) for bits in (1, 2))
        self.head, self.cache, self.calls = nn.Linear(8, 3), {}, 0
        self.register_buffer("weights", torch.rand(8, generator=g) + 0.5)
        names = STEPS if rng.random() < 0.1 else [s for s in STEPS if s != "counted"]
        self.steps = [(rng.choice(names), rng.random(), rng.random(), rng.randrange(2, 99))
                      for _ in range(rng.randrange(2, 8))]
        with torch.no_grad():
            for p in (*self.linears.parameters(), *self.head.parameters()):
                p.copy_(torch.randn(p.shape, generator=g) * (0.5 if p.dim() > 1 else 0.2))

    def forward(self, x: Any) -> Any:
        pool = [self.linears[0](x.flatten(1))]
        for name, first, second, k in self.steps:
            a = pool[int(first * len(pool))]
            b = pool[int(second * len(pool))]
            made = self.step(name, a, b, k)
            if made is not None:
                pool.append(made)
        total = pool[0] * 1
        for value in pool[1:]:
            total = total + value
        return self.head(total)

    def step(self, name: str, a: Any, b: Any, k: int) -> Any:
        number = k / 50 - 0.6
        if name == "linear":
            return self.linears[k % 3](a)
        if name == "quantize":
            return self.quantizers[k % 2](a)
        if name == "number":
            return a * number + OFFSETS[k % 2]
        if name == "made":
            return a * (torch.ones(8) * number) - torch.full((1, 8), SCALE)
        if name == "buffer":
            return a * self.weights[None] + b
        if name == "alpha":
            return torch.add(a, b, alpha=number)
        if name == "cached":
            if k not in self.cache:
                self.cache[k] = torch.linspace(-1, 1, 8) * k / 50
            return a + self.cache[k]
        if name == "counted":
            self.calls += 1
            return a * (1 if self.calls < 40 else -1)
        if name == "clamp":
            return a.clamp(-abs(number), 1.0)
        if name == "same":
            return a
        if name == "window":
            return torch.cat([a[:, :4], b[:, 4:]], 1)
        if name == "chunk":
            return torch.cat([a.chunk(2, 1)[1], b.chunk(2, 1)[0]], 1)
        if name == "rows":
            return a.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        if name == "flip":
            return F.relu(a, inplace=k % 2 == 0) - b
        if name == "cat":
            return F.avg_pool1d(torch.cat([a, b], 1).unsqueeze(1), 2).squeeze(1)
        return self.write(name, a, b, k, number)

    def write(self, name: str, a: Any, b: Any, k: int, number: float) -> Any:
        part = a.narrow(1, k % 4, 4) if k % 5 == 0 else a[:, :4] if k % 5 == 1 else a
        if name == "relu_":
            return part.relu_() if part is a else None if part.relu_() is None else a
        if name == "mul_":
            part.mul_(number)
        elif name == "add_":
            part.add_(b if part is a else b[:, :4], alpha=2)
        elif name == "iadd":
            a += b
        elif name == "write":
            a[:, k % 8] = number
        elif name == "out":
            torch.mul(a, number, out=a)
        return a


def checked(seed: int) -> str:
    """Return "holds" if the bounds of a program hold, or why it was refused."""
    x = images(3, seed, (2, 2, 2))
    norm = "linf" if seed % 3 else "l2"
    try:
        sound(Program(seed).eval(), x, qg.Threat(norm, (0.0, 0.01, 0.2)[seed % 3]), 60, seed)
    except qg.ConversionError as error:
        return str(error).splitlines()[0].split(" at ")[0]
    return "holds"


def _all(seeds: range) -> Counter[str]:
    found = Counter(checked(seed) for seed in seeds)
    assert found["holds"] > len(seeds) / 3, found  # most others write over tensors
    return found


def test_values_in_random_programs_stay_within_bounds() -> None:
    _all(range(100))


@pytest.mark.slow
def test_values_in_a_thousand_random_programs_stay_within_bounds() -> None:
    _all(range(1000, 2000))


def test_a_program_that_counts_is_refused() -> None:
    counts = [seed for seed in range(2000)
              if any(name == "counted" for name, *_ in Program(seed).steps)][:10]
    assert len(counts) == 10
    for seed in counts:
        assert checked(seed) != "holds"
