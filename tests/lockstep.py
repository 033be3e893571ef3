"""Comparison of two runs of a quantized model that differ by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from converted_pairs import tensors
from torch import Tensor, nn

from quantguard.nn.contexts import listening
from quantguard.nn.quant_activation import quantizers


class Lockstep:
    """Record of all quantizer calls in one run, for comparison with another run.

    Two equal runs differ by rounding, because kernels depend on the batch size. Next to a
    threshold, rounding changes a whole level, and later layers amplify this. If the second run
    continues with the first run's levels, it must differ by rounding alone.
    """

    def __init__(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        self.model = model
        self.calls: list[tuple[str, Tensor | None, Tensor]] = []
        with self._recording(lambda name, z, y: self.calls.append((name, z, y.clone()))):
            self.output = tensors(forward())

    @contextmanager
    def _recording(self, see: Callable[[str, Tensor | None, Tensor], None]) -> Iterator[None]:
        quantized: dict[str, Tensor] = {}
        modules = quantizers(self.model)
        handles = [module.register_forward_hook(
            lambda module, args, y, name=name: see(name, quantized.pop(name, None), y))
            for name, module in modules.items()]
        try:
            with listening(self.model, {
                    name: lambda z, name=name: quantized.update({name: z.detach().clone()})
                    for name in modules}):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def assert_close(self, forward: Callable[[], Any]) -> None:
        """Check a run on the first images of the first run."""
        rest, modules = iter(self.calls), quantizers(self.model)

        def compare(name: str, z: Tensor | None, y: Tensor) -> None:
            before, wanted, levels = next(rest)
            assert name == before
            levels = levels[: len(y)]
            if z is not None:
                assert wanted is not None
                wanted = wanted[: len(z)]
                near = 1e-4 * float(wanted.abs().max())
                torch.testing.assert_close(z, wanted, rtol=0, atol=near)
                margin = (wanted.unsqueeze(-1) - modules[name].thresholds).abs().amin(-1)
                assert bool((margin[y != levels] <= near).all()), name
            y.detach().copy_(levels)

        with self._recording(compare):
            output = tensors(forward())
        assert next(rest, None) is None
        for a, b in zip(output, self.output, strict=True):
            torch.testing.assert_close(a, b[: len(a)], rtol=1e-3, atol=1e-3)
