"""Fixtures of the conversion tests."""

from __future__ import annotations

import pytest
from close_models import CLOSE, Close, make_close
from converted_pairs import Pair


@pytest.fixture(scope="module")
def close_pairs() -> dict[Close, Pair]:
    """Conversions of the three close models; tests must not change them."""
    return {close: make_close(close) for close in CLOSE.values()}
