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
    """

    left: Tensor
    right: Tensor
    scale: float

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
    if not isinstance(weight, ShownMatrix) or weight.dim() != 2 or (dim0 - dim1) % 2 == 0:
        return NotImplemented
    shown = _Transposed.stand_in(weight.label, weight.plain.detach().T, weight.parts)
    shown.of = weight
    return shown


def _projected(x: Tensor, factor: Tensor, parts: int) -> Tensor:
    """``x`` (parts · N, n) times ``factor`` (n, r) or (parts, n, r): shape (parts, N, r)."""
    if factor.dim() == 2:
        return (x @ factor.to(x.dtype)).view(parts, -1, factor.shape[1])
    return torch.bmm(x.reshape(parts, -1, x.shape[1]), factor.to(x.dtype))


def _outer(bias: Tensor | None, inner: Tensor, left: Tensor, dtype: torch.dtype) -> Tensor:
    """``bias + inner left``, shape (parts, N, m), from (parts, N, r) and (parts or 1, r, m), rounded to ``dtype`` once."""
    parts, rows, rank = inner.shape
    out = torch.empty(parts, rows, left.shape[2], dtype=dtype, device=inner.device)
    if rank == 1 and (bias is None or bias.dtype == left.dtype):
        # one pass that rounds as it writes; on CUDA without a float32 temporary
        if bias is None:
            return torch.mul(inner, left, out=out)
        return torch.addcmul(bias, inner, left, out=out)
    with as_they_are(inner):
        product = torch.bmm(inner.to(left.dtype), left.expand(parts, -1, -1))
    return out.copy_(product if bias is None else product + bias)


def _bias_for(bias: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """A bias for activations (parts, N, m)."""
    if isinstance(bias, Shown) and not isinstance(bias, ShownVector):
        if bias.parts > 1:
            raise NotStackableError(f"{bias.label} is used as a bias, which takes one weight for the whole batch")
        bias = bias.value()
    return None if bias is None else spread(bias, 1).detach().to(wide)


def _affine(x: Tensor, plain: Tensor, start: Callable[[torch.dtype], Tensor], scale: float, shape: Sequence[int]) -> Tensor:
    """``start + scale · x plain`` with x (N, n) and plain (n, m)."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, plain = x.to(dtype), plain.to(dtype)
    y = start(x.dtype).view(x.shape[0], -1)
    # the product is added to what is there, as it would be to a bias: the displacement costs no pass over the output
    return y.addmm_(x, plain, alpha=scale).view(*shape, -1)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, Shown):
        return NotImplemented
    x = input.reshape(-1, input.shape[-1])
    shown = weight if isinstance(weight, Shown) else bias
    if not isinstance(shown, Shown) or x.shape[0] % shown.parts:
        return NotImplemented
    parts = shown.parts
    if isinstance(weight, ShownMatrix) and weight.dim() == 2:

        def start(dtype: torch.dtype) -> Tensor:
            inner = _projected(x.to(dtype), weight.right, parts)
            return _outer(_bias_for(bias, weight.left.dtype), inner, weight.left, dtype)

        return _affine(x, weight.plain.detach().T, start, weight.scale, input.shape[:-1])
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

    def start(dtype: torch.dtype) -> Tensor:
        inner = _projected(x.to(dtype), weight.left.transpose(1, 2), weight.parts)
        wide = weight.left.dtype
        return _outer(_bias_for(bias, wide), inner, weight.right.T.unsqueeze(0).to(wide), dtype)

    return _affine(x, weight.plain.detach(), start, weight.scale, shape)


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
    if isinstance(mat2, ShownMatrix) and mat2.dim() == 2 and mat1.shape[0] % mat2.parts == 0:
        return _times(mat1, mat2, input, mat1.shape[:1])
    if isinstance(mat2, Shown) or not isinstance(input, ShownVector) or input.parts == 1:
        return NotImplemented
    return _linear(mat1, mat2.T, input)


def _matmul(first: Any, second: Any) -> Tensor:
    if isinstance(first, Shown) or first.dim() < 2:
        return NotImplemented
    if isinstance(second, _Transposed):
        return _linear(first, second.of)
    if isinstance(second, ShownMatrix) and second.dim() == 2:
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
    if not isinstance(weight, ShownMatrix) or weight.dim() != 2:
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
