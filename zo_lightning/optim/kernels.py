"""Optional Triton kernels that draw a dense direction in registers while they write the result.

The direction z never lies in memory: element i is a pure function of (seed, i, kind), so the probe at ``+τ``, the probe at
``-τ`` and the update each draw it again. It is the counter-based generator Philox4x32-10 (Salmon et al., 2011, "Parallel
random numbers: as easy as 1, 2, 3") with counter ``i // 4`` and output word ``i % 4``. The numbers are other ones than those
of :mod:`zo_lightning.optim.directions`.

Triton is loaded at the first call that needs it, not when this module is imported.
"""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "Kind", "available", "displace", "fill", "update_"]

Kind = Literal["gaussian", "rademacher"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 1024  # elements of one program; no result depends on it
_LARGEST = (2**31 - 1) * _BLOCK  # CUDA's largest grid

_OPTIONS = {"enable_fp_fusion": False}
"""Of the compiler. It fuses nothing, so that z has the same bits in every kernel; what gains from it is written as ``fma``."""

tl: Any = None  # triton.language: bound by _load, because kernels look their names up among the module's


class _Kernels(NamedTuple):
    fill: Any
    displace: Any
    update: Any
    interpreted: bool


def available(device: torch.device) -> bool:
    """Whether this module's functions run on tensors of ``device``.

    Args:
        device: Device of the tensors.

    Returns:
        True where Triton can be imported and the device is a GPU that it supports (NVIDIA: compute capability 8.0 and later).
        With Triton's interpreter, which the environment variable ``TRITON_INTERPRET=1`` turns on before Triton is first
        imported, also for the CPU: slow, for tests, and as of Triton 3.9 it truncates to bfloat16 where a GPU rounds to
        nearest.
    """
    if device.type == "cpu":
        kernels = _load() if os.environ.get("TRITON_INTERPRET") == "1" else None
        return kernels is not None and kernels.interpreted
    return device.type == "cuda" and _supported(device) and _load() is not None


def fill(out: Tensor, seed: int, kind: Kind) -> Tensor:
    """Write the direction: ``out ← z``.

    Args:
        out: float32, bfloat16 or float16, contiguous, of any shape; z is drawn in float32 and rounded to nearest.
        seed: In ``[0, 2**63)``.
        kind: ``"gaussian"``: standard normal; ``"rademacher"``: ±1 with equal probability.

    Returns:
        ``out``.

    Raises:
        ValueError: If ``out`` is not contiguous, of another dtype, has more than ``(2**31 - 1) * 1024`` elements or lies where
            the kernels are not :func:`available`, if ``seed`` is out of range, or if ``kind`` is unknown.
    """
    kernels = _check("out", out, kind, seed=seed)
    _launch(kernels.fill, out, out, seed, GAUSSIAN=kind == "gaussian")
    return out


def displace(weight: Tensor, seed: int, tau: float, kind: Kind, out: Tensor | None = None) -> Tensor:
    """Return ``weight + tau · z``, with the sum in float32, rounded to nearest.

    Args:
        weight: float32, bfloat16 or float16, contiguous, of any shape.
        seed: In ``[0, 2**63)``.
        tau: Factor of z, in the weight's unit; rounded to float32.
        kind: As in :func:`fill`.
        out: Contiguous, of the weight's shape and dtype; a new tensor if None.

    Returns:
        ``out``, without gradient.

    Raises:
        ValueError: As :func:`fill`.
    """
    kernels = _check("weight", weight, kind, seed=seed)
    if out is None:
        out = torch.empty_like(weight, requires_grad=False)
    elif not out.is_contiguous() or out.shape != weight.shape or out.dtype != weight.dtype:
        raise ValueError(f"out must be contiguous, of shape {tuple(weight.shape)} and {weight.dtype}")
    _launch(kernels.displace, out, weight, out, seed, float(tau), GAUSSIAN=kind == "gaussian")
    return out


def update_(weight: Tensor, seed: int, factor: float, decay: float, kind: Kind, rounding_seed: int) -> None:
    """``weight ← decay · weight + factor · z`` in place, rounded stochastically where the weight is half precision.

    The mean over rounding seeds is the float32 value of the right-hand side, as with
    :func:`zo_lightning.optim.round_stochastically`, and infinities and NaN stay what they are.

    Args:
        weight: float32, bfloat16 or float16, contiguous, of any shape. A gradient is not recorded.
        seed: In ``[0, 2**63)``.
        factor: Factor of z, in the weight's unit; rounded to float32.
        decay: Factor of the weight; rounded to float32.
        kind: As in :func:`fill`.
        rounding_seed: In ``[0, 2**63)``; not used for float32. It may equal ``seed``: the streams are distinct.

    Raises:
        ValueError: As :func:`fill`.
    """
    kernels = _check("weight", weight, kind, seed=seed, rounding_seed=rounding_seed)
    _launch(kernels.update, weight, weight, seed, float(factor), float(decay), rounding_seed, GAUSSIAN=kind == "gaussian")


@cache
def _supported(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def _check(name: str, tensor: Tensor, kind: str, **seeds: int) -> _Kernels:
    """The kernels, once all arguments are known to be fit for them."""
    if kind not in ("gaussian", "rademacher"):
        raise ValueError(f"kind must be 'gaussian' or 'rademacher', not {kind!r}")
    for seed_name, seed in seeds.items():
        if not 0 <= seed < 2**63:
            raise ValueError(f"{seed_name} must be in [0, 2**63), not {seed}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, not {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (shape {tuple(tensor.shape)}, stride {tensor.stride()}): copy it first")
    if tensor.numel() > _LARGEST:
        raise ValueError(f"{name} has {tensor.numel()} elements, more than the {_LARGEST} of one launch: pass it in parts")
    kernels = _load() if available(tensor.device) else None
    if kernels is None:
        raise ValueError(f"{name} is on {tensor.device}, where the kernels do not run: they need Triton and a GPU")
    return kernels


def _launch(kernel: Any, written: Tensor, *arguments: Tensor | int | float, GAUSSIAN: bool) -> None:
    n = written.numel()
    if n == 0:
        return
    tensors = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
    # Triton launches on the current device, whatever the tensors' one
    with torch.cuda.device(written.device) if written.is_cuda else nullcontext():
        kernel[(-(-n // _BLOCK),)](*tensors, n, GAUSSIAN=GAUSSIAN, BLOCK=_BLOCK, **_OPTIONS)
    if not written.is_inference():
        torch.autograd.graph.increment_version(written)  # Triton writes behind autograd's back


@cache
def _load() -> _Kernels | None:
    """Compile lazily: bind Triton's names in this module and wrap the functions below; None without a usable Triton."""
    try:
        triton = importlib.import_module("triton")
        language = importlib.import_module("triton.language")
    except ImportError:
        return None
    names = globals()
    names["tl"] = language
    for helper in (_words, _in_order, _normal_pair, _draw, _round_stochastically):
        names[helper.__name__] = triton.jit(helper)
    # a fresh seed at every step must not compile anew
    fill, displace, update = (
        triton.jit(kernel, do_not_specialize=["seed", "rounding_seed"] if kernel is _update else ["seed"])
        for kernel in (_fill, _displace, _update)
    )
    compiled = isinstance(fill, triton.JITFunction)
    if compiled != isinstance(language.philox, triton.JITFunction):
        return None  # TRITON_INTERPRET was changed after Triton had been imported
    return _Kernels(fill, displace, update, interpreted=not compiled)


# What follows is Triton: names in capitals are known at compile time, all others are blocks or scalars on the device.


def _fill(out: tl.tensor, seed: tl.int64, n: tl.tensor, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr) -> None:
    program = tl.program_id(0).to(tl.int64)  # 64 bits: element numbers pass 2^31
    i = program * BLOCK + tl.arange(0, BLOCK)
    z = _draw(seed, program, GAUSSIAN, BLOCK)
    tl.store(out + i, z.to(out.dtype.element_ty), mask=i < n)


def _displace(
    weight: tl.tensor,
    out: tl.tensor,
    seed: tl.int64,
    tau: tl.float32,
    n: tl.tensor,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)  # 64 bits: element numbers pass 2^31
    i = program * BLOCK + tl.arange(0, BLOCK)
    z = _draw(seed, program, GAUSSIAN, BLOCK)
    value = tl.fma(tau, z, tl.load(weight + i, mask=i < n).to(tl.float32))
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)


def _update(
    weight: tl.tensor,
    seed: tl.int64,
    factor: tl.float32,
    decay: tl.float32,
    rounding_seed: tl.int64,
    n: tl.tensor,
    GAUSSIAN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)  # 64 bits: element numbers pass 2^31
    i = program * BLOCK + tl.arange(0, BLOCK)
    z = _draw(seed, program, GAUSSIAN, BLOCK)
    value = tl.fma(factor, z, decay * tl.load(weight + i, mask=i < n).to(tl.float32))
    if weight.dtype.element_ty != tl.float32:
        value = _round_stochastically(value, rounding_seed, program, weight.dtype.element_ty == tl.float16, BLOCK)
    tl.store(weight + i, value.to(weight.dtype.element_ty), mask=i < n)


def _draw(seed: tl.tensor, program: tl.tensor, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """The direction at a program's elements, float32."""
    x0, x1, x2, x3 = _words(seed, program, 0, BLOCK)
    if GAUSSIAN:
        z0, z1 = _normal_pair(x0, x1)
        z2, z3 = _normal_pair(x2, x3)
        z = _in_order(z0, z1, z2, z3, BLOCK)
    else:
        z = tl.where(_in_order(x0, x1, x2, x3, BLOCK) < 0x80000000, 1.0, -1.0)
    return z


def _words(seed: tl.tensor, program: tl.tensor, PURPOSE: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Four blocks of BLOCK / 4 random uint32: words 0 to 3 of Philox at the counters of a program's elements."""
    counter = program * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    # the purpose in the counter keeps directions and rounding apart even if their seeds are equal
    return tl.philox(seed, low, high, tl.full(low.shape, PURPOSE, tl.uint32), tl.zeros(low.shape, tl.uint32))


def _in_order(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """One block of BLOCK elements whose 4k + j-th one is ``xj[k]``."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BLOCK,))


def _normal_pair(x: tl.tensor, y: tl.tensor) -> tuple[tl.tensor, ...]:
    """Two independent standard normal blocks of two uint32 blocks (Box and Muller, 1958).

    The angle is reduced to ±π/4 in integers, exactly, so that Taylor polynomials of degree 9 and 8 do for sine and cosine;
    the general functions would reduce it once each, and in floating point.
    """
    u = tl.fma(x.to(tl.float32), 2.0**-32, 2.0**-33)  # in (0, 1]: r ends at 6.8
    r = tl.sqrt(tl.maximum(-1.3862943611198906 * tl.log2(u), 0.0))  # -2 ln u; 0 in case log2 is above 0 by an error
    quadrant = (y + 0x20000000) >> 30
    a = (y - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2π / 2^32
    s = a * a
    sine = tl.fma(a * s, tl.fma(s, tl.fma(s, tl.fma(s, 1 / 362880, -1 / 5040), 1 / 120), -1 / 6), a)
    cosine = tl.fma(s, tl.fma(s, tl.fma(s, tl.fma(s, 1 / 40320, -1 / 720), 1 / 24), -0.5), 1.0)
    odd = (quadrant & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    return r * cos, r * sin


def _round_stochastically(
    value: tl.tensor, seed: tl.tensor, program: tl.tensor, FLOAT16: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """``value`` moved to a neighbour on the half-precision grid, still float32; see ``round_stochastically`` for the why."""
    x0, x1, x2, x3 = _words(seed, program, 1, BLOCK)
    x = _in_order(x0, x1, x2, x3, BLOCK)
    pattern = value.to(tl.uint32, bitcast=True)
    finite = (pattern & 0x7F800000) != 0x7F800000
    if FLOAT16:
        relative = ((pattern + (x & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # below 2^-14 the grid is 2^-24 wide; by magnitude, so that the fraction is exact
        size = tl.abs(value)
        coarse = size < 2.0**-14
        grid = tl.where(coarse, size, 0.0) * 2.0**24
        below = tl.floor(grid)
        up = x < ((grid - below) * 2.0**32).to(tl.uint32)
        subnormal = (below + tl.where(up, 1.0, 0.0)) * 2.0**-24
        rounded = tl.where(coarse, tl.where(value < 0, -subnormal, subnormal), relative)
    else:
        rounded = ((pattern + (x & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(finite, rounded, value)
