"""Load a pretrained decoder in the dtype that the Trainer's precision asks for, quantised or spread over devices on demand."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from zo_lightning.modules.errors import ModelError

__all__ = ["Placement", "execution_device", "is_immovable", "load_causal_lm", "load_config", "weights_dtype"]

_DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def weights_dtype(precision: str) -> torch.dtype:
    """The dtype of the weights under a ``Trainer(precision=...)``: mixed precisions keep them in float32."""
    return _DTYPES.get(precision, torch.float32)


def load_causal_lm(
    name_or_path: str,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Mapping[str, Any] | None = None,
    placement: Placement | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a decoder language model, whatever dtype its checkpoint was saved in.

    Args:
        name_or_path: A folder, or a name on the hub.
        dtype: Of the weights; of those that are not quantised, and of 4-bit weights while they are multiplied.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: Passed to transformers, for example ``"sdpa"`` or ``"flash_attention_2"``.
        quantization: Arguments of ``transformers.BitsAndBytesConfig``, for example ``{"load_in_8bit": True}``.
        placement: Which part of the model is kept where; accelerate brings it to the device that computes when it is needed.
        device: Where a quantised model without a ``placement`` is put; None takes the GPU if there is one.

    Returns:
        The model in eval mode, on the CPU unless ``quantization`` or ``placement`` say otherwise.

    Raises:
        ModelError: If it cannot be found or loaded, is not a decoder, or a library that it needs is missing.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    # Lightning calls configure_model under the device's context, under which transformers would need accelerate; Lightning
    # moves the model to the device itself
    with torch.device("cpu"):
        config = load_config(name_or_path, trust_remote_code=trust_remote_code)
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        if quantization is not None:
            options["quantization_config"] = _quantization_config(quantization, dtype)
            options["device_map"] = {"": device or torch.device("cuda" if torch.cuda.is_available() else "cpu")}
        if placement is not None and (given := placement.options()):
            options.update(given)
        if "device_map" in options:
            _need("accelerate", "quantised and offloaded models")
        try:
            return AutoModelForCausalLM.from_pretrained(name_or_path, config=config, dtype=dtype, **options)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(_not_loaded(name_or_path, error)) from error
        except RuntimeError as error:
            if "max_memory" not in options or torch.accelerator.is_available():
                raise
            raise ModelError(f"max_memory names a GPU and there is none here: {str(error).splitlines()[0]}") from error


def load_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a decoder language model.

    Args:
        name_or_path: A folder, or a name on the hub.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelError: If it cannot be found, or is not a decoder's.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_not_loaded(name_or_path, error)) from error
    _check_decoder(name_or_path, config)
    return config


@dataclass
class Placement:
    """Where transformers and accelerate are to keep the parts of a model.

    Attributes:
        device_map: ``"auto"``, or the device (``cpu`` and ``disk`` too) of each module.
        max_memory: For ``"auto"``: bytes, or a text such as ``"6GiB"``, for each device (a GPU's number, ``"cpu"``).
        offload_folder: Where what is kept on the disk is written, unless the model's own files can be read in place.
    """

    device_map: str | dict[str, Any] | None = None
    max_memory: dict[Any, Any] | None = None
    offload_folder: str | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``, without those that are not given."""
        given = {"device_map": self.device_map, "max_memory": self.max_memory, "offload_folder": self.offload_folder}
        if self.max_memory is not None:
            # a command line and YAML's {"0": ...} know texts only, accelerate numbers
            given["max_memory"] = {_number(key): size for key, size in self.max_memory.items()}
        return {key: value for key, value in given.items() if value is not None}


def is_immovable(model: nn.Module) -> bool:
    """Whether a model is to be left where it is, in its dtypes: it is quantised, or accelerate brings its weights along."""
    if getattr(model, "is_quantized", False):
        return True
    weights = any(p.is_meta or not (p.is_floating_point() or p.is_complex()) for p in model.parameters())
    return weights or any(hasattr(module, "_hf_hook") for module in model.modules())


def execution_device(model: nn.Module) -> torch.device:
    """Where a model's forwards run: where accelerate brings its weights, or where they are."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _quantization_config(quantization: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    _need("bitsandbytes", "quantised models")
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for key in quantization:
        if key not in known:
            raise ModelError(f"quantization: BitsAndBytesConfig has no argument {key!r}; it has {', '.join(known)}")
    options = dict(quantization)
    if options.get("load_in_4bit"):
        options.setdefault("bnb_4bit_compute_dtype", dtype)  # float32 by default, whatever the model's
    elif not options.get("load_in_8bit"):
        raise ModelError("quantization: say load_in_8bit: true or load_in_4bit: true")
    try:
        return BitsAndBytesConfig(**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"quantization: {str(error).splitlines()[0]}") from error


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{what} need {package}: pip install 'zo-lightning[quantization]'")


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdigit() else key


def _check_decoder(name: str, config: PretrainedConfig) -> None:
    kind = f"{name!r} is a model of type {config.model_type!r}"
    advice = "choose a decoder such as facebook/opt-125m"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}, an encoder-decoder, and prompts are scored by a decoder only; {advice}")
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # the model's own code says so
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{kind}, which is not a causal language model; {advice}")
    # transformers builds a causal model from BERT and its kin, whose weights were trained to see both sides
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(f"{kind}, an encoder trained with masked tokens (its is_decoder is not set); {advice}")


def _not_loaded(name: str, error: Exception) -> str:
    folder = Path(name)
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if folder.is_dir():
        return f"cannot load a model from the folder {name!r}: {reason}"
    where = f"no folder {str(folder.absolute())!r}"
    return f"cannot load the model {name!r}: there is {where}, and the hub answered: {reason}"
