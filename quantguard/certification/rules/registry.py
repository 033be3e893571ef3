"""Registry of rules: what a graph calls, how it is bounded, and how training goes through it.

A rule is registered where it is defined, under everything that calls its operation::

    @register_rule(operator.neg, torch.neg, "neg", training=train_neg)
    def neg(x: Interval) -> Interval:
        ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ...core.errors import ConversionError

_F = TypeVar("_F", bound=Callable[..., Any])


class NoRule(Exception):
    """Error for a call that the rule of its operation does not cover."""


@dataclass(frozen=True)
class Rule:
    """How one operation is bounded, and how training goes through it.

    Attributes:
        bound: sound bounds. It takes the operation's arguments with :class:`.intervals.Interval` in
            place of tensors; for a layer the layer comes first.
        training: differentiable intervals. It takes the operation itself (a function or layer), and
            then its arguments with :class:`.training.TrainInterval` in place of tensors. Or the
            reason why there is no such rule.
        view: whether the operation may return its first argument, or a view of it.
    """

    bound: Callable[..., Any]
    training: Callable[..., Any] | str
    view: bool = False


# What a graph calls -> its rule. Keys are types of layers (exact ones: a subclass may compute
# something else), functions, names of methods of Tensor, and full names ("package.module.function")
# of functions that torch.fx does not trace into and that may not be installed.
RULES: dict[Any, Rule] = {}


def register_rule(*targets: Any, training: Callable[..., Any] | str,
                  attributes: str | None = None, view: bool = False) -> Callable[[_F], _F]:
    """Return a decorator that registers the bound rule of an operation.

    Args:
        targets: keys as in ``RULES``.
        training: the training rule, or the reason why there is none.
        attributes: for types of layers: names of the attributes that the rule takes as keywords
            after its inputs, so that a function's rule also serves its layer; None: the rule takes
            the layer itself before its inputs.
        view: whether the operation may return its first argument, or a view of it. Without it,
            later writes into the result do not count as writes into the argument.
    """
    def register(rule: _F) -> _F:
        for target in dict.fromkeys(targets):  # torch has two names for some functions
            if target in RULES:
                raise ValueError(f"{target} has two rules")
            is_layer = isinstance(target, type) and issubclass(target, nn.Module)
            bound = _of_layer(rule, attributes.split()) if is_layer and attributes else rule
            RULES[target] = Rule(bound, training, view)
        return rule
    return register


def _of_layer(rule: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    def of_layer(module: nn.Module, *inputs: Any) -> Any:
        return rule(*inputs, **{name: getattr(module, name) for name in names})
    return of_layer


def apply(rule: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
          where: str) -> Any:
    """Call a bound rule, and turn its errors into one that names the place.

    Raises:
        ConversionError: the rule does not cover this call.
    """
    try:
        return rule(*args, **kwargs)
    except (NoRule, TypeError, RuntimeError, ValueError, IndexError, AttributeError,
            AssertionError) as error:
        raise ConversionError(f"{where} cannot be bounded",
                              why=str(error).strip().splitlines()[0] if str(error) else "",
                              fix="See quantguard.certify for the operations that can.") from error
    except ConversionError as error:
        raise ConversionError(f"{where} cannot be bounded", why=error.what,
                              fix=error.fix) from None


def apply_training(rule: Callable[..., Any] | str, call: Callable[..., Any], args: tuple[Any, ...],
                   kwargs: dict[str, Any], where: str) -> Any:
    """Call a training rule, and turn its errors into one that names the place.

    Args:
        rule: the rule, or the reason why there is none.
        call: the operation itself.

    Raises:
        ConversionError: there is no rule, or it does not cover this call.
    """
    try:
        if isinstance(rule, str):
            raise NoRule(rule)
        return rule(call, *args, **kwargs)
    except (NoRule, ConversionError, TypeError, RuntimeError, ValueError,
            AttributeError) as error:
        message = (error.what if isinstance(error, ConversionError) else str(error)).strip()
        raise ConversionError(f"{where} has no intervals to train through",
                              why=message.splitlines()[0] if message else "") from error
