"""Matrices ``s W + L Vᵀ``: L Vᵀ is added to what the weight gives, and never formed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_lightning.optim.precision import no_autocast
from zo_lightning.optim.shown.base import NotStackableError, Shown, as_they_are, divided
from zo_lightning.optim.shown.dense import ShownDense
from zo_lightning.optim.shown.vectors import ShownVector, spread

__all__ = ["ShownMatrix"]


class ShownMatrix(Shown):
    """A matrix ``s W + L Vᵀ`` of m rows and n columns, with an L for each part.

    Attributes:
        left: L transposed, shape (parts, r, m), float32 or wider.
        right: V, shape (n, r), the weight's dtype.
        scale: s, which weight decay makes less than 1 between two writes of the weight.
        turned: The weight transposed, where whoever made the stand-in has it at hand.
        single: The left factor of the only part, where there is only one and its rank is 1: shape (1, m).
    """

    left: Tensor
    right: Tensor
    scale: float
    turned: Tensor | None = None
    single: Tensor | None = None

    @no_autocast()
    def value(self, part: int = 0) -> Tensor:
        """See :meth:`Shown.value`."""
        plain = self.plain.detach()
        wide = plain.to(self.left.dtype).reshape(self.left.shape[2], -1)
        moved = torch.addmm(wide, self.left[part].T, self.right.to(wide.dtype).T, beta=self.scale)
        return moved.to(plain.dtype).reshape(plain.shape)


class _Transposed(Shown):
    """The transpose of a shown matrix."""

    of: ShownMatrix

    def value(self, part: int = 0) -> Tensor:
        """See :meth:`Shown.value`."""
        return self.of.value(part).T


def _transpose(weight: ShownMatrix, dim0: int = 0, dim1: int = 1) -> Any:
    if not isinstance(weight, ShownMatrix) or not weight.flat or (dim0 - dim1) % 2 == 0:
        return NotImplemented
    shown = _Transposed.stand_in(weight.label, weight.plain.detach().T, weight.parts)
    shown.of = weight
    return shown


def _bias_for(bias: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """A bias for activations (parts, N, m)."""
    if isinstance(bias, ShownVector):
        return spread(bias, 1)
    if isinstance(bias, Shown):
        if bias.parts > 1:
            raise NotStackableError(f"{bias.label} is used as a bias, which takes one weight for the whole batch")
        bias = bias.value()
    return None if bias is None else bias.detach().to(wide)


def _affine(x: Tensor, plain: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, scale: float, parts: int) -> Tensor:
    """``bias + scale · x plain + (x first) second``, shape (parts, N, m), or (N, m) where ``second`` has two dimensions.

    Every call of torch costs the host as much as a small kernel costs the device: there are as few as can be.

    Args:
        x: Shape (parts · N, n).
        plain: Shape (n, m).
        first: Shape (n, r) or (parts, n, r).
        second: Shape (parts or 1, r, m), or (1, m) for one part; float32 or wider.
        bias: Broadcasts to the result; of the dtype of ``second``.
        scale: s.
        parts: The number of parts.
    """
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, plain = x.to(kind), plain.to(kind)
    dtype, wide = x.dtype, second.dtype
    if first.dtype != dtype:
        first = first.to(dtype)
    rank, columns = second.shape[-2:]
    if first.dim() == 3:
        inner = torch.bmm(x.view(parts, -1, x.shape[1]), first)
    elif second.dim() == 3:
        inner = torch.mm(x, first).view(parts, -1, rank)
    else:
        inner = torch.mm(x, first)
    if rank == 1 and (bias is None or bias.dtype == wide):
        # one pass that rounds as it writes; on CUDA without a float32 temporary
        if dtype == wide:
            y = inner * second if bias is None else torch.addcmul(bias, inner, second)
        else:
            y = torch.empty((*inner.shape[:-1], columns), dtype=dtype, device=x.device)
            torch.mul(inner, second, out=y) if bias is None else torch.addcmul(bias, inner, second, out=y)
    else:
        with as_they_are(inner):
            y = torch.matmul(inner.to(wide), second)
            y = (y if bias is None else y + bias).to(dtype)
    # the product is added to what is there, as it would be to a bias: the displacement costs no pass over the output
    out = y if y.dim() == 2 else y.view(-1, columns)
    out.addmm_(x, plain) if scale == 1 else out.addmm_(x, plain, alpha=scale)
    return y


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, Shown):
        return NotImplemented
    if isinstance(weight, ShownMatrix) and weight.flat:
        shape, parts = input.shape, weight.parts
        x = input if len(shape) == 2 else input.reshape(-1, shape[-1])
        if x.shape[0] % parts:
            return NotImplemented
        plain = weight.plain.t() if weight.turned is None else weight.turned
        left = weight.left if weight.single is None else weight.single
        y = _affine(x, plain, weight.right, left, _bias_for(bias, left.dtype), weight.scale, parts)
        return y if y.dim() == 2 and len(shape) == 2 else y.view(*shape[:-1], -1)
    shown = weight if isinstance(weight, Shown) else bias
    if not isinstance(shown, Shown):
        return NotImplemented
    parts, rows = shown.parts, input.shape[:-1].numel()
    if rows % parts:
        return NotImplemented
    if isinstance(weight, ShownDense):
        return weight.linear(input, bias)
    if parts == 1:
        return NotImplemented  # form what is left
    if isinstance(weight, Shown) or not isinstance(bias, ShownVector):
        return NotImplemented
    y = F.linear(input, weight)
    return (y.view(parts, -1, y.shape[-1]) + spread(bias, 1)).to(y.dtype).view(y.shape)


def _times(x: Tensor, weight: ShownMatrix, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """``bias + x W`` for a weight stored (in, out): ``x (s W + L Vᵀ) = s x W + (x L) Vᵀ``."""
    wide = weight.left.dtype
    first, second = weight.left.transpose(1, 2), weight.right.t().unsqueeze(0).to(wide)
    y = _affine(x, weight.plain.detach(), first, second, _bias_for(bias, wide), weight.scale, weight.parts)
    return y.view(*shape, -1)


def _addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    """``input + mat1 mat2`` as transformers' Conv1D uses it: the weight is stored (in, out)."""
    if isinstance(mat1, Shown) or beta != 1 or alpha != 1:
        return NotImplemented
    if isinstance(mat2, ShownMatrix) and mat2.flat and mat1.shape[0] % mat2.parts == 0:
        return _times(mat1, mat2, input, mat1.shape[:1])
    if isinstance(mat2, Shown) or not isinstance(input, ShownVector) or input.parts == 1:
        return NotImplemented
    return _linear(mat1, mat2.T, input)


