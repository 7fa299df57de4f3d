"""What the modules share that prompt a decoder: scored logits, and the objective of the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zo_lightning.data import repeat_scoring_batch
from zo_lightning.modules.adapters import is_prompt_learning
from zo_lightning.modules.language_model import LanguageModelModule

__all__ = ["PromptedModule"]


class PromptedModule(LanguageModelModule):
    """Base class of the modules that continue prompts: they compute logits at scored positions only.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        **options: See :class:`LanguageModelModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.
    """

    #: What to keep the best checkpoint by.
    monitor = "val/loss"
    #: Whether less or more of it is better.
    mode = "min"

    def __init__(self, model_name_or_path: str = "facebook/opt-1.3b", **options: Any) -> None:
        super().__init__(model_name_or_path, **options)

    def repeat_batch(self, batch: Any, copies: int) -> Any:
        """See :meth:`ZOModule.repeat_batch`."""
        return None if self.one_prompt_for_all else repeat_scoring_batch(batch, copies)

    def scored_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Next-token logits at the plan's positions.

        The hidden states are gathered in front of the head, so that all that the model does to its logits afterwards
        (scaling, soft-capping) stays. The head over all positions costs 40 % of an OPT-125m forward.

        Args:
            batch: See :class:`zo_lightning.data.ScoringBatch`.

        Returns:
            Shape (P, V), in the model's dtype.

        Raises:
            RuntimeError: If the model does not call its output head once on the hidden states.
        """
        assert self.model is not None, "configure_model has not run"
        head = self.model.get_output_embeddings()
        row, position, width = batch["logit_row"], batch["logit_position"], batch["input_ids"].shape[1]

        def gather(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            virtual = args[0].shape[1] - width  # tokens that an adapter has put in front
            return (args[0][row, position + virtual].unsqueeze(0), *args[1:])

        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if not is_prompt_learning(self.model) and self._takes_position_ids:
            inputs["position_ids"] = batch["position_ids"]
        handle = head.register_forward_pre_hook(gather)
        try:
            with self.positions_after_prompt():
                logits = self.model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        if logits.shape[:2] != (1, row.numel()):
            raise RuntimeError(
                f"{type(self.model).__name__} returned logits of shape {tuple(logits.shape)} where (1, {row.numel()}, V) "
                "was expected; its output head is not called once on the hidden states"
            )
        return logits[0]
