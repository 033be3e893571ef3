"""Functions that torch.compile turns into one loop over memory each.

They are compiled under their own names, once for each variant (see ``compiled_kernels._run``), and
must give the same bits as ``eager_kernels``: the order of operations matters. The public functions
of ``compiled_kernels`` document the arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import eager_kernels as eager


def encode_body(x: Tensor, out: Tensor, code: Tensor, t: Tensor, edges: Tensor, step: Tensor,
                zero: Tensor) -> None:
    # Selections between floats are vectorised; between integers they take five times as long.
    wide = x.float()
    count, edge = torch.zeros_like(wide), edges[..., 0]
    for i in range(t.shape[-1]):
        above = wide > t[..., i]
        count = torch.where(above, i + 1.0, count)
        edge = torch.where(above, edges[..., i + 1], edge)
    out.copy_(torch.where(wide != wide, wide, (count - zero) * step[..., 0]))
    # There is one edge between two thresholds: the code says on which side of it x lies.
    code.copy_(2 * count + (wide > edge).float())


def _found(wide: Tensor, size: Tensor, zero: Tensor, m: int) -> Tensor:
    guess = (wide / size + (zero + 0.5)).floor().clamp(0, m)  # exact, or off by one
    up, down = wide > size * (guess + 0.5 - zero), wide <= size * (guess - 0.5 - zero)
    return (guess + up.float() - down.float()).clamp(0, m)


def encode_computed_body(x: Tensor, out: Tensor, code: Tensor, ends: Tensor, step: Tensor,
                         zero: Tensor, m: int) -> None:
    wide, size = x.float(), step[..., 0]
    count = _found(wide, size, zero, m)
    edge = (size * (count - 0.5 - zero) + size * (count + 0.5 - zero)) / 2
    edge = torch.where(count > m - 1, ends[..., 1], torch.where(count < 1, ends[..., 0], edge))
    out.copy_(torch.where(wide != wide, wide, (count - zero) * size))
    code.copy_(torch.where(wide != wide, 0.0, 2 * count + (wide > edge).float()))


def _sigmoid(u: Tensor) -> Tensor:
    return torch.sigmoid(u.clamp(max=eager.FAR))


def bell_body(x: Tensor, out: Tensor, slope: Tensor | None, t: Tensor, sharpness: Tensor,
              step: Tensor, zero: Tensor, hard: bool) -> None:
    wide = x.float()
    value, total, count = (torch.zeros_like(wide) for _ in range(3))
    for i in range(t.shape[-1]):
        s = _sigmoid((wide - t[i]) * sharpness[i])
        value = value + s
        total = total + s * (1 - s) * sharpness[i]
        count = count + (wide > t[i]).float()
    if slope is not None:
        slope.copy_(total * step)
    if hard:
        out.copy_(torch.where(wide != wide, wide, (count - zero) * step))
    else:
        out.copy_((value - zero) * step)


def bell_computed_body(x: Tensor, out: Tensor, slope: Tensor | None, sharpness: Tensor,
                       step: Tensor, zero: Tensor, hard: bool, m: int, reach: int) -> None:
    wide = x.float()
    first = (wide / step + (zero + 0.5)).floor().clamp(-reach, m + reach)
    below = (first - reach).clamp(0, m)  # the number of thresholds whose sigmoid is 1
    value, total = torch.zeros_like(wide), torch.zeros_like(wide)
    for offset in range(1 - reach, reach + 1):
        i = first + offset
        s = _sigmoid((wide - step * (i - 0.5 - zero)) * sharpness[0])
        s = torch.where((i > 0) & (i <= m), s, 0.0)
        value = value + s
        total = total + s * (1 - s) * sharpness[0]
    if slope is not None:
        slope.copy_(torch.where(wide != wide, wide, total * step))
    if hard:
        count = _found(wide, step, zero, m)
        out.copy_(torch.where(wide != wide, wide, (count - zero) * step))
    else:
        out.copy_(torch.where(wide != wide, wide, (value + below - zero) * step))


def bell_gradients_body(grad: Tensor, x: Tensor, out: Tensor, t: Tensor, sharpness: Tensor,
                        step: Tensor, zero: Tensor, hard: bool, shares: Tensor,
                        by_level: Tensor) -> None:
    wide, up, sums = x.float(), grad.float(), []
    total, value = torch.zeros_like(wide), torch.zeros_like(wide)
    for i in range(t.shape[-1]):
        s = _sigmoid((wide - t[i]) * sharpness[i])
        part = s * (1 - s) * sharpness[i] * (up * step)
        sums.append(part.double().sum())
        total = total + part
        value = value + ((wide > t[i]).float() if hard else s)
    out.copy_(total)
    shares.sub_(torch.stack(sums))
    by_level.add_((up * (value - zero)).double().sum())


def margin_body(z: Tensor, slope: Tensor, t: Tensor, sharpness: Tensor, _hard: bool,
                total: Tensor) -> None:
    wide = z.float()
    bells, steep = torch.zeros_like(wide), torch.zeros_like(wide)
    for i in range(t.shape[-1]):
        p = _sigmoid((wide - t[i]) * sharpness[i])
        bell = p * (1 - p)
        bells = bells + bell
        steep = steep + bell * (1 - 2 * p) * sharpness[i]
    slope.copy_(steep)
    total.add_(bells.double().sum())


def decode_body(grad: Tensor, code: Tensor, table: Tensor, zero: Tensor, sums: tuple[int, ...],
                flat: bool, out: Tensor | None, by_window: Tensor | None,
                by_level: Tensor | None) -> None:
    wide, place = grad.float(), code.float()
    m = table.shape[-1] - 2
    if out is not None and flat:
        out.copy_(wide * torch.where((place > 0) & (place <= 2 * m), table[1], 0.0))
    elif out is not None:
        slope = torch.where(place > 0, table[..., 1], table[..., 0])
        for i in range(1, m + 1):
            slope = torch.where(place > 2 * i, table[..., i + 1], slope)
        out.copy_(wide * slope)
    if by_window is not None:
        parts = [torch.where((place > 2 * i) & (place <= 2 * i + 2), wide, 0.0).double().sum(sums)
                 for i in range(m)]
        by_window.copy_(torch.stack(parts, -1))
    if by_level is not None:
        by_level.copy_((wide.double() * ((place * 0.5).floor() - zero).double()).sum(sums))