def _matmul(first: Any, second: Any) -> Tensor:
    if isinstance(first, Shown) or first.dim() < 2:
        return NotImplemented
    if isinstance(second, _Transposed):
        return _linear(first, second.of)
    if isinstance(second, ShownMatrix) and second.flat:
        flat = first.reshape(-1, first.shape[-1])
        if flat.shape[0] % second.parts:
            return NotImplemented
        return _times(flat, second, None, first.shape[:-1])
    return NotImplemented


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if isinstance(input, Shown) or max_norm is not None:
        return NotImplemented
    if isinstance(weight, ShownDense):
        return weight.embedding(input)
    if not isinstance(weight, ShownMatrix) or not weight.flat:
        return NotImplemented
    if weight.parts > 1:
        divided(input, weight.parts, weight.label)
    ids = input.reshape(weight.parts, 1, -1)
    rank = weight.left.shape[1]
    inner = weight.left.gather(2, ids.expand(-1, rank, -1)).transpose(1, 2)
    out = F.embedding(input, weight.plain.detach())
    wide = out.reshape(weight.parts, -1, out.shape[-1]).to(weight.left.dtype)
    right = weight.right.T.to(weight.left.dtype).unsqueeze(0)
    with as_they_are(wide):
        if weight.scale != 1:
            wide = wide * weight.scale
        wide = torch.addcmul(wide, inner, right) if rank == 1 else torch.baddbmm(wide, inner, right.expand(len(wide), -1, -1))
    return wide.to(out.dtype).view(out.shape)


def _convolution(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A convolution: V's columns are r kernels, whose outputs L mixes."""

    def answer(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(input, Shown) or not isinstance(weight, ShownMatrix) or groups != 1 or input.dim() != weight.dim():
            return NotImplemented
        y = func(input, weight.plain.detach(), None, stride, padding, dilation)
        kernels = weight.right.T.reshape(-1, *weight.shape[1:])
        inner = func(input, kernels, None, stride, padding, dilation)
        parts, wide = weight.parts, weight.left.dtype
        with as_they_are(inner):
            inner = divided(inner, parts, weight.label).flatten(3).to(wide)  # (parts, n, r, places)
            moved = torch.einsum("pnrs,prm->pnms", inner, weight.left)
            out = torch.add(moved, divided(y, parts, weight.label).flatten(3), alpha=weight.scale)
            if bias is not None:
                out = out + _bias_for(bias, wide).unsqueeze(-1)  # type: ignore[union-attr]
        return out.to(y.dtype).view(y.shape)

    return answer


ShownMatrix.handlers = {
    **{func: _convolution(func) for func in (F.conv1d, F.conv2d, F.conv3d)},
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: lambda weight, indices, *rest: _embedding(indices, weight),
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.t: _transpose,
    torch.t: _transpose,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    **{getattr(Tensor, name).__get__: _transpose for name in ("T", "mT")},
}
_Transposed.handlers = dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm), _matmul)
# a bias may be all that a function has of ours
ShownVector.handlers |= {F.linear: _linear, torch.addmm: _addmm}
ShownDense.handlers = {F.linear: _linear, F.embedding: _embedding}
