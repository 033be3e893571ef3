"""Short calls of every public function, for tests that vary their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foolbox.attacks import LinfFastGradientAttack
from torch import Tensor, nn

import quantguard as qg

THREAT = qg.Threat(eps=0.1)
FAST = qg.Recipe("pgd", steps=1, sharpness=(4.0,), lr=1e-3)
Batches = list[tuple[Tensor, Tensor]]


class Wrapped(nn.Module):
    """A model whose forward is a function of an inner net and the images."""

    def __init__(self, net: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.net, x)


def harden(model: nn.Module, loader: Any, **options: Any) -> nn.Module:
    return qg.harden(model, loader, THREAT, **{"recipe": FAST, "epochs": 1, "progress": False,
                                               **options})


def evaluate(model: nn.Module, loader: Any, suite: Any = None) -> qg.Evaluation:
    """Evaluate with few attacks: ours and one of Foolbox."""
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
