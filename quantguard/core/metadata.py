"""Metadata of a model: the threat and the input it was made for, and its classes.

The metadata is the model's attribute ``quantguard``; copies, pickles and ``.qg`` files include it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from .distributed import distributed
from .errors import DataError, SpecError
from .module_utils import unwrap
from .progress import Progress
from .specs import Threat, check_threat

# Means (in pixels of 0 to 1) and stds (relative) that differ by less are rounded differently.
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """The input that a model expects and the threat it was hardened against; None: unknown.

    Attributes:
        threat: norm, eps and bounds of the training attack, and mean and std of the model's
            input. For a model that was only converted, eps is the default.
        num_classes: number of classes of the training data.
        class_names: names of the classes, in the order of the labels.
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
        """Return the known fields in one line; empty where none is known."""
        known = [] if self.threat is None else [str(self.threat)]
        if self.num_classes is not None:
            known.append(f"{self.num_classes} classes")
        if self.input_shape is not None:
            known.append(f"input {'x'.join(map(str, self.input_shape))}")
        return "; ".join(known)


def metadata_from(record: Any) -> dict[str, Any]:
    """Return the fields of :class:`ModelMetadata` from the result of ``metadata()``, checked.

    Raises:
        SpecError, TypeError, ValueError, AttributeError: record is something else.
    """
    record = record or {}
    threat, names, shape = (record.get(key) for key in ("threat", "class_names", "input_shape"))
    number = record.get("num_classes")
    return {"threat": None if threat is None else Threat(**threat),
            "num_classes": None if number is None else int(number),
            "class_names": None if names is None else tuple(str(name) for name in names),
            "input_shape": None if shape is None else tuple(int(n) for n in shape)}


def metadata_of(model: nn.Module) -> ModelMetadata:
    """Return the metadata of a model; all fields are None if quantguard did not set it."""
    found = getattr(unwrap(model), "__dict__", {}).get("quantguard")
    return found if isinstance(found, ModelMetadata) else ModelMetadata()


def known_of(model: nn.Module) -> dict[str, Any]:
    """Return the fields of a model's metadata, by name."""
    found = metadata_of(model)
    return {field.name: getattr(found, field.name) for field in fields(ModelMetadata)}


def annotate(model: nn.Module, **fields: Any) -> nn.Module:
    """Set some fields of a model's metadata, and return the model."""
    inner = unwrap(model)
    inner.__dict__["quantguard"] = replace(metadata_of(inner), **fields)
    return model


def class_names_of(loader: Any) -> tuple[str, ...] | None:
    """Return the class names of a loader's data set, or None.

    They are in the attribute ``classes`` of torchvision's and our data sets. ``Subset`` and other
    wrappers have the inner data set in ``dataset``.
    """
    data = getattr(loader, "dataset", None)
    for _ in range(8):  # a data set may contain itself
        names = getattr(data, "classes", None)
        if isinstance(names, (list, tuple)) and names:
            return tuple(str(name) for name in names)
        data = getattr(data, "dataset", None)
    return None


