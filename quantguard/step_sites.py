"""Where a model goes through elementwise step functions, whoever wrote them and however.

A quantizer of somebody else's may be a Function with any backward, ``torch.fake_quantize``, a table
that is looked up, numpy, or a dozen comparisons. What it computes is always this: from a tensor z
with a gradient a tensor y of the same shape that takes few values, each on an interval of z. So
tensors are looked at, not operations: every one that a torch function is given or returns, by a
sample of its numbers. Where y is read by what is no part of the quantizer any more (a layer, an
addition, a pool), it is a *site*: z, y, the reader.

That y follows from z, element by element, is then tested: the forward runs again with other
numbers in z's place, and y must follow (:func:`find_sites`). The same runs narrow the thresholds
down. While an attack runs, readers get the softened steps of z instead of y (:class:`SiteReader`).

A site is known by the number of its call in a forward, so that a forward has to make the same
calls each time: where one has another name, the site is left alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import step_fit
from .step_fit import Samples, Steps

# Numbers of a tensor that are looked at while recording, and while fitting.
_GLANCE, _SAMPLE = 8192, 65536
# So many values in a glance's first numbers are no grid.
_FIRST, _TOO_MANY = 1024, 400
# Forwards with other numbers in z's place, at most, and how narrow a bracket needs to be, of z's
# range.
_ROUNDS, _NARROW = 6, 1e-5
# Where calls before a forward are numbered from.
_BEFORE = -1_000_000
# An attribute is no call: whoever watches asks for some, too.
_ATTRIBUTES = ("__get__", "__set__")
# Numbers that tell whether a tensor has been written to.
_ANEW = 256
# Smaller tensors say nothing of a step.
_LEAST = 32


def foreign_function(cls: Any) -> bool:
    """Return whether a Function is neither torch's nor ours."""
    return cls.__module__.split(".")[0] not in ("quantguard", "torch")


@contextmanager
def functions_hidden(calls: _Calls) -> Iterator[None]:
    """Make a call of each foreign Function, and hide what it calls in turn, as attacks do.

    torch has no hook for the calls of a custom Function: while the context lasts, its ``apply`` is
    replaced.
    """
    function: Any = torch.autograd.Function
    before = function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        plain = before.__get__(None, cls)
        if not foreign_function(cls) or calls.hidden:
            return plain(*args, **kwargs)
        return calls.applied(cls, plain, args, kwargs)
    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = before


class Place(NamedTuple):
    """A tensor in a forward: of which call, by number and name, and which of its results or args.

    Attributes:
        call: number of the call, from 0.
        name: of the function.
        result: whether it is a result, else an argument.
        at: which, of all leaves.
    """

    call: int
    name: str
    result: bool
    at: int


class Site(NamedTuple):
    """A quantizer in a forward.

    Attributes:
        source: z.
        readers: arguments that are y.
        steps: y as a function of z.
    """

    source: Place
    readers: tuple[Place, ...]
    steps: Steps


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


