"""Put a peft adapter on a model, of which it alone is trained, saved and exported."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zo_lightning.modules.errors import ModelError

__all__ = ["adapter_config", "add_adapter", "is_prompt_learning"]

_TASK = "CAUSAL_LM"
# others (pissa, olora, loftq, ...) write the base's weights, which neither checkpoints nor exports of the adapter hold
_INITS_BESIDE_THE_BASE = (True, False, "gaussian", "orthogonal")


def adapter_config(peft: Mapping[str, Any]) -> Any:
    """The configuration object of ``peft`` (the library) that a dictionary describes.

    Args:
        peft: ``peft_type`` and the arguments of that type's configuration, as ``peft.get_peft_config`` takes them.

    Raises:
        ModelError: If peft is not installed, or the dictionary has a key or a value that does not fit.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ModelError(f"adapters need peft: pip install 'zo-lightning[peft]' ({error})") from error
    options = dict(peft)
    types = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = options.pop("peft_type", None)
    if name not in types:
        raise ModelError(f"peft: peft_type must be one of {', '.join(sorted(types))}, got {name!r}")
    fields = [field.name for field in dataclasses.fields(types[name]) if field.init]
    for key in options:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise ModelError(f"peft: {name} has no argument {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    if options.setdefault("task_type", _TASK) != _TASK:
        raise ModelError(f"peft: task_type must be {_TASK!r} or left out, got {options['task_type']!r}")
    init = options.get("init_lora_weights", True)
    if init not in _INITS_BESIDE_THE_BASE:
        known = ", ".join(map(repr, _INITS_BESIDE_THE_BASE))
        raise ModelError(f"peft: init_lora_weights must be one of {known}, got {init!r}, which changes the base's weights too")
    try:
        return types[name](**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"peft: {name} does not take these arguments: {str(error).splitlines()[0]}") from error


def add_adapter(
    model: PreTrainedModel, peft: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> tuple[Any, frozenset[str]]:
    """Wrap a model for training of an adapter; peft freezes everything else.

    The adapter's start is a function of the global seed alone, whatever has been drawn since.

    Args:
        model: The base; its modules are changed in place.
        peft: See :func:`adapter_config`.
        dtype: Of the adapter's weights.
        device: Where they are put.

    Returns:
        The ``peft.PeftModel``, and the names that the adapter's weights have in its ``state_dict``.

    Raises:
        ModelError: If the adapter does not fit the model; see also :func:`adapter_config`.
    """
    config = adapter_config(peft)
    from peft import get_peft_model

    before = set(model.modules())
    _check_readable(model, config)
    with _fresh_start(), _resident(model), warnings.catch_warnings():
        # it says what it sets right by itself for weights stored as (in, out)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            raise ModelError(f"peft: {str(error).splitlines()[0]}") from error
    added = [module for module in wrapped.modules() if module not in before]
    for module in added:
        # not module.to: the modules added around a base's layer own it too
        for weight in [*module._parameters.values(), *module._buffers.values()]:
            if weight is not None:
                weight.data = weight.data.to(device, dtype if weight.is_floating_point() else None)
    owned = {id(t) for module in added for t in [*module._parameters.values(), *module._buffers.values()] if t is not None}
    # with bias="all" or "lora_only" some of the base's own are trained
    owned |= {id(parameter) for parameter in wrapped.parameters() if parameter.requires_grad}
    names = frozenset(name for name, tensor in _named_tensors(wrapped) if id(tensor) in owned)
    if _is_offloaded(model) and any(parameter.requires_grad and parameter.is_meta for parameter in wrapped.parameters()):
        raise ModelError("peft: weights of the base that are offloaded cannot be trained; leave bias at 'none'")
    return wrapped, names


def is_prompt_learning(model: nn.Module | None) -> bool:
    """Whether a model's adapter adds virtual tokens or keys and values before the text, rather than weights to its layers."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _check_readable(model: PreTrainedModel, config: Any) -> None:
    """Refuse adapters that start from weights of the base where accelerate keeps these elsewhere."""
    if not _is_offloaded(model):
        return
    for key in ("modules_to_save", "trainable_token_indices", "prompt_tuning_init"):
        value = getattr(config, key, None)
        if value and not str(getattr(value, "value", value)).endswith("RANDOM"):
            raise ModelError(f"peft: {key} starts from weights of the base, and some of these are offloaded; leave it out")


def _is_offloaded(model: nn.Module) -> bool:
    return any(hasattr(m, "_hf_hook") and any(p.is_meta for p in m.parameters(recurse=False)) for m in model.modules())


@contextmanager
def _resident(model: nn.Module) -> Iterator[None]:
    """Within this context weights on the meta device seem to be on the CPU: peft puts an adapter where the weights are."""
    slots = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if p is not None and p.is_meta]
    seeming = {p: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=False) for *_, p in slots}
    try:
        for module, key, parameter in slots:
            module._parameters[key] = seeming[parameter]
        yield
    finally:
        for module, key, parameter in slots:
            parameter.requires_grad_(seeming[parameter].requires_grad)
            module._parameters[key] = parameter


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers; unlike ``state_dict`` it asks no quantised layer to convert its weights."""
    yield from module.named_parameters(remove_duplicate=False)
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{key}" if prefix else key, buffer


@contextmanager
def _fresh_start() -> Iterator[None]:
    """Within this context modules are made in float32 from the global seed, on the CPU so that they are the same anywhere."""
    width = torch.get_default_dtype()
    # not torch.manual_seed, which would seed the devices' generators too
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(torch.initial_seed())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(width)
