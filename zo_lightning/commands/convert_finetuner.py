"""From the networks that were published with ZO Fine-tuner to this package's file."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.optim import ScaleNetworks

__all__ = ["convert_finetuner"]

# where the released code keeps each array: in a Linear(5, 64), and in a Linear(64, 1) after a Tanh
_PLACES = {"w1": ("0", "weight"), "b1": ("0", "bias"), "w2": ("2", "weight"), "b2": ("2", "bias")}
_SHAPES = {"w1": (64, 5), "b1": (64,), "w2": (1, 64), "b2": (1,)}
_ALLOWED = (nn.Linear, nn.Sequential, nn.Tanh)


def convert_finetuner(source: str, out: str, overwrite: bool = False) -> None:
    """Write the networks of a published ``.pth`` file as a safetensors file for ``--model.optimizer.init_args.networks``.

    The published files are pickles of modules, and a pickle can run any code when it is loaded. Here it is read with a list of
    what it may name (tensors, and the three kinds of module that the networks consist of), and refused if it names anything
    else.

    Args:
        source: The ``.pth`` file: a dictionary from parameter names to networks.
        out: The file to write, ending in ``.safetensors``.
        overwrite: Whether a file of that name may be replaced.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If the file to write exists.
        ValueError: If the source is refused, damaged, or holds something else.
    """
    target = Path(out)
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {out!r} must end in .safetensors")
    if target.exists() and not overwrite:
        raise FileExistsError(f"--out {out!r} exists; give another one, or --overwrite true")
    content = _read(source)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"--source {source!r} holds a {type(content).__name__}, not networks by the names of parameters")
    found: dict[str, list[Tensor]] = {key: [] for key in _PLACES}
    for name, network in content.items():
        if not isinstance(name, str):
            raise ValueError(f"--source {source!r}: {name!r} is no parameter's name")
        for key in _PLACES:
            found[key].append(_array(network, key, name, source))
    tensors = {key: torch.stack(arrays) for key, arrays in found.items()}
    shaped = {**tensors, "w2": tensors["w2"].squeeze(1), "b2": tensors["b2"].squeeze(1)}
    try:
        networks = ScaleNetworks.of(list(content), shaped)
    except ValueError as error:
        raise ValueError(f"--source {source!r}: {error}") from error
    networks.save(target)
    print(f"wrote {target}: the networks of {len(networks.names)} parameters, {shaped['w1'].dtype}")  # noqa: T201


def _read(source: str) -> Any:
    if not Path(source).is_file():
        raise FileNotFoundError(f"--source {source!r}: there is no such file")
    try:
        with torch.serialization.safe_globals(list(_ALLOWED)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write, which are refused or not all the same
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"--source {source!r} is refused: {_reason(error)}") from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"--source {source!r} cannot be read: {lines[0]}") from error


def _reason(error: Exception) -> str:
    """What a pickle asks for, out of a text that recommends to trust it."""
    for line in str(error).splitlines():
        if "GLOBAL" in line:  # the unpickler's word for a name that it would have to import
            said = line.strip().removeprefix("WeightsUnpickler error: ").split(". ")[0]
            return f"it asks for more than networks consist of ({said})"
    return "it is no file of networks that torch can read safely"


def _array(network: Any, key: str, name: str, source: str) -> Tensor:
    """One array of a network, read from where it lies: no method of an object from a pickle is called."""
    layer, place = _PLACES[key]
    try:
        value = vars(vars(network)["_modules"][layer])["_parameters"][place]
    except (TypeError, KeyError):
        raise ValueError(f"--source {source!r}: {name!r} is not Sequential(Linear(5, 64), Tanh(), Linear(64, 1))") from None
    if not isinstance(value, Tensor) or tuple(value.shape) != _SHAPES[key] or value.is_meta or value.layout != torch.strided:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"--source {source!r}: {name!r} has a layer {layer} with {place} {shape}, expected {_SHAPES[key]}")
    return value.detach()
