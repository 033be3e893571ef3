"""An evaluation that several test files share."""

from __future__ import annotations

import pytest
from evaluation_suites import Digits, batches, measured
from torch import nn

from quantguard.evaluation.results import Evaluation


@pytest.fixture(scope="session")
def result(quantized: nn.Module, digits: Digits) -> Evaluation:
    """The cheap suite on 100 digits."""
    return measured(quantized, batches(digits, 100))
