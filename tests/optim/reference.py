"""Independent float64 recomputations, in numpy where possible, of what the package computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor, nn

from zo_lightning.optim import Factors

BASIC = ("gaussian", "low_rank", "rademacher", "sphere")
"""The families of directions that every geometry is for."""

LAWS = settings(deadline=None, max_examples=25, derandomize=True, database=None)


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's and buffer's raw bytes."""
    return {name: raw(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def dense(z: Tensor | Factors, shape: Sequence[int]) -> np.ndarray:
    """A draw as a float64 array of the parameter's shape."""
    if isinstance(z, Factors):
        return (z.left.double().numpy() @ z.right.double().numpy().T).reshape(tuple(shape))
    return z.double().numpy().reshape(tuple(shape))


def matrix(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(-1, 1)


def aspect(x: np.ndarray, transposed: bool) -> float:
    if x.ndim < 2:
        return 1.0
    m, n = matrix(x).shape
    return math.sqrt(n / m) if transposed else math.sqrt(m / n)


def norm(name: str, xs: Sequence[np.ndarray], radius: float = 1.0, transposed: bool = False) -> float:
    """The norm of a group, from the table of norms."""
    if name == "euclidean":
        return math.sqrt(sum(float((x**2).sum()) for x in xs)) / radius
    return max(_member_norm(name, x, transposed) for x in xs) / radius


def dual_norm(name: str, gs: Sequence[np.ndarray], radius: float = 1.0, transposed: bool = False) -> float:
    if name == "euclidean":
        return math.sqrt(sum(float((g**2).sum()) for g in gs)) * radius
    return sum(_member_dual_norm(name, g, transposed) for g in gs) * radius


def extreme(name: str, gs: Sequence[np.ndarray], radius: float = 1.0, transposed: bool = False) -> list[np.ndarray]:
    """``argmax ⟨g, s⟩`` over the unit ball."""
    if name == "euclidean":
        length = math.sqrt(sum(float((g**2).sum()) for g in gs))
        return [g * (radius / length if length else 0.0) for g in gs]
    return [_member_extreme(name, g, transposed) * radius for g in gs]


def _member_norm(name: str, x: np.ndarray, transposed: bool) -> float:
    w = matrix(x)
    if name == "sign":
        return float(np.abs(w).max())
    if name == "spectral":
        return float(np.linalg.svd(w, compute_uv=False).max()) / aspect(x, transposed)
    axis = {"row": 1, "column": 0}[name]
    return float(np.sqrt((w**2).mean(axis=axis)).max())


def _member_dual_norm(name: str, g: np.ndarray, transposed: bool) -> float:
    w = matrix(g)
    if name == "sign":
        return float(np.abs(w).sum())
    if name == "spectral":
        return float(np.linalg.svd(w, compute_uv=False).sum()) * aspect(g, transposed)
    axis = {"row": 1, "column": 0}[name]
    return float(np.sqrt((w**2).sum(axis=axis)).sum() * math.sqrt(w.shape[axis]))


def _member_extreme(name: str, g: np.ndarray, transposed: bool) -> np.ndarray:
    w = matrix(g)
    if name == "sign":
        s = np.sign(w)
    elif name == "spectral":
        left, values, right = np.linalg.svd(w, full_matrices=False)
        kept = values > values.max() * max(w.shape) * np.finfo(np.float32).eps
        s = (left * kept) @ right * aspect(g, transposed)
    else:
        axis = {"row": 1, "column": 0}[name]
        lengths = np.linalg.norm(w, axis=axis, keepdims=True)
        s = np.divide(w, lengths, out=np.zeros_like(w), where=lengths > 0) * math.sqrt(w.shape[axis])
    return s.reshape(g.shape)


def loss_at(module: nn.Module, weights: Mapping[str, np.ndarray | Tensor], loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The loss of a deep copy whose parameters are overwritten by ``weights``; the module itself is not involved."""
    other = copy.deepcopy(module)
    names = {name for name, _ in other.named_parameters()}
    with torch.no_grad():
        other.load_state_dict({n: torch.as_tensor(w) for n, w in weights.items() if n in names}, strict=False)
        return loss(other).detach()