def resolved(model: nn.Module, threat: Threat | None, say: bool = False) -> Threat:
    """Return the threat to use on a model: the caller's, completed by the model's own.

    Without a threat it is the model's own, else the default. A threat without mean and std gets
    those of the model.

    Args:
        say: print one line where the model's normalisation is used, or another norm or radius
            than the model's own.

    Raises:
        SpecError: mean, std or bounds that contradict the model's, or a threat of another type.
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
    passed = threat
    fits = threat.bounds in ((0.0, 1.0), own.bounds)
    here = own.in_pixels_of(*threat.bounds)
    for name in ("mean", "std"):
        if fits and getattr(threat, name) is None and getattr(here, name) is not None:
            threat = _with(threat, name, getattr(here, name))
    if not same_input(threat, own):
        raise SpecError(
            f"the model's input was made for: {_input_text(own)}; but the threat has: "
            f"{_input_text(passed)}",
            why="With another normalisation the results would be those of another model. The "
                "model's own is in model.quantguard.threat.",
            fix="Leave mean, std and bounds out (--mean, --std), or write "
                "dataclasses.replace(model.quantguard.threat, eps=…). If the model itself has "
                "changed: del model.quantguard.")
    if say:
        other = threat.norm != own.norm or threat.in_pixels_of(*own.bounds).eps != own.eps
        filled = _input_text(threat) if threat != passed else ""
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
        all(abs(x - y) <= _ROUNDING for x, y in means) and \
        all(abs(x - y) <= _ROUNDING * max(x, y) for x, y in stds)


def shared(models: Iterable[tuple[str, nn.Module]], threat: Threat | None,
           say: bool = False) -> Threat:
    """Return the common threat of several named models that are measured on one loader.

    Raises:
        SpecError: the models were made for different inputs, or for different radii and no threat
            is passed.
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
                fix="Move the normalisation into one of them (nn.Sequential(Normalize(…), model)), "
                    "or evaluate each alone.")
        if threat is None and (own.norm, own.in_pixels_of(*its.bounds).eps) != (its.norm, its.eps):
            raise SpecError(f"{first} was made for {its}, and {name} for {own}",
                            why="All models of a comparison get the same attacker.",
                            fix="Pass a threat (--norm, --eps).")
    if threat is not None:
        check_threat(threat)
    for number, (_, model) in enumerate(made):
        threat = resolved(model, threat, say and number == 0)
    return Threat() if threat is None else threat


def check_shape(model: nn.Module, shape: Sequence[int], where: str) -> None:
    """Check that images have the size that a model was hardened on.

    Args:
        shape: (C, H, W).
        where: where the images are from, for the message.

    Raises:
        DataError: they have another size.
    """
    known = metadata_of(model).input_shape
    if known is not None and tuple(shape) != known:
        raise DataError(
            f"{where} has images of {'x'.join(map(str, shape))}, and the model was hardened on "
            f"{'x'.join(map(str, known))}",
            fix="Resize them (on the command line leave --size out). If another size is intended: "
                "model.quantguard = dataclasses.replace(model.quantguard, input_shape=None).")


def check_classes(model: nn.Module, names: tuple[str, ...] | None, outputs: int) -> None:
    """Check that data has the classes that a model was hardened on.

    Args:
        names: class names of the data, in the order of its labels; None: unknown.
        outputs: number of the model's logits. If the data has as many classes, the model got a new
            head after hardening, and the metadata is outdated.

    Raises:
        DataError: another number of classes, or a class with another label.
    """
    known = metadata_of(model)
    if names is None or known.num_classes is None:
        return
    if len(names) != known.num_classes:
        if outputs != len(names):
            raise DataError(f"the data has {len(names)} classes, and the model was hardened on "
                            f"{known.num_classes}",
                            why="Its labels would mean other classes than the model's.",
                            fix="Use the data that it was hardened on, or a subset of it.")
        return
    for place, name in enumerate(known.class_names or ()):
        if name in names and names.index(name) != place:
            raise DataError(f"class {name!r} has the number {names.index(name)} in the data, and "
                            f"{place} in the model",
                            why="A class's number is its position in the sorted folder names.",
                            fix="Use data with the classes that the model was hardened on.")


def _with(threat: Threat, name: str, value: Any) -> Threat:
    clone = threat.at(threat.eps)
    object.__setattr__(clone, name, value)
    return clone


def _pairs(one: Sequence[float],
           other: Sequence[float]) -> list[tuple[float, float]] | None:
    """Return the numbers of two lists by channel; a single number counts for all channels."""
    size = max(len(one), len(other))
    if not {len(one), len(other)} <= {1, size}:
        return None
    return [(one[i % len(one)], other[i % len(other)]) for i in range(size)]


def _input_text(threat: Threat) -> str:
    low, high = threat.bounds
    known = [f"{name} {', '.join(format(v, '.4g') for v in values)}"
             for name, values in (("mean", threat.mean), ("std", threat.std)) if values is not None]
    return f"pixels of {low:g}..{high:g}, {' and '.join(known) or 'no mean and std'}"


def _print(text: str) -> None:
    Progress("", 1, distributed().is_main).say(text)
