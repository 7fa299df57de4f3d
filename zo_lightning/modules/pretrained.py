"""Load a pretrained decoder in the dtype that the Trainer's precision asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from zo_lightning.modules.errors import ModelError

__all__ = ["load_causal_lm", "weights_dtype"]

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
) -> PreTrainedModel:
    """Load a decoder language model, whatever dtype its checkpoint was saved in.

    Args:
        name_or_path: A folder, or a name on the hub.
        dtype: Of the weights.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: Passed to transformers, for example ``"sdpa"`` or ``"flash_attention_2"``.

    Returns:
        The model, on the CPU and in eval mode.

    Raises:
        ModelError: If it cannot be found or loaded, or is not a decoder.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    # Lightning calls configure_model under the device's context, under which transformers would need accelerate; Lightning
    # moves the model to the device itself
    with torch.device("cpu"):
        try:
            config = AutoConfig.from_pretrained(name_or_path, **options)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(_not_loaded(name_or_path, error)) from error
        _check_decoder(name_or_path, config)
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        try:
            return AutoModelForCausalLM.from_pretrained(name_or_path, config=config, dtype=dtype, **options)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(_not_loaded(name_or_path, error)) from error


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
