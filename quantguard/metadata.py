"""What travels with a model: the threat and the input it was made for, its classes.

It is kept in the model's attribute ``quantguard``, which copies, pickles and ``.qg`` files carry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from .errors import DataError, SpecError
from .progress import Progress
from .running import unwrap
from .spec import Threat, check_threat
from .world import world

# Up to so much two spellings of a mean (in pixels of 0 to 1) or of a std (relative) are the same.
_ROUNDED = 1e-3


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """What a model expects of its input, and what it was hardened against; None: not known.

    Attributes:
        threat: norm, eps and bounds that it was hardened against, and the mean and std of its
            input. A model that was only converted has no radius of its own: it is the default.
        num_classes: number of classes of the data it was hardened on.
        class_names: their names, in the order of the labels.
        input_shape: (C, H, W) of one image.
    """

    threat: Threat | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    input_shape: tuple[int, ...] | None = None

    def metadata(self) -> dict[str, Any]:
        """Return threat, classes and input shape as plain JSON types."""
        return {"threat": None if self.threat is None else self.threat.to_dict(),
                "num_classes": self.num_classes,
                "class_names": None if self.class_names is None else list(self.class_names),
                "input_shape": None if self.input_shape is None else list(self.input_shape)}

    def metadata_line(self) -> str:
        """Return what is known in one line; empty where nothing is."""
        parts = [] if self.threat is None else [str(self.threat)]
        if self.num_classes is not None:
            parts.append(f"{self.num_classes} classes")
        if self.input_shape is not None:
            parts.append(f"input {'x'.join(map(str, self.input_shape))}")
        return "; ".join(parts)


def metadata_from(told: Any) -> dict[str, Any]:
    """Return the fields of :class:`ModelMetadata` from what ``metadata()`` wrote, checked.

    Raises:
        SpecError, TypeError, ValueError, AttributeError: it is something else.
    """
    told = told or {}
    threat, names, shape = (told.get(key) for key in ("threat", "class_names", "input_shape"))
    number = told.get("num_classes")
    return {"threat": None if threat is None else Threat(**threat),
            "num_classes": None if number is None else int(number),
            "class_names": None if names is None else tuple(str(name) for name in names),
            "input_shape": None if shape is None else tuple(int(n) for n in shape)}


def metadata_of(model: nn.Module) -> ModelMetadata:
    """Return what is known of a model; of one that quantguard has not made, nothing is."""
    found = getattr(unwrap(model), "__dict__", {}).get("quantguard")
    return found if isinstance(found, ModelMetadata) else ModelMetadata()


def known_of(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a model's metadata, by name."""
    found = metadata_of(model)
    return {field.name: getattr(found, field.name) for field in fields(ModelMetadata)}


def annotate(model: nn.Module, **fields: Any) -> nn.Module:
    """Set fields of a model's metadata, and leave the others; return the model."""
    inner = unwrap(model)
    inner.__dict__["quantguard"] = replace(metadata_of(inner), **fields)
    return model


def class_names_of(loader: Any) -> tuple[str, ...] | None:
    """Return the names of the classes of a loader's data set, where it says them.

    That is the attribute ``classes`` that torchvision's data sets and ours have, also behind
    ``Subset`` and other data sets that hold one in ``dataset``.
    """
    data = getattr(loader, "dataset", None)
    for _ in range(8):  # a data set may hold itself
        names = getattr(data, "classes", None)
        if isinstance(names, (list, tuple)) and names:
            return tuple(str(name) for name in names)
        data = getattr(data, "dataset", None)
    return None


def resolved(model: nn.Module, threat: Threat | None, say: bool = False) -> Threat:
    """Return the threat to use on a model: what was given, completed by the model's own.

    Without a threat the model's own counts, else the default one. A threat without mean and std
    gets the model's. Where that, or another radius than the model's own, is used, ``say`` prints
    one line.

    Raises:
        SpecError: mean, std or bounds that contradict the model's, or no threat at all.
    """
    if threat is not None:
        check_threat(threat)
    own = metadata_of(model).threat
    if own is None:
        return Threat() if threat is None else threat
    if threat is None:
        if say and own != Threat():
            _print(f"threat: the model's own: {own}")
        return own
    told = threat
    fits = threat.bounds in ((0.0, 1.0), own.bounds)
    here = own.in_pixels_of(*threat.bounds)
    for name in ("mean", "std"):
        if fits and getattr(threat, name) is None and getattr(here, name) is not None:
            threat = _with(threat, name, getattr(here, name))
    if not same_input(threat, own):
        raise SpecError(
            f"the model's input was made for: {_input_text(own)}; and the threat says: "
            f"{_input_text(told)}",
            why="Under another normalisation its figures would be those of another model. What it "
                "was made for is in model.quantguard.threat.",
            fix="Leave mean, std and bounds out (--mean, --std), or write "
                "dataclasses.replace(model.quantguard.threat, eps=…). Where the model itself has "
                "changed: del model.quantguard.")
    if say:
        other = threat.norm != own.norm or threat.in_pixels_of(*own.bounds).eps != own.eps
        filled = _input_text(threat) if threat != told else ""
        if other or filled:
            _print("threat: " + "; ".join([
                *([f"the model's own normalisation: {filled}"] if filled else []),
                *([f"another than the model's own, which is: {own}"] if other else [])]))
    return threat


