"""What several test files share: digits, a small CNN trained on them, and its 2-bit conversion.

Session fixtures are shared by every test: work on ``copy.deepcopy`` of a model to change it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from quantguard.cli.demo import small_cnn, train_clean
from quantguard.conversion.converter import convert
from quantguard.data.loader import load_data
from quantguard.nn.quant_activation import quantizers


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    # Started in the background of a shell, Ctrl-C is ignored, and tests of it could not fail.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _whole(split: Any) -> tuple[Tensor, Tensor]:
    dataset = load_data("digits", split).dataset
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))  # type: ignore[arg-type]
    return images, labels


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """All 500 test images (N, 1, 8, 8) in [0, 1], and labels."""
    return _whole("test")


@pytest.fixture(scope="session")
def train_digits() -> TensorDataset:
    """The first 640 training images."""
    images, labels = _whole("train")
    return TensorDataset(images[:640], labels[:640])


@pytest.fixture(scope="session")
def cnn(one_thread: None) -> nn.Module:
    """The demo's CNN after four epochs of digits: about 97 % clean accuracy, eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_cnn()
        train_clean(model, load_data("digits", "train", batch_size=64), 4, progress=False)
    return model


@pytest.fixture(scope="session")
def quantized(cnn: nn.Module) -> nn.Module:
    """The 2-bit dynamic conversion of ``cnn``."""
    return convert(cnn, 2, dynamic=True)


def _everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "mode": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "contexts": [(m._state, m._listener) for m in quantizers(model).values()],
        "random numbers": torch.get_rng_state(), "grad mode": torch.is_grad_enabled(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)}


def _assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for name in a:
            _assert_same(a[name], b[name], f"{where} {name}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for one, other in zip(a, b, strict=True):
            _assert_same(one, other, where)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="session")
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """A context in which neither a model nor anything global may change."""
    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before = _everything(model)
        yield
        _assert_same(before, _everything(model), "changed:")
    return check
