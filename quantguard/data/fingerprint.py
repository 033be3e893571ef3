"""Fingerprint of a loader, by which a run directory recognises its data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..core.nested_tensors import tensors_in
from ..core.runtime import seeded
from .batches import unpack


def first_batch_fingerprint(batches: Callable[[], Iterable[Any]], ordered: bool) -> str:
    """Return a hash of the first batch, or of its labels alone if images are random.

    Args:
        batches: makes the loader.
        ordered: whether the first batch always has the same images.
    """
    def first() -> tuple[str, str]:
        with seeded(0):
            batch = next(iter(batches()), None)
        inputs, labels = (None, None) if batch is None else unpack(batch)
        return _hash_tensors(inputs), _hash_tensors(labels)
    one, other = first(), first()
    if one[0] == other[0]:
        return " ".join(one)
    return f"drawn at random {one[1]}" if ordered and one[1] == other[1] else "drawn at random"


def _hash_tensors(value: Any) -> str:
    """Return a hash of the types, shapes and bytes of all tensors in a value."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors_in(value):
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
