"""The fingerprint of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["update_hash", "weights_hash"]


def weights_hash(module: nn.Module, *, parameters: bool = True, buffers: bool = True) -> str:
    """The sha256 of a module's weights, tensor by tensor in the order of their names: no second copy of the model is made.

    Args:
        module: Frozen parameters count too, a tied one once, by its first name. What is pending of a zeroth-order update does
            not count: call ``optimizer.fold()`` before.
        parameters: Whether parameters count.
        buffers: Whether persistent buffers count.

    Returns:
        64 hexadecimal digits: a function of names, dtypes, shapes and bits, whatever the device.
    """
    named: dict[str, Tensor] = dict(module.named_parameters()) if parameters else {}
    if buffers:
        named.update(_persistent_buffers(module))
    digest = hashlib.sha256()
    for name in sorted(named):
        update_hash(digest, name, named[name])
    return digest.hexdigest()


def update_hash(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, dtype, shape and bits to a hash."""
    digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, owner in module.named_modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield (f"{prefix}.{key}" if prefix else key), buffer
