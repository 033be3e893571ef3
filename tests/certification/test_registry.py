"""Every rule is registered once, for certificates and for training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantguard.certification.rules import RULES, register_rule
from quantguard.nn.quant_activation import QuantActivation

# Operations that can be certified and not trained through, and why. Empty so far.
NOT_TRAINED: dict[object, str] = {}
# Functions without a rule whose layers have one.
NO_RULE_OF_FUNCTION = {"rrelu", "rrelu_", "dropout1d", "dropout3d", "alpha_dropout",
                       "feature_alpha_dropout"}


def test_every_operation_with_a_bound_has_a_training_rule_or_a_listed_reason() -> None:
    reasons = {target: rule.training for target, rule in RULES.items()
               if isinstance(rule.training, str)}
    assert reasons == NOT_TRAINED
    assert all(callable(rule.bound) for rule in RULES.values())


def test_a_layer_and_its_function_both_have_rules() -> None:
    missing = set()
    for target in RULES:
        if isinstance(target, type) and target is not QuantActivation:
            missing |= {name for name, function in vars(F).items()
                        if name.replace("_", "") == target.__name__.lower()
                        and not name.startswith("_") and function not in RULES}
    assert missing == NO_RULE_OF_FUNCTION


def test_names_of_methods_are_names_of_methods() -> None:
    for name in RULES:
        assert not isinstance(name, str) or "." in name or hasattr(Tensor, name)


def test_an_operation_has_one_rule() -> None:
    with pytest.raises(ValueError, match="two rules"):
        register_rule(torch.neg, training="none")(lambda x: x)
