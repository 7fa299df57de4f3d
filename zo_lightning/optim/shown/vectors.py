"""Vectors (biases, norms) and scalars, with their displaced values at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_lightning.optim.shown.base import Shown, divided

__all__ = ["ShownVector", "spread"]


class ShownVector(Shown):
    """A vector (or scalar), with its displaced values at hand.

    Attributes:
        entries: Shape (parts, *shape), float32 or wider: displacements far below a half-precision weight's resolution count.
        rows: The entries with a dimension in the middle, where whoever made the stand-in has them at hand.
    """

    entries: Tensor
    rows: Tensor | None = None

    def value(self, part: int = 0) -> Tensor:
        """See :meth:`Shown.value`."""
        return self.entries[part].to(self.plain.dtype)


def spread(weight: Tensor, between: int) -> Tensor:
    """A vector for activations of shape (parts, ..., *shape), with ``between`` dimensions in the middle."""
    if isinstance(weight, ShownVector):
        if between == 1 and weight.rows is not None:
            return weight.rows
        return weight.entries.view(weight.parts, *(1,) * between, *weight.entries.shape[1:])
    return weight


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    first = weight if isinstance(weight, ShownVector) else bias
    if not isinstance(first, ShownVector) or isinstance(input, Shown) or _is_other(weight) or _is_other(bias):
        return NotImplemented
    parts, wide = first.parts, first.entries.dtype
    if parts == 1 and (input.dtype == wide or torch.is_autocast_enabled(input.device.type)):
        given = [v.entries[0] if isinstance(v, ShownVector) else v for v in (weight, bias)]
        return torch.layer_norm(input, normalized_shape, given[0], given[1], eps)  # F's would look for handlers once more
    normal = torch.layer_norm(input, normalized_shape, None, None, eps)
    if len(normalized_shape) == 1 and normal.dim() > 1 and normal.shape[0] % parts == 0:
        y, between = normal.view(parts, -1, normal.shape[-1]), 1
    else:
        y = divided(normal, parts, first.label)
        between = y.dim() - 1 - len(normalized_shape)
    # in place: one pass, rounded once, as it is written; autocast leaves what has an output alone
    if weight is None:
        assert bias is not None
        torch.add(y, spread(bias, between), out=y)
    elif bias is None:
        torch.mul(y, spread(weight, between), out=y)
    else:
        torch.addcmul(spread(bias, between), y, spread(weight, between), out=y)
    return y.view(normal.shape)


def _is_other(value: Any) -> bool:
    return isinstance(value, Shown) and not isinstance(value, ShownVector)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if not isinstance(weight, ShownVector):
        return NotImplemented
    normal = F.rms_norm(input, normalized_shape, None, eps)
    y = divided(normal, weight.parts, weight.label)
    scaled = y * spread(weight, y.dim() - 1 - len(normalized_shape))
    return scaled.to(normal.dtype).reshape(normal.shape)


def _result_type(other: Tensor, vector: Tensor) -> torch.dtype:
    """``torch.result_type``, which torch.compile does not know: a scalar does not count beside a tensor with dimensions."""
    if other.is_floating_point() and bool(other.dim()) != bool(vector.dim()):
        return other.dtype if other.dim() else vector.dtype
    return torch.promote_types(other.dtype, vector.dtype)


def _elementwise(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a vector and activations of which the vector broadcasts over the last dimensions."""

    def answer(first: Any, second: Any, **kwargs: Any) -> Tensor:
        vector, other = (first, second) if isinstance(first, ShownVector) else (second, first)
        usable = isinstance(vector, ShownVector) and isinstance(other, Tensor) and not isinstance(other, Shown)
        if not usable or kwargs or (vector.parts > 1 and other.dim() <= vector.dim()):
            return NotImplemented
        dtype = _result_type(other, vector)
        y = divided(other, vector.parts, vector.label) if vector.parts > 1 else other.unsqueeze(0)
        values = spread(vector, max(y.dim() - 1 - vector.dim(), 0))
        result = func(y, values) if vector is second else func(values, y)
        return result.to(dtype).flatten(0, 1) if vector.parts > 1 else result.to(dtype).squeeze(0)

    return answer


ShownVector.handlers = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    **{
        func: _elementwise(func)
        for name in ("add", "sub", "mul")
        for func in (getattr(torch, name), getattr(Tensor, name), getattr(Tensor, f"__{name}__"))
    },
    # the reflected forms come as the vector's own method, the vector first
    Tensor.__radd__: _elementwise(torch.add),
    Tensor.__rmul__: _elementwise(torch.mul),
    Tensor.__rsub__: _elementwise(lambda v, y: y - v),
}
