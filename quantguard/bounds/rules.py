"""How each operation bounds its result: literal tables from what a graph calls to a rule.

A rule takes what the operation takes, boxes in place of tensors, and returns a box. It acts on
each image alone; what mixes images has none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..activation import QuantActivation
from ..errors import ConversionError
from ..kinds import FUNCTION_KINDS, METHOD_KINDS, MODULE_KINDS, module_of
from .boxes import Box
from .curves import activated, prelu, quantized
from .steps import Affine, Largest

# An operation on two numbers rounds once; scalars are rounded to float32 first, and some kernels
# multiply by a rounded reciprocal.
_FEW = 4
# BatchNorm: mean, variance, root and product, in any arrangement.
_NORM = 16
# A bound of a clamp that is none.
_FAR = 1e30


class _NoRule(Exception):
    """Say which part of a call has no rule."""


def _moved(x: Box, move: Callable[[Tensor], Tensor], injective: bool = True) -> Box:
    """Return the box of values that are only moved, image by image."""
    return Affine((x,), move, move, diagonal=injective).box()


def _reshaped(x: Box, like: Callable[[Tensor], Tensor]) -> Box:
    """Return the box in the shape that like gives it; the map works for any number of images."""
    shape = like(x.lower).shape
    if not shape or shape[0] != x.shape[0]:
        raise _NoRule("a reshape that mixes images")
    return _moved(x, lambda v: v.reshape(v.shape[0], *shape[1:]))


def _dims(dims: Any, x: Box) -> list[int]:
    """Return dimensions as a list of non-negative numbers, none of them that of the images."""
    some = list(dims) if isinstance(dims, (tuple, list)) else [] if dims is None else [dims]
    found = [d % len(x.shape) for d in some or range(len(x.shape))]
    if 0 in found:
        raise _NoRule("an operation across images")
    return found


def _constant(value: Any, x: Box) -> Tensor:
    """Return a number or tensor in double, shaped to go with one image of x."""
    if isinstance(value, Tensor):
        number = value.detach().double()
        if number.dim() >= len(x.shape):
            if number.dim() > len(x.shape) or number.shape[0] != 1:
                raise _NoRule("a constant with a row for each image")
            number = number[0]
        return number.to(x.lower.device)
    if not isinstance(value, (int, float)):
        raise _NoRule(f"a {type(value).__name__} among its arguments")
    return torch.tensor(float(value), dtype=torch.float64, device=x.lower.device)


def _broadcast(x: Box, constant: Tensor) -> torch.Size:
    """Return the shape of one image of x combined with a constant."""
    return (x.lower[0] + constant).shape


# ---- affine ----

def _scaled(x: Box, factor: Tensor) -> Box:
    same = _broadcast(x, factor) == x.shape[1:]
    size = factor.abs()
    return Affine((x,), lambda v: v * factor, lambda v: v * size, terms=_FEW, diagonal=same).box()


def _shifted(x: Box, shift: Tensor) -> Box:
    shape = _broadcast(x, shift)

    def linear(v: Tensor) -> Tensor:
        return v.expand(v.shape[0], *shape)
    if len(shape) != len(x.shape) - 1:
        raise _NoRule("a constant of more dimensions")
    return Affine((x,), linear, linear, shift, _FEW, diagonal=shape == x.shape[1:]).box()


def _add(x: Any, y: Any, alpha: Any = 1) -> Any:
    if alpha != 1:
        return _add(x, _mul(y, alpha))
    if not isinstance(x, Box):
        x, y = y, x
    if not isinstance(y, Box):
        return _shifted(x, _constant(y, x))
    return _sum(x, y)


def _sum(x: Box, y: Box) -> Box:
    if len(x.shape) != len(y.shape):
        raise _NoRule("a sum of tensors of different dimensions")
    return Affine((x, y), torch.add, torch.add, terms=_FEW).box()


def _sub(x: Any, y: Any, alpha: Any = 1) -> Any:
    if not isinstance(y, Box):
        return _add(x, -_constant(y, x) * alpha)
    return _add(x, _neg(y), alpha)


def _neg(x: Box) -> Box:
    return _scaled(x, _constant(-1, x))


def _mul(x: Any, y: Any) -> Any:
    if not isinstance(x, Box):
        x, y = y, x
    if not isinstance(y, Box):
        return _scaled(x, _constant(y, x))
    # Both vary: the extremes are at the corners; what they have in common is not seen.
    if len(x.shape) != len(y.shape):
        raise _NoRule("a product of tensors of different dimensions")
    products = [a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)]
    lower, upper = (_fold(f, products) for f in (torch.minimum, torch.maximum))
    rounded = _scaled(Box(lower, upper), _constant(1, x))
    return Box(rounded.lower, rounded.upper)


def _fold(f: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor]) -> Tensor:
    result, *rest = parts
    for part in rest:
        result = f(result, part)
    return result


def _div(x: Any, y: Any, rounding_mode: Any = None) -> Any:
    if not isinstance(x, Box) or isinstance(y, Box) or rounding_mode is not None:
        raise _NoRule("a division by what is no constant")
    return _scaled(x, 1 / _constant(y, x))


def _linear(x: Box, weight: Any, bias: Any = None) -> Box:
    w = _weights(weight)
    size, square = w.abs(), w.square()
    return Affine((x,), lambda v: F.linear(v, w), lambda v: F.linear(v, size),
                  None if bias is None else _weights(bias), w.shape[1] + _FEW,
                  squares=lambda v: F.linear(v, square)).box()


def _weights(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise _NoRule("weights that depend on the image")
    return value.detach().double()


def _convolution(d: int) -> Callable[..., Box]:
    convolve: Any = getattr(F, f"conv{d}d")

    def conv(x: Box, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
             dilation: Any = 1, groups: int = 1) -> Box:
        if len(x.shape) != d + 2:
            raise _NoRule("an image without a batch dimension")
        w = _weights(weight)

        def by(kernel: Tensor) -> Callable[[Tensor], Tensor]:
            def apply(v: Tensor) -> Tensor:
                result: Tensor = convolve(v, kernel, None, stride, padding, dilation, groups)
                return result
            return apply
        return Affine((x,), by(w), by(w.abs()),
                      None if bias is None else _weights(bias).reshape(-1, *[1] * d),
                      w[0].numel() + _FEW, squares=by(w.square())).box()
    return conv


def _conv_module(d: int) -> Callable[..., Box]:
    rule = _convolution(d)

    def conv(m: Any, x: Box) -> Box:
        padding = m.padding
        if m.padding_mode != "zeros":
            # Repeats pixels: a move, but no injective one.
            x = _moved(x, lambda v: F.pad(v, m._reversed_padding_repeated_twice, m.padding_mode),
                       injective=False)
            padding = 0
        return rule(x, m.weight, m.bias, m.stride, padding, m.dilation, m.groups)
    return conv


def _batch_norm(x: Box, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Box:
    if training or running_mean is None or running_var is None:
        raise _NoRule("a BatchNorm that looks at its batch")
    mean, scale = _weights(running_mean), (_weights(running_var) + eps).rsqrt()
    if weight is not None:
        scale = scale * _weights(weight)
    shift = mean.new_zeros(mean.shape) if bias is None else _weights(bias)
    shape = (-1, *[1] * (len(x.shape) - 2))
    scale, mean, shift = (v.reshape(shape) for v in (scale, mean, shift))
    size = scale.abs()
    return Affine((x,), lambda v: v * scale, lambda v: v * size, shift - mean * scale, _NORM,
                  weight_of_bias=shift.abs() + (mean * scale).abs(), diagonal=True).box()


def _averaged(x: Box, pool: Callable[[Tensor], Tensor], terms: int) -> Box:
    return Affine((x,), pool, pool, terms=terms + _FEW).box()


def _mean(x: Box, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Box:
    _float32(dtype)
    dims = _dims(dim, x)
    return _averaged(x, lambda v: v.mean(dims, keepdim), math.prod(x.shape[d] for d in dims))


def _total(x: Box, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Box:
    _float32(dtype)
    dims = _dims(dim, x)
    return _averaged(x, lambda v: v.sum(dims, keepdim), math.prod(x.shape[d] for d in dims))


def _float32(dtype: Any) -> None:
    if dtype not in (None, torch.float32):
        raise _NoRule(f"{dtype}: certificates are for float32")


# ---- pooling ----

def _average_pool(d: int) -> Callable[..., Box]:
    average: Any = getattr(F, f"avg_pool{d}d")

    def pool(x: Box, kernel_size: Any, stride: Any = None, padding: Any = 0,
             ceil_mode: bool = False, count_include_pad: bool = True,
             divisor_override: Any = None) -> Box:
        if len(x.shape) != d + 2:
            raise _NoRule("an image without a batch dimension")
        if divisor_override is not None and divisor_override < 0:
            raise _NoRule("a negative divisor")
        stride = kernel_size if stride is None else stride
        settings = (kernel_size, stride, padding, ceil_mode, count_include_pad)
        more = () if d == 1 else (divisor_override,)
        terms = math.prod(kernel_size) if isinstance(kernel_size, tuple) else kernel_size**d
        return _averaged(x, lambda v: average(v, *settings, *more), terms)
    return pool


def _adaptive_average(d: int) -> Callable[..., Box]:
    average: Any = getattr(F, f"adaptive_avg_pool{d}d")

    def pool(x: Box, output_size: Any) -> Box:
        if len(x.shape) != d + 2:
            raise _NoRule("an image without a batch dimension")
        sizes = average(x.lower[:1], output_size).shape[2:]
        terms = math.prod(a // b + 2 for a, b in zip(x.shape[2:], sizes, strict=True))
        return _averaged(x, lambda v: average(v, output_size), terms)
    return pool


def _max_pool(d: int, name: str) -> Callable[..., Box]:
    function: Any = getattr(F, f"{name}{d}d")

    def largest(x: Box, *args: Any, **settings: Any) -> Box:
        if settings.pop("return_indices", False) or len(x.shape) != d + 2:
            raise _NoRule("a pool with indices, or of one image without a batch dimension")

        def pool(v: Tensor) -> Tensor:
            result: Tensor = function(v, *args, **settings)
            return result
        lower, upper = pool(x.lower), pool(x.upper)
        return Box(lower, upper, Largest(x, pool, upper))
    return largest


def _extreme(dims: Callable[..., Tensor]) -> Callable[..., Box]:
    def rule(x: Box, dim: Any = (), keepdim: bool = False) -> Box:
        chosen = _dims(dim, x)
        return Box(dims(x.lower, chosen, keepdim), dims(x.upper, chosen, keepdim))
    return rule


# ---- values that are only moved ----

def _flatten(x: Box, start_dim: int = 0, end_dim: int = -1) -> Box:
    return _reshaped(x, lambda v: v.flatten(start_dim, end_dim))


def _view(x: Box, *shape: Any) -> Box:
    if any(isinstance(s, torch.dtype) for s in shape):
        raise _NoRule("a view as another type")
    return _reshaped(x, lambda v: v.reshape(*shape))


def _permute(x: Box, *dims: Any) -> Box:
    order = [d % len(x.shape) for d in (dims[0] if isinstance(dims[0], (tuple, list)) else dims)]
    if order[0] != 0:
        raise _NoRule("a permutation that moves the dimension of images")
    return _moved(x, lambda v: v.permute(order))


def _transpose(x: Box, dim0: int, dim1: int) -> Box:
    first, second = _dims((dim0, dim1), x)
    return _moved(x, lambda v: v.transpose(first, second))


def _squeeze(x: Box, dim: Any = None) -> Box:
    dims = [d for d in range(1, len(x.shape)) if x.shape[d] == 1] if dim is None else _dims(dim, x)
    return _reshaped(x, lambda v: v.squeeze(tuple(dims)))


def _unsqueeze(x: Box, dim: int) -> Box:
    if dim % (len(x.shape) + 1) == 0:
        raise _NoRule("a dimension before that of images")
    return _reshaped(x, lambda v: v.unsqueeze(dim))


def _cat(tensors: Sequence[Any], dim: int = 0) -> Box:
    boxes = tuple(tensors)
    if not all(isinstance(b, Box) for b in boxes):
        raise _NoRule("constants beside values")
    (chosen,) = _dims(dim, boxes[0])

    def join(*parts: Tensor) -> Tensor:
        return torch.cat(parts, chosen)
    return Affine(boxes, join, join).box()


def _split(x: Box, size: Any, dim: int = 0) -> tuple[Box, ...]:
    (chosen,) = _dims(dim, x)
    count = len(torch.split(x.lower, size, chosen))


    def part(i: int) -> Box:
        return _moved(x, lambda v: torch.split(v, size, chosen)[i])
    return tuple(part(i) for i in range(count))


def _chunk(x: Box, chunks: int, dim: int = 0) -> tuple[Box, ...]:
    (chosen,) = _dims(dim, x)
    return _split(x, -(-x.shape[chosen] // chunks), chosen)


def _item(x: Any, index: Any) -> Any:
    if not isinstance(x, Box):
        return x[index]
    parts = index if isinstance(index, tuple) else (index,)
    if not parts or not (parts[0] is Ellipsis or parts[0] == slice(None)) \
            or not all(p is Ellipsis or type(p) in (int, slice) for p in parts) \
            or len(parts) > len(x.shape):
        raise _NoRule("an index over images, or by a tensor")
    return _moved(x, lambda v: v[index])


def _pad(x: Box, pad: Any, mode: str = "constant", value: Any = None) -> Box:
    if value or len(pad) > 2 * (len(x.shape) - 1):
        raise _NoRule("padding with numbers other than 0, or over images")
    return _moved(x, lambda v: F.pad(v, pad, mode), injective=mode == "constant")


def _as_it_is(x: Any, *_args: Any, **_settings: Any) -> Any:
    return x


def _dropout(x: Box, p: float = 0.5, training: bool = True, inplace: bool = False) -> Box:
    if training and p > 0:
        raise _NoRule("dropout that is on in eval mode")
    return x


def _to(x: Box, *args: Any, **settings: Any) -> Box:
    for value in (*args, *settings.values()):
        if isinstance(value, (torch.dtype, Tensor)):
            _float32(getattr(value, "dtype", value))
    return x


# ---- activations ----

def _clamp(x: Box, min: Any = None, max: Any = None) -> Box:
    low = -math.inf if min is None else min
    high = math.inf if max is None else max
    if not all(isinstance(v, (int, float)) for v in (low, high)) or low > high:
        raise _NoRule("bounds that are no numbers, or in the wrong order")
    if (low, high) == (0, math.inf):
        return activated(nn.ReLU(), x)
    # The same function; its rule knows what rounding the bounds does.
    return activated(nn.Hardtanh(low if low > -_FAR else -_FAR, high if high < _FAR else _FAR), x)


def _activation(kind: str) -> Callable[..., Box]:
    def rule(x: Box, *args: Any, **settings: Any) -> Box:
        module = module_of(kind, (x, *args), settings, (Box, Tensor))
        if module is None:
            raise _NoRule("settings that are not known beforehand")
        return activated(module.eval(), x)
    return rule


def _prelu(x: Box, weight: Any) -> Box:
    return prelu(x, _weights(weight))


def _pooled(m: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(m, name) for name in names}


_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

# type of a leaf module -> rule(module, inputs...). Exact types: a subclass may compute otherwise.
MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    QuantActivation: quantized,
    nn.Linear: lambda m, x: _linear(x, m.weight, m.bias),
    **{cls: _conv_module(d) for d, cls in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)},
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
                    lambda m, x: _batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias,
                                             eps=m.eps)),
    nn.MaxPool1d: lambda m, x: _max_pool(1, "max_pool")(x, **_pooled(m, *_MAX)),
    nn.MaxPool2d: lambda m, x: _max_pool(2, "max_pool")(x, **_pooled(m, *_MAX)),
    nn.AdaptiveMaxPool1d: lambda m, x: _max_pool(1, "adaptive_max_pool")(
        x, m.output_size, return_indices=m.return_indices),
    nn.AdaptiveMaxPool2d: lambda m, x: _max_pool(2, "adaptive_max_pool")(
        x, m.output_size, return_indices=m.return_indices),
    nn.AvgPool1d: lambda m, x: _average_pool(1)(x, **_pooled(m, *_AVERAGE)),
    nn.AvgPool2d: lambda m, x: _average_pool(2)(x, **_pooled(m, *_AVERAGE, "divisor_override")),
    nn.AdaptiveAvgPool1d: lambda m, x: _adaptive_average(1)(x, m.output_size),
    nn.AdaptiveAvgPool2d: lambda m, x: _adaptive_average(2)(x, m.output_size),
    nn.Flatten: lambda m, x: _flatten(x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda m, x: _reshaped(
        x, lambda v: torch.unflatten(v, m.dim, m.unflattened_size)),
    nn.ZeroPad2d: lambda m, x: _pad(x, m.padding),
    nn.PReLU: lambda m, x: prelu(x, m.weight.detach()),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
                     nn.AlphaDropout, nn.FeatureAlphaDropout), lambda m, x: x),
    **dict.fromkeys([cls for cls in MODULE_KINDS if cls not in (nn.GLU, nn.Softmax)], activated),
}

# function -> rule
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _sub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _mul),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div), _div),
    **dict.fromkeys((operator.neg, torch.neg), _neg),
    operator.getitem: _item, F.linear: _linear, F.batch_norm: _batch_norm,
    F.conv1d: _convolution(1), F.conv2d: _convolution(2), F.conv3d: _convolution(3),
    F.max_pool1d: _max_pool(1, "max_pool"), F.max_pool2d: _max_pool(2, "max_pool"),
    torch.max_pool1d: _max_pool(1, "max_pool"), torch.max_pool2d: _max_pool(2, "max_pool"),
    F.adaptive_max_pool1d: _max_pool(1, "adaptive_max_pool"),
    F.adaptive_max_pool2d: _max_pool(2, "adaptive_max_pool"),
    F.avg_pool1d: _average_pool(1), F.avg_pool2d: _average_pool(2),
    F.adaptive_avg_pool1d: _adaptive_average(1), F.adaptive_avg_pool2d: _adaptive_average(2),
    torch.mean: _mean, torch.sum: _total, torch.amax: _extreme(torch.amax),
    torch.amin: _extreme(torch.amin), torch.flatten: _flatten, torch.reshape: _view,
    torch.permute: _permute, torch.transpose: _transpose, torch.squeeze: _squeeze,
    torch.unsqueeze: _unsqueeze, torch.cat: _cat, torch.concat: _cat, torch.split: _split,
    torch.chunk: _chunk, F.pad: _pad, F.dropout: _dropout, F.dropout2d: _dropout,
    torch.clamp: _clamp, F.prelu: _prelu, torch.prelu: _prelu,
    **{f: _activation(kind) for f, kind in FUNCTION_KINDS.items()
       if kind not in ("glu", "softmax", "attention", "prelu", "rrelu")},
}

# name of a method of Tensor -> rule
METHODS: dict[str, Callable[..., Any]] = {
    "add": _add, "add_": _add, "sub": _sub, "sub_": _sub, "mul": _mul, "mul_": _mul,
    "div": _div, "div_": _div, "neg": _neg, "mean": _mean, "sum": _total,
    "amax": _extreme(torch.amax), "amin": _extreme(torch.amin), "flatten": _flatten,
    "view": _view, "reshape": _view, "permute": _permute, "transpose": _transpose,
    "squeeze": _squeeze, "unsqueeze": _unsqueeze, "split": _split, "chunk": _chunk,
    "contiguous": _as_it_is, "detach": _as_it_is, "clone": _as_it_is, "float": _as_it_is,
    "to": _to, "clamp": _clamp, "clamp_": _clamp, "prelu": _prelu,
    **{name: _activation(kind) for name, kind in METHOD_KINDS.items()
       if kind not in ("softmax", "prelu")},
}


def apply(rule: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any],
          where: str) -> Any:
    """Call a rule; what it cannot do is one error that says where.

    Raises:
        ConversionError: the rule does not cover this call.
    """
    try:
        return rule(*args, **settings)
    except (_NoRule, TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise ConversionError(f"{where} cannot be bounded",
                              why=str(error).strip().splitlines()[0] if str(error) else "",
                              fix="See quantguard.certify for the operations that can.") from error
    except ConversionError as error:
        raise ConversionError(f"{where} cannot be bounded", why=error.what,
                              fix=error.fix) from None


