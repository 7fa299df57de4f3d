"""What all modules around a pretrained language model share: loading, adapters, checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from zo_lightning.assets import resolve
from zo_lightning.modules.adapters import add_adapter, is_prompt_learning
from zo_lightning.modules.base import ZOModule
from zo_lightning.modules.errors import CheckpointError, ModelError
from zo_lightning.modules.pretrained import (
    Placement,
    execution_device,
    is_immovable,
    load_causal_lm,
    load_config,
    weights_dtype,
)

__all__ = ["LanguageModelModule"]


class LanguageModelModule(ZOModule):
    """Base class of the modules that fine-tune a pretrained decoder, as a whole or by an adapter of peft.

    A base that is quantised or spread over devices is only ever read: it stays where it is and as it is, and what is trained
    is an adapter on the device that computes. A checkpoint of an adapter's run holds the adapter alone.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        dropout: Whether the model's dropout (an adapter's too) is active in training. All probes of a step see the same mask.
        trust_remote_code: Whether code that comes with the model may run.
        attn_implementation: Passed to transformers, for example ``sdpa``.
        peft: An adapter, as ``peft.get_peft_config`` takes it: ``{peft_type: LORA, r: 8, target_modules: [q_proj, v_proj]}``.
        quantization: Arguments of ``transformers.BitsAndBytesConfig``: ``{load_in_8bit: true}``; needs ``peft``.
        device_map: Which part of the model lies where, as transformers takes it: ``auto``, or a device for each module;
            needs ``peft``.
        max_memory: For ``auto``: how much each device may hold, as in ``{0: 6GiB, cpu: 30GiB}``.
        offload_folder: Where accelerate writes what is kept on the disk.
        optimizer: See :class:`ZOModule`.
        lr_scheduler: See :class:`ZOModule`.
        lr_scheduler_interval: See :class:`ZOModule`.
        accumulate_grad_batches: See :class:`ZOModule`.
        first_order: See :class:`ZOModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.
        adapter_names: The names of the adapter's weights in ``model.state_dict()``; empty without an adapter.

    Raises:
        ModelError: If ``quantization`` or ``device_map`` are given without ``peft``.
    """

    def __init__(
        self,
        model_name_or_path: str,
        dropout: bool = False,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        peft: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
        device_map: str | dict[str, Any] | None = None,
        max_memory: dict[Any, Any] | None = None,
        offload_folder: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        accumulate_grad_batches: int = 1,
        first_order: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, lr_scheduler_interval, accumulate_grad_batches, first_order)
        self.model_name_or_path = resolve(model_name_or_path)
        self.dropout = dropout
        self.trust_remote_code = trust_remote_code
        self.attn_implementation = attn_implementation
        self.peft = peft
        self.quantization = quantization
        self.placement = Placement(device_map, max_memory, offload_folder)
        for argument, value in (("quantization", quantization), ("device_map", device_map)):
            if value is not None and peft is None:
                raise ModelError(_only_with_peft(f"{argument}={value!r}"))
        self.model: PreTrainedModel | Any | None = None
        self.adapter_names: frozenset[str] = frozenset()
        self._immovable = False
        self._takes_position_ids = False

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def configure_model(self) -> None:
        """Load the weights, once, in the dtype of ``trainer.precision`` (float32 without a Trainer), and add the adapter.

        Raises:
            ModelError: If the model cannot be loaded or trained as the arguments say.
        """
        if self.model is not None:
            return
        try:
            dtype, device = weights_dtype(str(self.trainer.precision)), self.trainer.strategy.root_device
        except RuntimeError:  # not attached to a Trainer, as in load_from_checkpoint
            dtype, device = torch.float32, None
        model = self.load_base(dtype, device)
        immovable = is_immovable(model)
        if immovable and self.peft is None:
            raise ModelError(_only_with_peft(f"the model {self.model_name_or_path!r} is quantised or spread over devices: it"))
        where = execution_device(model)
        if immovable and device is not None and where != device:
            raise ModelError(
                f"the model runs on {where} and the Trainer on {device}; change device_map, or accelerator and devices"
            )
        self.use(model, dtype, where)
        self._immovable = immovable

    def load_base(self, dtype: torch.dtype, device: torch.device | None) -> PreTrainedModel:
        """Load the model without an adapter.

        Args:
            dtype: Of the weights.
            device: Where a quantised model goes.
        """
        return load_causal_lm(
            self.model_name_or_path,
            dtype,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            placement=self.placement,
            device=device,
        )

    def empty_base(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model without an adapter and without its weights, on the meta device: what an adapter alone is saved from.

        Args:
            dtype: Of the weights.
        """
        config = load_config(self.model_name_or_path, trust_remote_code=self.trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def use(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
        """Take a loaded model, and put the adapter on it.

        Args:
            model: The base.
            dtype: Of the adapter.
            device: Of the adapter.
        """
        if self.peft is not None:
            self.model, self.adapter_names = add_adapter(model, self.peft, dtype=dtype, device=device)
        else:
            self.model = model
        self._takes_position_ids = "position_ids" in inspect.signature(self.base.forward).parameters
        # transformers returns eval mode; on_train_start decides for training
        self.model.train()

    @property
    def base(self) -> PreTrainedModel:
        """The language model itself, without the adapter's wrapper."""
        assert self.model is not None, "configure_model has not run"
        return self.model.get_base_model() if self.peft is not None else self.model

    @property
    def longest_input(self) -> int | None:
        """The number of tokens that the model has positions for beside an adapter's virtual ones; None without a limit.

        Raises:
            ModelError: If the model's configuration cannot be loaded.
        """
        if self.model is None:
            config = load_config(self.model_name_or_path, trust_remote_code=self.trust_remote_code)
        else:
            config = self.base.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        virtual = int((self.peft or {}).get("num_virtual_tokens") or 0)
        return None if limit is None else int(limit) - virtual

    def on_train_start(self) -> None:
        """Switch dropout off, unless it is wanted. Only now: Lightning warns of modules in eval mode at its own start."""
        if self.model is not None and not self.dropout:
            self.model.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModelModule:
        """What ``to``, ``cpu``, ``half`` and their like do: all but a model that is to stay where it is."""
        if not self._immovable:
            return super()._apply(fn, recurse)
        model, self._modules["model"] = self._modules["model"], None
        try:
            return super()._apply(fn, recurse)
        finally:
            self._modules["model"] = model

    # ---- forward -------------------------------------------------------------------------------------------------------
    @contextmanager
    def positions_after_prompt(self) -> Iterator[None]:
        """Within this context the base counts the positions of padded rows by their attention mask, virtual tokens included.

        peft drops ``position_ids`` where it puts virtual tokens in front of the padding.
        """
        if not (is_prompt_learning(self.model) and self._takes_position_ids):
            yield
            return
        handle = self.base.register_forward_pre_hook(_count_positions, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def one_prompt_for_all(self) -> bool:
        """Whether the adapter looks its virtual tokens up once for the whole batch, so that two probes need two forwards."""
        return is_prompt_learning(self.model) and "PREFIX" not in str(self.model.active_peft_config.peft_type)  # type: ignore[union-attr]

    # ---- checkpoints ---------------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which class this is, and leave out a base that is not trained."""
        super().on_save_checkpoint(checkpoint)
        package = __name__.partition(".")[0]
        own = next(kind for kind in type(self).__mro__ if kind.__module__.partition(".")[0] == package)
        checkpoint["zo_lightning"] = {"module": own.__name__}
        if self.peft is not None:
            checkpoint["state_dict"] = {
                name: value for name, value in checkpoint["state_dict"].items() if not self._is_of_the_base(name)
            }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; those of a base that is not trained may be missing.

        Raises:
            CheckpointError: If a shape differs, or with ``strict``, if another weight is missing or there is one too many.
        """
        try:
            result = super().load_state_dict(state_dict, strict=strict and self.peft is None, assign=assign)
        except RuntimeError as error:  # torch lists every weight, each on a line of its own
            first = " ".join(str(error).splitlines()[1:2]).strip()
            kept = "the checkpoint is of another model, or of one with another adapter"
            raise CheckpointError(f"{kept} ({first[:200]}); give the same model_name_or_path and peft") from error
        if self.peft is not None:
            missing = [name for name in result.missing_keys if not self._is_of_the_base(name)]
            if strict and (missing or result.unexpected_keys):
                odd = ", ".join([*missing, *result.unexpected_keys][:3])
                raise CheckpointError(
                    f"the checkpoint is of another adapter ({odd} is in only one of them); give the same peft"
                )
            result.missing_keys[:] = missing
        return result

    def _is_of_the_base(self, name: str) -> bool:
        prefix, _, rest = name.partition(".")
        return prefix == "model" and rest not in self.adapter_names


def _only_with_peft(what: str) -> str:
    return (
        f"{what} needs peft={{peft_type: LORA, ...}}: such a model's weights are only read, and an adapter is trained in "
        "their place"
    )


def _count_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask, ids, embeds = (kwargs.get(key) for key in ("attention_mask", "input_ids", "inputs_embeds"))
    fed = ids if embeds is None else embeds
    assert mask is not None
    assert fed is not None
    # a mask of ones for keys and values that come from no token (prefix tuning) counts too
    # as integers: peft's ones are of the default dtype, and bfloat16 does not count beyond 256
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return args, {**kwargs, "position_ids": positions[:, -fed.shape[1] :]}
