"""Weights as a forward pass is to see them: displaced, while the weight itself is only read.

A :class:`Shown` stands in a module's parameter slot for the duration of an evaluation. It is a tensor with the weight's own
storage, shape and dtype, and intercepts the functions that use it (``__torch_function__``, which ``torch.compile`` traces
too): a matrix ``W + L Vᵀ`` adds ``(x V) Lᵀ`` to its layer's output and is never formed. A function that has no such form here
is given the displaced weight as a tensor.

With several ``parts`` the leading dimension of the activations holds that many copies of the batch one after the other, and
each part sees a displacement of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_lightning.optim.precision import no_autocast

__all__ = ["METADATA", "Drawn", "NotStackableError", "Shown", "ShownDense", "ShownMatrix", "ShownVector"]

METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        *("device", "dtype", "grad", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps", "is_nested", "is_quantized"),
        *("is_sparse", "is_xpu", "itemsize", "layout", "names", "nbytes", "ndim", "requires_grad", "shape"),
    )
    if hasattr(getattr(Tensor, name, None), "__get__")
} | {
    getattr(Tensor, name)
    for name in (
        *("__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"),
        *("is_floating_point", "nelement", "numel", "size", "stride"),
    )
}
"""Functions that read no values."""


class NotStackableError(RuntimeError):
    """A function cannot give each part of a stacked batch its own displacement."""


class Shown(Tensor):
    """A displaced weight.

    Attributes:
        plain: The weight itself, which is only read.
        label: Its name, for messages.
        parts: In how many parts the batch comes, each with a displacement of its own.
    """

    plain: Tensor
    label: str
    parts: int
    handlers: ClassVar[dict[Any, Callable[..., Any]]] = {}
    """What a kind of shown weight does in a function; anything else forms the displaced weight."""

    @classmethod
    def stand_in(cls, name: str, plain: Tensor, parts: int) -> Any:
        """A tensor of ``plain``'s storage that stands for it."""
        shown = plain.detach().as_subclass(cls)
        with torch._C.DisableTorchFunctionSubclass():
            shown.requires_grad_(plain.requires_grad)
        shown.plain, shown.label, shown.parts = plain, name, parts
        return shown

    def value(self, part: int = 0) -> Tensor:
        """The displaced weight of one part, a new tensor of the weight's shape and dtype."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let the kind of weight answer for ``func``, or form the weight."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = cls.handlers.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*_formed(args, func), **dict(zip(kwargs, _formed(kwargs.values(), func), strict=True)))


def _formed(values: Iterable[Any], func: Any) -> list[Any]:
    """``values`` with the displaced weights formed; lists and tuples are looked into."""
    result = []
    for value in values:
        if isinstance(value, Shown):
            if value.parts > 1:
                label = getattr(func, "__name__", str(func))
                raise NotStackableError(f"{value.label} is used by {label}, which takes one weight for the whole batch")
            result.append(value.value())
        elif type(value) in (list, tuple):
            result.append(type(value)(_formed(value, func)))
        else:
            result.append(value)
    return result


# ---- vectors -----------------------------------------------------------------------------------------------------------
class ShownVector(Shown):
    """A vector (or scalar), with its displaced values at hand.

    Attributes:
        entries: Shape (parts, *shape), float32 or wider: displacements far below a half-precision weight's resolution count.
    """

    entries: Tensor

    def value(self, part: int = 0) -> Tensor:
        """See :meth:`Shown.value`."""
        return self.entries[part].to(self.plain.dtype)


def _spread(weight: Tensor, between: int) -> Tensor:
    """A vector for activations of shape (parts, ..., *shape), with ``between`` dimensions in the middle."""
    if isinstance(weight, ShownVector):
        return weight.entries.reshape(weight.parts, *(1,) * between, *weight.entries.shape[1:])
    return weight


def _divided(x: Tensor, parts: int, what: str) -> Tensor:
    """``x`` of shape (parts · n, ...) as (parts, n, ...)."""
    if x.dim() == 0 or x.shape[0] % parts:
        raise NotStackableError(f"{what} meets activations of shape {tuple(x.shape)}, which do not hold {parts} batches")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    vectors = [v for v in (weight, bias) if isinstance(v, ShownVector)]
    if isinstance(input, Shown) or any(isinstance(v, Shown) and not isinstance(v, ShownVector) for v in (weight, bias)):
        return NotImplemented
    parts = vectors[0].parts
    wide = vectors[0].entries.dtype
    if parts == 1 and (input.dtype == wide or torch.is_autocast_enabled(input.device.type)):
        given = [v.entries[0] if isinstance(v, ShownVector) else v for v in (weight, bias)]
        return F.layer_norm(input, normalized_shape, given[0], given[1], eps)
    normal = F.layer_norm(input, normalized_shape, None, None, eps)
    y = _divided(normal, parts, vectors[0].label)
    between = y.dim() - 1 - len(normalized_shape)
    with _as_they_are(y):  # in place: one pass, rounded once, as it is written
        if weight is None:
            assert bias is not None
            torch.add(y, _spread(bias, between), out=y)
        elif bias is None:
            torch.mul(y, _spread(weight, between), out=y)
        else:
            torch.addcmul(_spread(bias, between), y, _spread(weight, between), out=y)
    return y.view(normal.shape)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if not isinstance(weight, ShownVector):
        return NotImplemented
    normal = F.rms_norm(input, normalized_shape, None, eps)
    y = _divided(normal, weight.parts, weight.label)
    scaled = y * _spread(weight, y.dim() - 1 - len(normalized_shape))
    return scaled.to(normal.dtype).reshape(normal.shape)


def _elementwise(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a vector and activations of which the vector broadcasts over the last dimensions."""

    def answer(first: Any, second: Any, **kwargs: Any) -> Tensor:
        vector, other = (first, second) if isinstance(first, ShownVector) else (second, first)
        usable = isinstance(vector, ShownVector) and isinstance(other, Tensor) and not isinstance(other, Shown)
        if not usable or kwargs or (vector.parts > 1 and other.dim() <= vector.dim()):
            return NotImplemented
        dtype = torch.result_type(other, vector.plain)
        y = _divided(other, vector.parts, vector.label) if vector.parts > 1 else other.unsqueeze(0)
        values = _spread(vector, max(y.dim() - 1 - vector.dim(), 0))
        result = func(y, values) if vector is second else func(values, y)
        return result.to(dtype).reshape(other.shape if vector.parts > 1 else result.shape[1:])

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