class _Calls(TorchFunctionMode):
    """Numbers the calls of a forward, and lets arguments and results be looked at or replaced.

    Attributes:
        number: of the next call.
        hidden: whether calls are passed on unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.number, self.hidden = _BEFORE, False

    def restart(self, *_: Any) -> None:
        """Begin a forward."""
        self.number = 0

    @contextmanager
    def begun_by(self, model: nn.Module) -> Iterator[None]:
        """Begin whenever model is called, inside the context."""
        hook = model.register_forward_pre_hook(self.restart)
        try:
            yield
        finally:
            hook.remove()

    def applied(self, cls: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a Function's ``apply``, whose own calls are hidden."""
        def named(*args: Any, **kwargs: Any) -> Any:
            return apply(*args, **kwargs)
        named.__name__ = f"{cls.__name__}.apply"
        self.hidden = True
        try:
            return self.called(named, args, kwargs)
        finally:
            self.hidden = False

    @abstractmethod
    def wanted(self, number: int) -> bool:
        """Return whether a call's arguments and results are of interest."""

    def given(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        """Return the leaves of a call's arguments, or others in their place."""
        return leaves

    def returned(self, number: int, name: str, result: Any) -> Any:
        """Return a call's result, or another in its place."""
        return result

    def run(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry the call out."""
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.hidden or _name(func) in _ATTRIBUTES:
            return func(*args, **kwargs)
        other = next((t for t in types if not issubclass(t, Tensor)), None)
        if other is not None:
            # no tensor, but a wrapper of some: what it calls in turn is to be seen
            with self:
                return other.__torch_function__(func, types, args, kwargs)
        return self.called(func, args, kwargs)

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Number a call, and carry it out."""
        number = self.number
        self.number += 1
        if not self.wanted(number):
            return self.run(number, func, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        given = self.given(number, _name(func), list(leaves))
        if any(a is not b for a, b in zip(leaves, given, strict=True)):
            args, kwargs = tree_unflatten(given, spec)
        result = self.run(number, func, args, kwargs)
        return self.returned(number, _name(func), result)


class _Link(torch.autograd.Function):
    """y as it is, with a gradient, so that what follows has one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, torch.zeros((), device=grads[0].device)


class _Seen:
    """A tensor that was met.

    Attributes:
        place: where first.
        shape: its shape.
        glance: (G,) float64, some of its numbers, always at the same places of a shape.
        few: whether it takes few values over and over.
        smooth: whether it may be a source: many values, and a gradient.
        source: what it is a step function of.
        after: channel by channel, it is a step of nothing before this call.
        readers: arguments that are it, where it ends.
    """

    def __init__(self, place: Place, tensor: Tensor) -> None:
        self.place, self.shape, self.floating = place, tensor.shape, tensor.is_floating_point()
        self.own: Tensor | None = None  # its numbers, of what may be a source
        self.glance: Tensor | None = None
        self.few = self.smooth = False
        self.source: _Seen | None = None
        self.per_tensor = False
        self.after = 0
        self.readers: list[Place] = []


def _places(shape: torch.Size, count: int) -> Tensor:
    """Return which numbers of a tensor of a shape are looked at, (count,) or fewer, ascending."""
    numel = math.prod(shape)
    if numel <= count:
        return torch.arange(numel)
    generator = torch.Generator().manual_seed(numel)
    return torch.randint(numel, (count,), generator=generator).sort().values


def _channels(shape: torch.Size, places: Tensor, axis: int | None) -> Tensor:
    """Return the channel of each of the numbers."""
    if axis is None:
        return torch.zeros_like(places)
    behind = math.prod(shape[axis % len(shape) + 1:])
    return places // behind % shape[axis]


def _axes(shape: torch.Size) -> list[int | None]:
    """Return along which axes channels may lie, none at all first."""
    return [None, 1, -1] if len(shape) == 3 else [None, 1] if len(shape) > 1 else [None]


class _Recorder(_Calls):
    """Notes every tensor of a forward, and which are steps of which.

    Args:
        constants: ids of what no image changes: parameters and buffers.
        anchor: a number with a gradient.
    """

    def __init__(self, constants: set[int], anchor: Tensor) -> None:
        super().__init__()
        self._constants, self._anchor = constants, anchor
        # by id, with the tensor itself, whose id nobody else gets then
        self._seen: dict[int, tuple[Tensor, _Seen]] = {}
        self._smooth: dict[torch.Size, list[_Seen]] = {}
        self._read: list[tuple[_Seen, Place]] = []
        self._after = 0
        self._memory: set[int] = set()
        self._generator = torch.Generator().manual_seed(1)
        self._ends: list[_Seen] = []

    def found(self) -> Iterator[tuple[_Seen, list[Place]]]:
        """Yield each tensor that is steps of another, and its readers.

        ``y + (q - y).detach()`` reads q, and is q: what is read on the way to a later tensor of the
        same source is no end.
        """
        for seen in self._ends:
            last = max(s.place.call for s in self._ends
                       if s.source is seen.source and s.per_tensor >= seen.per_tensor)
            readers = [place for place in seen.readers
                       if place.call > last or seen.place.call == last]
            if readers and seen.source is not None:
                yield seen, readers

    def wanted(self, number: int) -> bool:
        return number >= 0

    def given(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        self._read, self._after = [], 0
        self._memory = {leaf.untyped_storage().data_ptr() for leaf in leaves
                        if type(leaf) in (Tensor, nn.Parameter)
                        and leaf.layout is torch.strided and not leaf.is_meta}
        for at, leaf in enumerate(leaves):
            seen = self._see(leaf, Place(number, name, False, at))
            if seen is None:
                continue
            self._after = max(self._after, seen.after)
            if seen.source is None:
                continue
            self._read.append((seen, Place(number, name, False, at)))
            if leaf.is_floating_point() and not leaf.requires_grad and torch.is_grad_enabled() \
                    and not (name.endswith("_") and at == 0):
                leaves[at] = linked = _Link.apply(leaf, self._anchor)
                self._seen[id(linked)] = linked, seen
        return leaves

    def returned(self, number: int, name: str, result: Any) -> Any:
        read, after = self._read, self._after
        found = [(leaf, self._see(leaf, Place(number, name, True, at), after))
                 for at, leaf in enumerate(tree_leaves(result)) if isinstance(leaf, Tensor)]
        floating = any(leaf.is_floating_point() for leaf, _ in found)
        for seen, place in read:
            if not floating or not seen.floating:
                continue
            goes_on = any(
                s is not None and s.source is not None and s.shape == seen.shape
                and s.per_tensor >= seen.per_tensor for _, s in found)
            if goes_on:
                continue
            if not seen.readers:
                self._ends.append(seen)
            seen.readers.append(place)
            for _, s in found if seen.per_tensor else ():
                # a step of each channel, as a BatchNorm makes of it, is one that is known already
                if s is not None and s is not seen and not s.per_tensor:
                    s.after, s.source = max(s.after, number), None
        if isinstance(result, Tensor) and found and not name.endswith("_"):
            whole = found[0][1]
            if whole is not None and whole.few and whole.source is None and result.requires_grad \
                    and result.is_floating_point() and not self._shares(result):
                return self._dithered(result, whole)
        return result

    def _shares(self, result: Tensor) -> bool:
        """Return whether a result lies in the memory of an argument."""
        return result.untyped_storage().data_ptr() in self._memory

    def _dithered(self, result: Tensor, seen: _Seen) -> Tensor:
        """Return a sum of products off its grid.

        Quantized weights put it on one, of which anything that follows would be a step function.
        """
        assert seen.glance is not None
        values = seen.glance.sort().values
        gaps = values[1:] - values[:-1]
        gaps = gaps[gaps > step_fit.SAME_LEVEL * (values[-1] - values[0])]
        noise = torch.rand(result.shape, generator=self._generator, dtype=torch.float64) - 0.5
        off = result + (noise * float(gaps.median())).to(result)
        self._see(off, seen.place, seen.after)
        return off

    def _see(self, value: Any, place: Place, after: int = 0) -> _Seen | None:
        if type(value) not in (Tensor, nn.Parameter) or id(value) in self._constants \
                or value.is_meta or value.numel() < _LEAST or not value.dim() \
                or value.layout is not torch.strided or value.is_complex() or value.is_quantized:
            return None
        known = self._seen.get(id(value))
        with torch.no_grad():
            where = _places(value.shape, _GLANCE).to(value.device)
            numbers = value.detach().reshape(-1)
            # its version does not tell what was written to its .data
            if known is not None and known[0] is value and (known[1].glance is None or torch.equal(
                    numbers[where[:_ANEW]].double().cpu(), known[1].glance[:_ANEW])):
                return known[1]
            glance = numbers[where].double().cpu()
        seen = _Seen(place, value)
        self._seen[id(value)] = value, seen
        seen.after = after
        if not bool(glance.isfinite().all()):
            return seen
        seen.glance = glance
        seen.few = self._few(seen)
        if not seen.few:
            seen.smooth = value.requires_grad and value.is_floating_point()
            if seen.smooth:
                seen.own = value.detach().clone()
                self._smooth.setdefault(value.shape, []).append(seen)
        else:
            self._find_source(seen)
        return seen

    def _few(self, seen: _Seen) -> bool:
        assert seen.glance is not None
        glance, where = seen.glance, _places(seen.shape, _GLANCE)
        axes = _axes(seen.shape)
        if len(torch.unique(glance[:_FIRST])) > _TOO_MANY:
            axes = axes[1:]  # as a whole it takes too many; a channel may take few
        return any(step_fit.has_few_levels(glance, _channels(seen.shape, where, axis))
                   for axis in axes)

    def _find_source(self, seen: _Seen) -> None:
        """Find the first tensor of which this one is a step function."""
        where = _places(seen.shape, _GLANCE)
        for axis in _axes(seen.shape):
            channel = _channels(seen.shape, where, axis)
            for other in self._smooth.get(seen.shape, ()):
                if axis is not None and other.place.call < seen.after:
                    continue
                assert other.glance is not None and seen.glance is not None
                if step_fit.is_step_function(Samples(other.glance, seen.glance, channel)):
                    seen.source, seen.per_tensor = other, axis is None
                    return


class _Prober(_Calls):
    """Puts other numbers in the place of each source, and notes what readers get.

    Args:
        sources: numbers (of the source's shape) by place.
        readers: of whom to note what they get.
    """

    def __init__(self, sources: dict[Place, Tensor], readers: set[Place]) -> None:
        super().__init__()
        self._sources, self._readers = sources, readers
        self._calls = {place.call for place in (*sources, *readers)}
        self._instead: dict[int, tuple[Tensor, Tensor]] = {}
        self.read: dict[Place, Tensor] = {}

    def wanted(self, number: int) -> bool:
        return number >= 0 and (number in self._calls or bool(self._instead))

    def given(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        for at, leaf in enumerate(leaves):
            place = Place(number, name, False, at)
            if place in self._sources and isinstance(leaf, Tensor):
                self._replace(leaf, self._sources[place])
            if isinstance(leaf, Tensor) and id(leaf) in self._instead:
                leaf = leaves[at] = self._instead[id(leaf)][1]
            if place in self._readers and isinstance(leaf, Tensor):
                self.read[place] = leaf.detach().clone()
        return leaves

    def returned(self, number: int, name: str, result: Any) -> Any:
        for at, leaf in enumerate(tree_leaves(result)):
            place = Place(number, name, True, at)
            if place in self._sources and isinstance(leaf, Tensor):
                self._replace(leaf, self._sources[place])
        return result

    def _replace(self, tensor: Tensor, numbers: Tensor) -> None:
        if tensor.shape == numbers.shape:
            # no leaf of autograd's: it may be written to
            probe = numbers.to(tensor.dtype).requires_grad_().clone()
            self._instead[id(tensor)] = tensor, probe


class _Candidate:
    """What is known of a site while it is probed: pairs of z and y."""

    def __init__(self, seen: _Seen, readers: Sequence[Place]) -> None:
        assert seen.source is not None
        self.source, self.readers = seen.source.place, tuple(readers)
        self.shape = seen.shape
        assert seen.source.own is not None
        self.own = seen.source.own
        self.where = _places(self.shape, _SAMPLE)
        self.z: list[Tensor] = []
        self.y: list[Tensor] = []
        self.axes = _axes(self.shape)
        rows = self._rows(self.own)
        self.low, self.high = rows.amin(1).double(), rows.amax(1).double()

    def _rows(self, values: Tensor) -> Tensor:
        """Return (C, values of a channel)."""
        return values.transpose(0, 1).flatten(1) if values.dim() > 1 else values.reshape(1, -1)

    def samples(self, axis: int | None) -> Samples:
        channel = _channels(self.shape, self.where, axis).repeat(len(self.z))
        return Samples(torch.cat(self.z), torch.cat(self.y), channel)

    def note(self, z: Tensor, y: Tensor) -> None:
        where = self.where.to(y.device)
        self.z.append(z.reshape(-1)[where].double().cpu())
        self.y.append(y.detach().reshape(-1)[where].double().cpu())
        # an axis along which it is no step function is none later on either
        self.axes = [axis for axis in self.axes if step_fit.is_step_function(self.samples(axis))]

    def first(self, generator: torch.Generator) -> Tensor:
        """Return numbers for z: half are its own in another order, the others even over a range."""
        own = self.own.cpu()
        rows = self._rows(own)
        order = torch.rand(rows.shape, generator=generator).argsort(1)
        mixed = rows.gather(1, order)
        return self._shaped(torch.where(
            torch.rand(rows.shape, generator=generator) < 0.5, mixed.double(),
            self._even(rows.shape, generator)))

    def _even(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        low, high = self.low.cpu(), self.high.cpu()
        reach = 0.25 * (high - low)
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (low - reach).unsqueeze(1) + share * (high - low + 2 * reach).unsqueeze(1)

    def _shaped(self, rows: Tensor) -> Tensor:
        if len(self.shape) < 2:
            values = rows.reshape(self.shape)
        else:
            images, channels, *rest = self.shape
            values = rows.reshape(channels, images, *rest).transpose(0, 1)
        return values.contiguous().to(self.own).detach()

    def narrower(self, generator: torch.Generator) -> Tensor | None:
        """Return numbers between those beside each jump, or None where that is near enough."""
        axis = self.axes[0]
        low, high, channel = step_fit.brackets(self.samples(axis))
        span = float((self.high - self.low).max())
        if not len(low) or bool((high - low <= _NARROW * span).all()):
            return None
        every = _channels(self.shape, torch.arange(math.prod(self.shape)), axis)
        counts = torch.bincount(channel, minlength=int(every.max()) + 1)
        starts = counts.cumsum(0) - counts
        pick = (torch.rand(every.shape, generator=generator) * counts[every]).long()
        at = (starts[every] + pick).clamp_max(len(low) - 1)
        share = torch.rand(every.shape, generator=generator, dtype=torch.float64)
        inside = (low[at] + share * (high[at] - low[at])).reshape(self.shape)
        rows = self._rows(inside)
        even = self._even(rows.shape, generator)
        # some look for jumps that were missed; channels without one have no brackets
        lost = (torch.rand(rows.shape, generator=generator) < 0.15) | self._rows(
            (counts[every] == 0).reshape(self.shape))
        return self._shaped(torch.where(lost, even, rows))

    def fitted(self) -> Steps | None:
        if not self.axes:
            return None
        axis = self.axes[0]
        return step_fit.fit(self.samples(axis), 1 if axis is None else self.shape[axis], axis)


def find_sites(model: nn.Module, pixels: Tensor, begin: nn.Module) -> tuple[Site, ...]:
    """Return every elementwise step function that a forward goes through.

    Args:
        model: run with a gradient on ``pixels``; its own quantizers of quantguard should be
            softened.
        begin: the part of it whose call the numbers of calls begin with.
        pixels: (N, ...) images, not on a grid themselves; more of them tell thresholds of
            channels more finely.
    """
    constants = {id(t) for t in (*model.parameters(), *model.buffers())}
    x = pixels.detach().clone().requires_grad_()
    with torch.enable_grad():
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        recorder = _Recorder(constants, anchor)
        try:
            with recorder.begun_by(begin), functions_hidden(recorder), recorder:
                model(x)
        except Exception:  # a forward that does not bear being watched is left as it is
            return ()
        found = [_Candidate(*end) for end in recorder.found()]
        del recorder
        return tuple(_probed(model, pixels, begin, found))


def _probed(model: nn.Module, pixels: Tensor, begin: nn.Module,
            found: Sequence[_Candidate]) -> Iterator[Site]:
    generator = torch.Generator().manual_seed(0)
    asked = {c: c.first(generator) for c in found}
    for _ in range(_ROUNDS):
        if not asked:
            break
        # of one source several may be asked: the first has it this time, the others the next
        now: dict[Place, _Candidate] = {}
        for c in asked:
            now.setdefault(c.source, c)
        sharing = [c for c in asked if now[c.source] is not c]
        # copies: an attack's forward may take what it is given for a leaf, and write to it
        prober = _Prober({c.source: asked[c].clone() for c in now.values()},
                         {c.readers[0] for c in found})
        x = pixels.detach().clone().requires_grad_()
        try:
            with prober.begun_by(begin), functions_hidden(prober), prober:
                model(x)
        except Exception:  # numbers of other ranges may be refused: what is known must do
            break
        nearer: dict[_Candidate, Tensor] = {c: asked[now[c.source]] for c in sharing}
        for c in (*now.values(), *sharing):
            y = prober.read.get(c.readers[0])
            if y is None or y.shape != c.shape:
                c.axes = []
                continue
            c.note(asked[now[c.source]], y)
            numbers = c.narrower(generator) if c.axes else None
            if numbers is not None:
                nearer[c] = numbers
            else:
                nearer.pop(c, None)
        asked = nearer
    for c in found:
        steps = c.fitted() if c.z else None
        if steps is not None:
            yield Site(c.source, c.readers, steps)


class SiteReader(_Calls):
    """Gives readers the softened steps of z instead of y.

    Args:
        sites: of the model that is run.
        k: sharpness; None: y as it is, with a gradient.
        by_image: as of :func:`quantguard.soften`.
        slope: whose gradient y as it is has: of the steps softened by so much; None: of the line
            through them.
    """

    def __init__(self, sites: Sequence[Site], k: float | None, by_image: bool = False,
                 slope: float | None = None) -> None:
        super().__init__()
        self.k, self._by_image, self._slope = k, by_image, slope
        self._sources: dict[int, list[tuple[Place, int]]] = {}
        self._readers: dict[int, list[tuple[Place, int]]] = {}
        self._inside: set[int] = set()
        self._steps = [site.steps for site in sites]
        for number, site in enumerate(sites):
            self._sources.setdefault(site.source.call, []).append((site.source, number))
            for place in site.readers:
                self._readers.setdefault(place.call, []).append((place, number))
            self._inside.update(range(site.source.call + 1, min(p.call for p in site.readers)))
        self._ready: dict[int, Tensor] = {}

    def restart(self, *_: Any) -> None:
        super().restart()
        self._ready = {}

    def wanted(self, number: int) -> bool:
        return number in self._sources or number in self._readers

    def within(self, number: int) -> bool:
        """Return whether a call is a part of a known quantizer, which is computed as it is."""
        return number in self._inside

    def given(self, number: int, name: str, leaves: list[Any]) -> list[Any]:
        for place, site in self._sources.get(number, ()):
            if not place.result and place.name == name:
                self._note(leaves, place, site)
        for place, site in self._readers.get(number, ()):
            ready = self._ready.get(site)
            if ready is None or place.name != name or place.at >= len(leaves):
                continue
            y = leaves[place.at]
            if isinstance(y, Tensor) and y.shape == ready.shape:
                leaves[place.at] = ready.to(y.dtype) if self.k is not None \
                    else y.detach() + ready.to(y.dtype)
        return leaves

    def returned(self, number: int, name: str, result: Any) -> Any:
        leaves: list[Any] | None = None
        for place, site in self._sources.get(number, ()):
            if place.result and place.name == name:
                leaves = tree_leaves(result) if leaves is None else leaves
                self._note(leaves, place, site)
        return result

    def _note(self, leaves: list[Any], place: Place, site: int) -> None:
        z = leaves[place.at] if place.at < len(leaves) else None
        # without gradients, too, what is climbed is looked at; y as it is needs nothing then
        wanted = isinstance(z, Tensor) and (
            z.requires_grad if torch.is_grad_enabled() else self.k is not None)
        if isinstance(z, Tensor) and wanted and z.is_floating_point():
            # at once: z may be written to before y is read
            steps = self._steps[site]
            if steps.axis is not None and z.shape[steps.axis] != len(steps.thresholds):
                return
            if self.k is not None:
                self._ready[site] = step_fit.soften(z, steps, self.k, self._by_image)
            elif self._slope is None:
                self._ready[site] = step_fit.slope(z, steps)
            else:
                soft = step_fit.soften(z, steps, self._slope, self._by_image)
                self._ready[site] = soft - soft.detach()
