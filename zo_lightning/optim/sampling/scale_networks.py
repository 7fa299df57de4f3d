"""The networks of ZO Fine-tuner: one small network for each parameter tensor says how far to perturb it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from zo_lightning.optim.randomness import generator

__all__ = ["HIDDEN", "INPUTS", "ScaleNetworks", "plain_name"]

INPUTS = 5
"""Mean and variance of the tensor, the losses of the last step at x + εu and x - εu, and the last scale."""
HIDDEN = 64

_FORMAT = "zo_lightning.scale_networks"  # the one key of the metadata: the order of several differs from file to file
_VERSION = 1
# what modules that wrap a model put before its parameters' names: this package's and peft's, torch.compile's and DDP's
_WRAPPERS = re.compile(r"^(?:(?:base_model|model|module|_orig_mod)\.)+")
# what peft puts into them, for a layer beside which an adapter stands, and for one that is trained as a whole
_INSERTED = re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)(?=\.)")


class ScaleNetworks(nn.Module):
    """P networks 5 → 64 → 1, evaluated together: the scales σ of P parameter tensors (ZO Fine-tuner, 2025).

    The formula is, for each tensor j with inputs s_j::

        σ_j = | W2_j tanh(W1_j s_j + b1_j) + b2_j |

    They begin as ``nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))`` does in PyTorch, each from a generator of its
    own, which is a function of the seed and of the tensor's plain name: a model inside a wrapper begins with the same networks.

    Args:
        names: The names of the parameter tensors, as ``named_parameters`` gives them: a tied weight has its first one.
        seed: Of the initial weights.

    Attributes:
        names: The names.
        w1: W1, shape (P, 64, 5).
        b1: b1, shape (P, 64).
        w2: W2, shape (P, 64).
        b2: b2, shape (P,).

    Raises:
        ValueError: If there is no name, or one occurs twice.
    """

    def __init__(self, names: Sequence[str], seed: int = 0) -> None:
        super().__init__()
        self.names = tuple(names)
        if not self.names:
            raise ValueError("scale networks are of named parameters: got no name")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"two scale networks have the name {twice!r}")
        for key, shape in _shapes(len(self.names)).items():
            setattr(self, key, nn.Parameter(torch.empty(shape)))
        with torch.no_grad():
            for index, name in enumerate(self.names):
                source = generator(seed, plain_name(name), "scale networks")
                for key, fan_in in (("w1", INPUTS), ("b1", INPUTS), ("w2", HIDDEN), ("b2", HIDDEN)):
                    bound = 1 / math.sqrt(fan_in)
                    drawn = torch.empty(getattr(self, key).shape[1:], device="cpu")  # whatever the default device is
                    getattr(self, key)[index] = drawn.uniform_(-bound, bound, generator=source)

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    @classmethod
    def of(cls, names: Sequence[str], tensors: dict[str, Tensor]) -> ScaleNetworks:
        """Networks of given weights.

        Args:
            names: The names of the parameter tensors.
            tensors: ``w1``, ``b1``, ``w2`` and ``b2`` of the class's shapes and of one floating-point dtype.

        Raises:
            ValueError: If one is missing, has another shape or dtype, or holds NaN or infinite values.
        """
        networks = cls(names)
        for key, shape in _shapes(len(networks.names)).items():
            if key not in tensors or tuple(tensors[key].shape) != shape:
                found = tuple(tensors[key].shape) if key in tensors else "nothing"
                raise ValueError(f"networks of {len(networks.names)} parameters have {key} of shape {shape}, found {found}")
        dtypes = {tensors[key].dtype for key in _shapes(1)}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            raise ValueError(f"the networks' weights are of one floating-point dtype, found {sorted(map(str, dtypes))}")
        for key in _shapes(1):
            if not tensors[key].isfinite().all():
                raise ValueError(f"the networks' weights {key} hold NaN or infinite values")
            setattr(networks, key, nn.Parameter(tensors[key].detach().clone()))
        return networks

    def forward(self, inputs: Tensor) -> Tensor:
        """The scales.

        Args:
            inputs: s, shape (P, 5), in the networks' dtype.

        Returns:
            σ, shape (P,).
        """
        hidden = torch.tanh(torch.einsum("phi,pi->ph", self.w1, inputs) + self.b1)
        return ((self.w2 * hidden).sum(dim=1) + self.b2).abs()

    def matching(self, names: Sequence[str]) -> list[int | None]:
        """The number of the network of each parameter, None where there is none: by its name, or by its plain name."""
        exact = {name: index for index, name in enumerate(self.names)}
        plain: dict[str, int | None] = {}
        for index, name in enumerate(self.names):
            key = plain_name(name)
            plain[key] = None if key in plain else index  # of two that are equal but for their wrappers, neither is meant
        return [exact.get(name, plain.get(plain_name(name))) for name in names]

    def select(self, indices: Sequence[int], names: Sequence[str]) -> ScaleNetworks:
        """Some of the networks, under new names."""
        rows = torch.tensor(list(indices), dtype=torch.long)
        return ScaleNetworks.of(names, {key: getattr(self, key).detach()[rows] for key in _shapes(1)})

    def fingerprint(self) -> str:
        """A hash of names and weights: equal ones give equal scales."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for key in _shapes(1):
            digest.update(getattr(self, key).detach().cpu().double().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # ---- files ---------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write a safetensors file; one that was there is replaced in one stroke.

        Args:
            path: The file; its folder is made if need be.
        """
        from safetensors.torch import save_file  # torch alone is needed where no file is

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: getattr(self, key).detach().cpu().contiguous() for key in _shapes(1)}
        metadata = {_FORMAT: json.dumps({"version": _VERSION, "names": self.names})}
        unfinished = target.with_name(f"{target.name}.tmp")
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, target)

    @classmethod
    def load(cls, path: str | Path) -> ScaleNetworks:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, is of something else, or of a newer version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"networks {str(path)!r}: there is no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"networks {str(path)!r}: no safetensors file, or a damaged one ({error}); a published .pth is converted by "
                "zo-lightning convert-finetuner"
            ) from error
        if _FORMAT not in metadata:
            raise ValueError(f"networks {str(path)!r}: a safetensors file, but not of scale networks")
        try:
            head = json.loads(metadata[_FORMAT])
            version, names = head["version"], head["names"]
            if version == _VERSION:
                if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                    raise ValueError("the names are no list of texts")
                return cls.of(names, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"networks {str(path)!r} are damaged: {error}") from error
        raise ValueError(
            f"networks {str(path)!r}: of format version {version}, and this release reads version {_VERSION}: use the one that "
            "wrote it"
        )


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put before or into it.

    >>> plain_name("model.base_model.model.model.decoder.layers.0.fc1.base_layer.weight")
    'decoder.layers.0.fc1.weight'
    """
    return _INSERTED.sub("", _WRAPPERS.sub("", name))


def _shapes(count: int) -> dict[str, tuple[int, ...]]:
    return {"w1": (count, HIDDEN, INPUTS), "b1": (count, HIDDEN), "w2": (count, HIDDEN), "b2": (count,)}
