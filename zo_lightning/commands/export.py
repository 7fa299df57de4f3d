"""From a checkpoint to a folder in the layout of the Hugging Face hub."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import zo_lightning.modules
from zo_lightning.commands.folder import check_out, make_room
from zo_lightning.modules import LanguageModelModule, ModelError
from zo_lightning.modules.adapters import is_prompt_learning

__all__ = ["export"]

# what an earlier export has written; a weight that is left over would be loaded with the new ones, or in their place
_WRITTEN = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "config.json",
)


def export(
    checkpoint: str,
    out: str,
    merge: bool | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model of a checkpoint, with its tokenizer, as a folder that transformers or peft load.

    Args:
        checkpoint: A file that the Trainer wrote.
        out: The folder to write.
        merge: Whether an adapter is added to the weights, so that transformers loads the result without peft, or written by
            itself for ``peft.PeftModel.from_pretrained``. By default it is merged where that is possible: not into a
            quantised base, and not if it consists of virtual tokens.
        dtype: Of the weights; that of the training by default.
        overwrite: Whether a folder that is not empty may be written into.

    Raises:
        ModelError: If the checkpoint cannot be read, is not of this package, or its adapter cannot be merged.
        FileExistsError: If the folder is not empty.
    """
    content = _read(checkpoint)
    folder = check_out(out, overwrite)
    module = _module_of(content, checkpoint)
    quantised = module.quantization is not None
    if merge and module.peft is None:
        raise ModelError(f"--merge: the checkpoint {checkpoint!r} has no adapter to merge")
    if merge and quantised:
        raise ModelError("--merge: the adapter was trained on quantised weights, without which it gives other logits")
    with_base = module.peft is None or (not quantised if merge is None else merge)
    model = _filled(module, content["state_dict"], checkpoint, with_base=with_base)
    if with_base and module.peft is not None:
        if not is_prompt_learning(model) and hasattr(model.base_model, "merge_and_unload"):
            model = model.merge_and_unload()
        elif merge:
            raise ModelError(f"--merge: an adapter of type {module.peft['peft_type']} cannot be merged; use --merge false")
    if dtype is not None:
        _cast(model, getattr(torch, dtype))
    make_room(folder, _WRITTEN)
    # by itself, an adapter of embeddings would have all of them written beside it
    options = {} if isinstance(model, PreTrainedModel) else {"save_embedding_layers": False}
    model.save_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(module.model_name_or_path, trust_remote_code=module.trust_remote_code)
    tokenizer.save_pretrained(folder)
    loader = "AutoModelForCausalLM" if isinstance(model, PreTrainedModel) else "PeftModel"
    print(f"wrote {folder}; load it by {loader}.from_pretrained")  # noqa: T201


def _read(checkpoint: str) -> dict[str, Any]:
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"--checkpoint {checkpoint!r}: there is no such file")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ModelError(f"--checkpoint {checkpoint!r} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters", "zo_lightning"} <= content.keys():
        raise ModelError(f"--checkpoint {checkpoint!r} is not one of a run of zo-lightning with a language model")
    return content


def _module_of(content: dict[str, Any], checkpoint: str) -> LanguageModelModule:
    """The module of the checkpoint, with nothing loaded."""
    name = content["zo_lightning"].get("module")
    # a class of this package, by its name: a checkpoint does not decide what is imported
    kind = getattr(zo_lightning.modules, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, LanguageModelModule)):
        raise ModelError(f"--checkpoint {checkpoint!r} is of the module {name!r}, which this version cannot export")
    known = _arguments(kind) - {"optimizer", "lr_scheduler"}
    return kind(**{key: value for key, value in content["hyper_parameters"].items() if key in known})


def _arguments(kind: type) -> set[str]:
    """The names of a class's arguments, those of its bases too where it hands further ones on to them."""
    names: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in vars(each):
            parameters = inspect.signature(each).parameters
            names |= {name for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
            if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
                break
    return names


def _filled(module: LanguageModelModule, state: dict[str, Tensor], checkpoint: str, *, with_base: bool) -> Any:
    """The module's model with the weights of the checkpoint, on the CPU, or with its base on the meta device."""
    dtype = next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
    module.quantization = None
    module.placement = type(module.placement)()
    if with_base:
        module.use(module.load_base(dtype, None), dtype, torch.device("cpu"))
    else:
        module.use(module.empty_base(dtype), dtype, torch.device("cpu"))
    assert module.model is not None
    try:
        module.load_state_dict(state, assign=not with_base)  # on the meta device there is nothing to copy into
    except RuntimeError as error:
        raise ModelError(f"--checkpoint {checkpoint!r}: {' '.join(str(error).split())}") from error
    return module.model.eval()


def _cast(model: Any, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
    if isinstance(model, PreTrainedModel):
        model.config.dtype = dtype
