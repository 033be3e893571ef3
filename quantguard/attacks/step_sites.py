"""Search for the elementwise step functions in a model, however they are written.

Other people's quantizers may be a Function with any backward, ``torch.fake_quantize``, a lookup
table, numpy, or a dozen comparisons. All compute the same kind of function: from a tensor z with a
gradient, a tensor y of the same shape that takes few values, each on an interval of z. So the
search looks at tensors, not at operations: at a sample of the values of every tensor that a torch
function takes or returns. An argument where y is read by something that is not part of the
quantizer (a layer, an addition, a pool) is a *reader*; z, y and its readers are a *site*.

:func:`find_sites` then tests that y depends on z element by element: it runs the forward again with
other values in place of z, and compares. The same runs narrow down the thresholds. During an
attack, readers get the softened steps of z instead of y
(:class:`quantguard.attacks.site_softener.SiteSoftener`).

A site is identified by the numbers of its calls, so a forward has to make the same calls each time:
where a call has another name, the site is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .numbered_calls import Place, functions_hidden
from .step_candidates import Candidate, SourceReplacer
from .step_functions import Steps
from .step_recorder import Recorder

# Forwards with other values in place of sources, at most.
_FORWARDS = 6


class Site(NamedTuple):
    """Elementwise quantizer in a forward.

    Attributes:
        source: place of its input z.
        readers: arguments that are its output y.
        steps: y as a function of z.
    """

    source: Place
    readers: tuple[Place, ...]
    steps: Steps


def find_sites(model: nn.Module, pixels: Tensor, begin: nn.Module) -> tuple[Site, ...]:
    """Return every elementwise step function in a forward.

    Args:
        model: run with a gradient on ``pixels``; quantguard's own quantizers should be softened.
        pixels: (N, ...) images whose values are not on a grid; more images resolve the thresholds
            of channels better.
        begin: the submodule whose forward starts the numbers of calls.
    """
    constants = {id(t) for t in (*model.parameters(), *model.buffers())}
    x = pixels.detach().clone().requires_grad_()
    with torch.enable_grad():
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        recorder = Recorder(constants, anchor)
        try:
            with recorder.counting_from(begin), functions_hidden(recorder), recorder:
                model(x)
        except Exception:  # the forward does not run under a function mode
            return ()
        found = [Candidate(*output) for output in recorder.found()]
        del recorder
        return tuple(_tested(model, pixels, begin, found))


def _tested(model: nn.Module, pixels: Tensor, begin: nn.Module,
            candidates: Sequence[Candidate]) -> Iterator[Site]:
    """Yield the candidates that turn out to be step functions of their source."""
    generator = torch.Generator().manual_seed(0)
    values = {c: c.initial_values(generator) for c in candidates}
    for _ in range(_FORWARDS):
        if not values:
            break
        # Candidates may share a source: the first chooses its values, the others the next time.
        chosen: dict[Place, Candidate] = {}
        for c in values:
            chosen.setdefault(c.source, c)
        sharing = [c for c in values if chosen[c.source] is not c]
        # Clones: the forward may write to its tensors, or use them as leaves.
        replacer = SourceReplacer({c.source: values[c].clone() for c in chosen.values()},
                                  {c.readers[0] for c in candidates})
        x = pixels.detach().clone().requires_grad_()
        try:
            with replacer.counting_from(begin), functions_hidden(replacer), replacer:
                model(x)
        except Exception:  # the forward refuses these values: use the samples so far
            break
        following: dict[Candidate, Tensor] = {c: values[chosen[c.source]] for c in sharing}
        for c in (*chosen.values(), *sharing):
            y = replacer.read.get(c.readers[0])
            if y is None or y.shape != c.shape:
                c.axes = []
                continue
            c.add(values[chosen[c.source]], y)
            narrowing = c.narrowing_values(generator) if c.axes else None
            if narrowing is not None:
                following[c] = narrowing
            else:
                following.pop(c, None)
        values = following
    for c in candidates:
        steps = c.fit() if c.z else None
        if steps is not None:
            yield Site(c.source, c.readers, steps)
