"""The peak learning rate, from the model's own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.distributed import Distributed
from ..core.errors import DataError
from ..data.train_batches import Source
from .model_state import copied
from .pixel_batches import PixelBatches, of_several

# First-order change of the loss that one sign step of the peak learning rate may cause; for a LeNet
# it gives the hand-tuned 2.5e-3. Large pretrained nets get a lower rate. The upper limit is the
# rate that hardened 2 bits best.
_TRUST = 3.0
LR_RANGE = (1e-5, 5e-3)


def auto_lr(model: nn.Module, source: Source, batches: PixelBatches,
            loss: Callable[[Tensor, Tensor], Tensor], distributed: Distributed) -> float:
    """Return a peak learning rate for a model, which does not change.

    A step of AdamW moves every weight by about lr, so to first order it changes the loss by lr
    times the L1 norm of the gradient. The returned rate makes this product a constant.

    Raises:
        DataError: the gradient is not finite.
    """
    norm, count, before = 0.0, 0, copied(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    read = (batches(batch, number) for number, batch in enumerate(source.epoch(0, 0)))
    for pixels, labels in of_several(read, lambda batch: len(batch[0])):
        grads = torch.autograd.grad(loss(pixels, labels), weights, allow_unused=True)
        norm += sum(float(distributed.total(g).abs().sum()) for g in grads if g is not None)
        count += 1
        if count == 4:
            break
    model.load_state_dict(before)
    if not math.isfinite(norm):
        raise DataError("the loss or its gradient is NaN or infinite on the first batches",
                        fix="Check the model on clean images first.")
    low, high = LR_RANGE
    return min(max(_TRUST * count / max(norm, 1e-12), low), high)