def same_input(one: Threat, other: Threat) -> bool:
    """Return whether two threats describe the same normalisation, whatever their bounds."""
    a, b = one.in_pixels_of(0.0, 1.0), other.in_pixels_of(0.0, 1.0)
    means = _pairs(a.mean or (0.0,), b.mean or (0.0,))
    stds = _pairs(a.std or (1.0,), b.std or (1.0,))
    return means is not None and stds is not None and \
        all(abs(x - y) <= _ROUNDED for x, y in means) and \
        all(abs(x - y) <= _ROUNDED * max(x, y) for x, y in stds)


def shared(models: Iterable[tuple[str, nn.Module]], threat: Threat | None,
           say: bool = False) -> Threat:
    """Return the one threat for several models, by name, that one loader feeds.

    Raises:
        SpecError: models made for different inputs, or for different radii where none is given.
    """
    made = [(name, model) for name, model in models if metadata_of(model).threat is not None]
    owns = [(name, own) for name, model in made if (own := metadata_of(model).threat) is not None]
    for name, own in owns[1:]:
        first, its = owns[0]
        if not same_input(own, its):
            raise SpecError(
                f"{first} was made for {_input_text(its)}, and {name} for {_input_text(own)}",
                why="One loader feeds all models of a comparison, so they must share mean, std "
                    "and bounds.",
                fix="Put the normalisation into one of them (nn.Sequential(Normalize(…), model)), "
                    "or evaluate each alone.")
        if threat is None and (own.norm, own.in_pixels_of(*its.bounds).eps) != (its.norm, its.eps):
            raise SpecError(f"{first} was made for {its}, and {name} for {own}",
                            why="The models of a comparison meet the same attacker.",
                            fix="Give a threat (--norm, --eps).")
    if threat is not None:
        check_threat(threat)
    for number, (_, model) in enumerate(made):
        threat = resolved(model, threat, say and number == 0)
    return Threat() if threat is None else threat


def check_shape(model: nn.Module, shape: Sequence[int], where: str) -> None:
    """Refuse images of another size than those that a model was hardened on.

    Args:
        shape: (C, H, W).

    Raises:
        DataError: they are.
    """
    known = metadata_of(model).input_shape
    if known is not None and tuple(shape) != known:
        raise DataError(
            f"{where} has images of {'x'.join(map(str, shape))}, and the model was hardened on "
            f"{'x'.join(map(str, known))}",
            fix="Resize them (on the command line leave --size out). Where another size is meant: "
                "model.quantguard = dataclasses.replace(model.quantguard, input_shape=None).")


def check_classes(model: nn.Module, names: tuple[str, ...] | None, outputs: int) -> None:
    """Refuse data of other classes than those that a model was hardened on.

    Args:
        names: of the data, in the order of its labels; None: it has none.
        outputs: the number of the model's logits: where the data has as many classes, a head has
            been put on since, and it is the metadata that is old.

    Raises:
        DataError: another number of classes, or one name at two places.
    """
    known = metadata_of(model)
    if names is None or known.num_classes is None:
        return
    if len(names) != known.num_classes:
        if outputs != len(names):
            raise DataError(f"the data has {len(names)} classes, and the model was hardened on "
                            f"{known.num_classes}",
                            why="Its labels would mean other classes than the model's.",
                            fix="Give the data that it was made for, or such a part of it.")
        return
    for place, name in enumerate(known.class_names or ()):
        if name in names and names.index(name) != place:
            raise DataError(f"class {name!r} has the number {names.index(name)} in the data, and "
                            f"{place} in the model",
                            why="A class's number is its place in the sorted names of the folders.",
                            fix="Give the data the classes that the model was hardened on.")


def _with(threat: Threat, name: str, value: Any) -> Threat:
    twin = threat.at(threat.eps)
    object.__setattr__(twin, name, value)
    return twin


def _pairs(one: Sequence[float],
           other: Sequence[float]) -> list[tuple[float, float]] | None:
    """Return the numbers of two lists channel by channel, one for all being as good as many."""
    size = max(len(one), len(other))
    if not {len(one), len(other)} <= {1, size}:
        return None
    return [(one[i % len(one)], other[i % len(other)]) for i in range(size)]


def _input_text(threat: Threat) -> str:
    low, high = threat.bounds
    said = [f"{name} {', '.join(format(v, '.4g') for v in values)}"
            for name, values in (("mean", threat.mean), ("std", threat.std)) if values is not None]
    return f"pixels of {low:g}..{high:g}, {' and '.join(said) or 'no mean and std'}"


def _print(text: str) -> None:
    Progress("", 1, world().first).say(text)