# ---- matrices ----------------------------------------------------------------------------------------------------------
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


def _as_they_are(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast from rounding what is computed in float32 here; a form that costs nothing without it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


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
    with _as_they_are(inner):
        product = torch.bmm(inner.to(left.dtype), left.expand(parts, -1, -1))
    return out.copy_(product if bias is None else product + bias)


def _bias_for(bias: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """A bias for activations (parts, N, m)."""
    if isinstance(bias, Shown) and not isinstance(bias, ShownVector):
        bias = bias.value()
    return None if bias is None else _spread(bias, 1).detach().to(wide)


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
    return (y.view(parts, -1, y.shape[-1]) + _spread(bias, 1)).to(y.dtype).view(y.shape)


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
        # x (W + L Vᵀ) = x W + (x L) Vᵀ
        def start(dtype: torch.dtype) -> Tensor:
            inner = _projected(mat1.to(dtype), mat2.left.transpose(1, 2), mat2.parts)
            bias = _bias_for(input, mat2.left.dtype)
            return _outer(bias, inner, mat2.right.T.unsqueeze(0).to(mat2.left.dtype), dtype)

        return _affine(mat1, mat2.plain.detach(), start, mat2.scale, mat1.shape[:1])
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

        def start(dtype: torch.dtype) -> Tensor:
            inner = _projected(flat.to(dtype), second.left.transpose(1, 2), second.parts)
            return _outer(None, inner, second.right.T.unsqueeze(0).to(second.left.dtype), dtype)

        return _affine(flat, second.plain.detach(), start, second.scale, first.shape[:-1])
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
        _divided(input, weight.parts, weight.label)
    ids = input.reshape(weight.parts, 1, -1)
    rank = weight.left.shape[1]
    inner = weight.left.gather(2, ids.expand(-1, rank, -1)).transpose(1, 2)
    out = F.embedding(input, weight.plain.detach())
    wide = out.reshape(weight.parts, -1, out.shape[-1]).to(weight.left.dtype)
    right = weight.right.T.to(weight.left.dtype).unsqueeze(0)
    with _as_they_are(wide):
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
        with _as_they_are(inner):
            inner = _divided(inner, parts, weight.label).flatten(3).to(wide)  # (parts, n, r, places)
            moved = torch.einsum("pnrs,prm->pnms", inner, weight.left)
            out = torch.add(moved, _divided(y, parts, weight.label).flatten(3), alpha=weight.scale)
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


# ---- dense -------------------------------------------------------------------------------------------------------------
class Drawn(ABC):
    """A dense direction of one parameter, which is drawn when it is asked for.

    Attributes:
        in_registers: Whether :meth:`displaced` draws it without ever writing it, so that drawing it again costs no traffic.
    """

    in_registers: bool = False

    @abstractmethod
    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """First row, last row + 1, and these rows of the direction of a parameter seen as a matrix, float32."""

    def displaced(self, weight: Tensor, tau: float) -> Tensor:
        """``weight + τ u`` as a new tensor."""
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        source, target = _rows(weight), _rows(out)
        for first, last, u in self.pieces():
            target[first:last] = displaced(source[first:last], u, tau, spare=True)
        return out


class ShownDense(Shown):
    """A weight ``W + τ u`` with a dense u.

    Attributes:
        draws: For each part its direction and τ. Parts with the same direction share one draw of it.
    """

    draws: list[tuple[Drawn, float]]

    @no_autocast()
    def value(self, part: int = 0) -> Tensor:
        """See :meth:`Shown.value`."""
        drawn, tau = self.draws[part]
        return drawn.displaced(self.plain.detach(), tau)

    def _shared(self) -> list[tuple[Drawn, list[tuple[int, float]]]]:
        """Each direction with the parts that go along it, and their τ."""
        groups: list[tuple[Drawn, list[tuple[int, float]]]] = []
        for part, (drawn, tau) in enumerate(self.draws):
            if not groups or groups[-1][0] is not drawn:
                groups.append((drawn, []))
            groups[-1][1].append((part, tau))
        return groups

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear``, piece by piece of the weight, so that no more than a piece of the displaced weight exists."""
        flat = x.reshape(self.parts, -1, x.shape[-1])
        plain = self.plain.detach()
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if flat.dtype != dtype:
            flat = flat.to(dtype)
        out = torch.empty(*flat.shape[:-1], plain.shape[0], dtype=dtype, device=x.device)
        biases = [_bias_of(bias, part, dtype) for part in range(self.parts)]
        with no_autocast():
            for drawn, parts in self._shared():
                if drawn.in_registers:
                    for part, tau in parts:
                        out[part] = F.linear(flat[part], drawn.displaced(plain, tau).to(dtype), biases[part])
                    continue
                for first, last, u in drawn.pieces():
                    for number, (part, tau) in enumerate(parts):
                        spare = number == len(parts) - 1
                        weight = displaced(plain[first:last], u, tau, spare=spare).to(dtype)
                        b = biases[part]
                        if b is None:
                            torch.mm(flat[part], weight.T, out=out[part, :, first:last])
                        else:
                            torch.addmm(b[first:last], flat[part], weight.T, out=out[part, :, first:last])
        return out.view(*x.shape[:-1], -1)

    @no_autocast()
    def embedding(self, ids: Tensor) -> Tensor:
        """Only the rows that are looked up are displaced."""
        out = F.embedding(ids, self.plain.detach())
        places = _divided(ids, self.parts, self.label) if self.parts > 1 else ids.unsqueeze(0)
        moved = out.view(*places.shape, -1)
        for drawn, parts in self._shared():
            for first, last, u in drawn.pieces():
                for part, tau in parts:
                    hit = (places[part] >= first) & (places[part] < last)
                    rows = F.embedding((places[part] - first).clamp(0, last - first - 1), u)
                    moved[part] = torch.where(hit.unsqueeze(-1), displaced(moved[part], rows, tau), moved[part])
        return out


ShownDense.handlers = {F.linear: _linear, F.embedding: _embedding}


def _bias_of(bias: Tensor | None, part: int, dtype: torch.dtype) -> Tensor | None:
    if isinstance(bias, ShownVector):
        return bias.entries[part].to(dtype)
    if isinstance(bias, Shown):
        bias = bias.value(part)
    return None if bias is None else bias.detach().to(dtype)


def _rows(weight: Tensor) -> Tensor:
    """A tensor seen as a matrix."""
    return weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.reshape(-1, 1)


def displaced(weight: Tensor, u: Tensor, tau: float, *, spare: bool = False) -> Tensor:
    """``weight + τ u`` as a new tensor of the weight's dtype; the sum is taken in u's dtype, float32 or wider.

    Args:
        weight: The weight.
        u: The direction, of the weight's shape.
        tau: τ.
        spare: u is not needed any more, and its memory serves for the result.
    """
    if weight.dtype == u.dtype:
        return torch.add(weight, u, alpha=tau, out=u) if spare else torch.add(weight, u, alpha=tau)
    return (weight + tau * u).to(weight.dtype)
