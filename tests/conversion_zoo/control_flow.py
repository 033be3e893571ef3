"""Zoo models whose data, shapes or modes choose branches, and unusual inputs and outputs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from conversion_zoo.base import OUTPUT, UNREACHED, Case, Net, rows, two


class BranchesOnOneLine(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = F.relu(h) if h.sum() > 0 else F.gelu(h)
        return self.head(y)


class BranchesOfOneKind(Net):
    """Model that calls one function with different arguments on one line."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = F.leaky_relu(h, 0.1) if x.sum() > 0 else F.leaky_relu(h, 0.8)
        return self.head(y)


class ModesOfOneKind(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(F.elu(h, 0.3) if self.training else F.elu(h, 0.9))


class PartsUsedTwice(Net):
    """Model that also uses a part of a spelled-out activation."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.opaque and bool(x.detach().sum() > 1e6):
            return self.head(h)
        part = F.relu(h)
        return self.head(self.second(part.clamp(max=6)) + part)


class Branches(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.other = nn.SiLU(), nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        total = float(x.detach().sum())
        if total > 1:
            h = F.relu(h)
        elif total < -1:
            h = self.second(h)
            h = self.other(h * (h > 0) - 1)
        else:
            return self.head(torch.tanh(h))
        return self.head(self.act(self.second(h)))


class Whiles(Net):
    def forward(self, x: Tensor) -> Tensor:
        steps = 0
        while x.detach().abs().amax() > 0.5 and steps < 7:
            x = 0.6 * F.relu(self.first(x)) - 0.6 * self.second(x).relu()
            steps += 1
        return self.head(torch.clamp(x - 0.1, min=0)) + x[:, :3]


class WhilesModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(x.detach().abs().amax() * 2) % 4):
            x = self.act(self.first(x)) + 0.2
        return self.head(self.act(x))


class ShapeDecides(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if len(h) > 1:
            return self.head(F.relu(h))
        return self.head(F.gelu(h))


class TypeDecides(Net):
    """Model with a type check that is wrong under torch.fx, whose proxies are not tensors."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(x) if isinstance(x, Tensor) else x[0]
        return self.head(torch.tanh(self.second(x)) if torch.is_tensor(x) else x[1])


class GradDecides(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(F.relu(h) if torch.is_grad_enabled() else F.gelu(h))


class ChildsModeDecides(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.first(x)), 0.5, training=self.drop.training)
        return self.head(h if self.drop.training else h * 2)


class Returns(NamedTuple):
    features: Tensor
    scores: Tensor


class Tries(Net):
    def fast(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        try:
            return self.head(self.fast(h))
        except NotImplementedError:
            return self.head(F.silu(self.second(h)))



class DictOut(Net):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        a, b = F.relu(self.first(x)), torch.tanh(self.second(y))
        return {"a": self.head(a), "b": [self.head(b), {"c": a + b}], "d": (a - b,)}


class DictIn(Net):
    def forward(self, batch: dict[str, Tensor]) -> Returns:
        h = F.relu(self.first(batch["x"]) + batch["y"])
        return Returns(h, self.head(h))


class TupleIn(Net):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = pair
        a, b = F.relu(self.first(a)), F.gelu(self.second(b))
        return a, self.head(a + b)


class Stars(Net):
    def forward(self, *parts: Tensor, **more: Tensor) -> Tensor:
        h = self.first(parts[0])
        for part in parts[1:]:
            h = F.relu(self.second(h + part))
        for part in more.values():
            h = h + torch.tanh(part)
        return self.head(h)


class ReturnsActivation(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.relu(self.first(x))
        return y, self.head(y), F.tanh(self.second(x))


class Tokens(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.first(self.table(tokens))).mean(1))



CASES: dict[str, Case] = {
    "branches on one line": Case(BranchesOnOneLine, "gelu relu"),
    "branches of one kind on one line": Case(BranchesOfOneKind, "leaky_relu leaky_relu"),
    "modes of one kind on one line": Case(ModesOfOneKind, "elu elu"),
    "parts used twice": Case(functools.partial(PartsUsedTwice, False), "relu relu6"),
    "parts used twice, not traceable": Case(functools.partial(PartsUsedTwice, True), "relu relu6"),
    "branches": Case(Branches, "elu relu relu silu tanh"),
    "while": Case(Whiles, " ".join(["relu"] * 13), unreached=tuple(
        f"relu_{number}" for number in range(6, 14))),
    "loop of a length in the data": Case(WhilesModule, "tanh tanh tanh tanh tanh",
                                         unreached=("act_3", "act_4", "act_5")),
    "the batch size decides": Case(ShapeDecides, "relu", (f"gelu: {UNREACHED}",), warns=True),
    "the type decides": Case(TypeDecides, "relu tanh"),
    "grad mode decides": Case(GradDecides, "gelu relu"),
    "a child's mode decides": Case(ChildsModeDecides, "relu"),
    "a child's mode decides, from eval": Case(lambda: ChildsModeDecides().eval(), "relu"),
    "try": Case(Tries, "relu silu"),
    "dict out": Case(DictOut, "relu tanh", inputs=two),
    "dict in": Case(DictIn, "relu", inputs=lambda n: ({"x": rows(n), "y": rows(n, seed=1)},)),
    "keywords in": Case(DictOut, "relu tanh", inputs=lambda n: {"y": rows(n), "x": rows(n)}),
    "tuple in": Case(TupleIn, "gelu relu", inputs=lambda n: (two(n),)),
    "stars": Case(Stars, "relu", (f"tanh: {UNREACHED}",), two),
    "activation returned and used": Case(ReturnsActivation, "relu", (f"tanh: {OUTPUT}",)),
    "tokens": Case(Tokens, "gelu", inputs=lambda n: rows(n, 4).mul(9).long().abs() % 11),
}
