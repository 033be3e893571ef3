"""Copies of a model's state."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.errors import SpecError


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of a model's state.

    Raises:
        SpecError: the state has something else than tensors in it.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            if "_packed_params" in name:
                raise SpecError(f"{name} in the model's state is packed: torch.ao has quantized "
                                "its weights, which cannot be trained any more",
                                fix="Harden the float model, and quantize its weights afterwards.")
            raise SpecError(f"{name} in the model's state is a {type(value).__name__}, no tensor",
                            fix="Make it a buffer: register_buffer(name, torch.tensor(...)).")
    return {k: v.detach().clone() for k, v in model.state_dict().items()}
