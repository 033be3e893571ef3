"""Thresholds and step of a quantizer: fixed, or learned in ascending order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.errors import SpecError
from ..core.specs import QuantSpec

# Lower bound of a learned gap, relative to where it started: otherwise gaps merge under Adam and
# slopes explode.
GAP_FLOOR = 0.1


class QuantizerThresholds(nn.Module):
    """Base class with the thresholds, step and zero level of a quantizer.

    Learned thresholds ascend by construction, since the parameters are logarithms of gaps relative
    to their initial values.

    Attributes:
        base, base_step, base_width, zero_level: buffers, where the quantizer starts from.
        shift, log_gaps, log_step: the parameters of a dynamic quantizer, all 0 at the start:
            ``t_1 = base_1 + base_step * shift``, gap ``i`` grows by ``exp(log_gaps_i)``, step by
            ``exp(log_step)``.
    """

    base: Tensor
    base_step: Tensor
    base_width: Tensor
    zero_level: Tensor
    spec: QuantSpec

    def _start_from(self, t: Tensor, step: Tensor, width: Tensor, zero: Tensor) -> None:
        for name, value in (("base", t), ("base_step", step), ("base_width", width),
                            ("zero_level", zero)):
            self.register_buffer(name, value.detach().float().clone().contiguous())
        if self.spec.dynamic:
            rows, device = step.shape, t.device
            self.shift = nn.Parameter(torch.zeros(rows, device=device))
            self.log_gaps = nn.Parameter(torch.zeros(*rows, t.shape[-1] - 1, device=device))
            self.log_step = nn.Parameter(torch.zeros(rows, device=device))

    @torch.no_grad()
    def set_thresholds(self, thresholds: Tensor, step: Tensor | float, zero: float = 0,
                       width: Tensor | float | None = None) -> None:
        """Set the numbers of the quantizer; a dynamic one starts learning from them.

        Args:
            thresholds: (m,), or (C, m) per channel, strictly ascending.
            step: the distance of two levels, positive; (C,) per channel.
            zero: the level that is 0; 2 * zero is an integer.
            width: the window at 1 bit; None: 2 t_1 where that is positive, else step.

        Raises:
            SpecError: thresholds that do not ascend, a step that is not positive, or shapes that
                do not fit.
        """
        device = self.base.device
        t = torch.as_tensor(thresholds, dtype=torch.float32, device=device)
        rows = t.shape[:-1]
        size = _per_row(step, rows, device, "step")
        if t.dim() != self.base.dim() or t.shape[-1] != self.spec.thresholds:
            raise SpecError(f"thresholds have shape {tuple(t.shape)}, but {self.spec} has "
                            f"{'(C, m)' if self.spec.per_channel else '(m,)'}, "
                            f"m = {self.spec.thresholds}")
        if not torch.isfinite(t).all() or not (t[..., 1:] > t[..., :-1]).all():
            raise SpecError(f"thresholds must be finite and strictly ascending: {t.tolist()}")
        if (2 * zero) % 1:
            raise SpecError(f"zero={zero} must be a multiple of 1/2")
        if width is None:
            width = torch.where(t[..., 0] > 0, 2 * t[..., 0], size) if zero == 0 else size
        self._start_from(t, size, _per_row(width, rows, device, "width"),
                         torch.tensor(float(zero), device=device))

    @property
    def thresholds(self) -> Tensor:
        """Return the thresholds, (m,) or (C, m), ascending."""
        if not self.spec.dynamic:
            return self.base
        # Changes are added to base, so that untrained thresholds are exactly the initial ones.
        grown = (1 - GAP_FLOOR) * (self.base[..., 1:] - self.base[..., :-1]) * self.log_gaps.expm1()
        shift = (self.base_step * self.shift).unsqueeze(-1)
        return self.base + torch.cat([shift, shift + grown.cumsum(-1)], -1)

    @property
    def step(self) -> Tensor:
        """Return the distance of two levels, () or (C,)."""
        return self.base_step * self.log_step.exp() if self.spec.dynamic else self.base_step

    @property
    def zero(self) -> float:
        """Return the level that is 0."""
        return float(self.zero_level)

    def _window(self, thresholds: Tensor) -> Tensor:
        """Return the window at 1 bit: 2 t_1 of a learned t_1 well above 0, else base_width."""
        if not self.spec.dynamic or thresholds.shape[-1] > 1:
            return self.base_width
        first = thresholds[..., 0].detach()
        free = (self.zero_level == 0) & (first > 0.1 * self.base_width)
        return torch.where(free, 2 * first, self.base_width)


def _per_row(value: Tensor | float, rows: torch.Size, device: torch.device, name: str) -> Tensor:
    """Return one positive number, or one for each row, in the shape of rows; raise SpecError."""
    size = torch.as_tensor(value, dtype=torch.float32, device=device)
    if size.numel() == 1:
        size = size.reshape(()).expand(rows)
    if size.shape != rows:
        raise SpecError(f"{name} has shape {tuple(size.shape)}, expected one number"
                        + (f" or {tuple(rows)}" if rows else ""))
    if not torch.isfinite(size).all() or not (size > 0).all():
        raise SpecError(f"{name} must be positive: {size.tolist()}")
    return size
