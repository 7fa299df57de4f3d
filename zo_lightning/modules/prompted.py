"""What the modules share that prompt a decoder: scored logits, and the objective of the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zo_lightning.data import repeat_scoring_batch
from zo_lightning.modules.adapters import is_prompt_learning
from zo_lightning.modules.errors import ModelError
from zo_lightning.modules.language_model import LanguageModelModule
from zo_lightning.modules.objectives import OBJECTIVES, Objective, Score
from zo_lightning.modules.packing import packed_mask, packing_fault

__all__ = ["PromptedModule"]

# The module for each kind of task.
_MODULES = {
    "classification": "CausalLMClassificationModule",
    "multiple_choice": "CausalLMMultipleChoiceModule",
    "generation": "CausalLMGenerationModule",
}


class PromptedModule(LanguageModelModule):
    """Base class of the modules that continue prompts: they compute logits at scored positions only.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        objective: What is trained for. ``loss`` is a loss of likelihoods. Others are scores of what the model decides, which
            need no gradient: ``accuracy`` for candidates, ``f1`` and ``exact_match`` for generated texts, or the import path of
            a function ``(predictions, batch) -> scores``. Predictions are the numbers of the chosen candidates, int64 of shape
            (B,), or B texts; scores are B numbers, or one for the whole batch. The loss is ``best_score`` less the score.
        best_score: The highest score that the objective can give.
        worst_score: The lowest.
        **options: See :class:`LanguageModelModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.
        score: The objective where it is a score, else None.

    Raises:
        ValueError: If there is no such objective for the module's kind of task.
    """

    #: What to keep the best checkpoint by.
    monitor = "val/loss"
    #: Whether less or more of it is better.
    mode = "min"
    #: The kind of task that the module is for; None for any.
    task_kind: ClassVar[str | None] = None

    def __init__(
        self,
        model_name_or_path: str = "facebook/opt-1.3b",
        objective: Literal["loss", "accuracy", "f1", "exact_match"] | Score = "loss",
        best_score: float = 1.0,
        worst_score: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model_name_or_path, **options)
        self.score: Objective | None = None
        #: Arguments that a checkpoint does not keep: it would have to name functions, which are then not loaded safely.
        self.unsaved = ["optimizer", "lr_scheduler", *([] if isinstance(objective, str) else ["objective"])]
        if objective != "loss":
            score = self._named(objective) if isinstance(objective, str) else objective
            self.score = Objective(score, best_score, worst_score)
            self.f_high = best_score - worst_score
        self._packing_fault: str | None = None  # empty for none, once it has been looked for

    def _named(self, objective: str) -> Score:
        kinds = OBJECTIVES.values() if self.task_kind is None else [OBJECTIVES[self.task_kind]]
        known = {name: score for kind in kinds for name, score in kind.items()}
        if objective not in known:
            raise ValueError(
                f"objective={objective!r}: {type(self).__name__} has 'loss', {', '.join(map(repr, known))}, or the import path "
                "of a function of (predictions, batch)"
            )
        return known[objective]

    @property
    def reads_gold_only(self) -> bool:
        """Whether the training loss reads no candidate but the one to train on, so that no other has to be fed."""
        return False

    def setup(self, stage: str) -> None:
        """Refuse a datamodule whose task another module is for, and backpropagation of what has no gradient.

        Raises:
            MisconfigurationException: If so; see also :meth:`ZOModule.setup`.
        """
        super().setup(stage)
        if stage == "fit" and self.first_order and self.score is not None:
            raise MisconfigurationException(
                "first_order=True trains by gradients, and a score of decisions has none: use objective='loss', or a "
                "zeroth-order optimizer"
            )
        task = getattr(getattr(self.trainer, "datamodule", None), "task", None)
        kind = getattr(task, "kind", self.task_kind)
        if task is not None and self.task_kind not in (None, kind):
            raise MisconfigurationException(
                f"{type(self).__name__} is for tasks of the kind {self.task_kind!r}, and {task.name!r} is one of the kind "
                f"{kind!r}: use {_MODULES.get(str(kind), 'another module')}"
            )

    @property
    def allows_packing(self) -> bool:
        """Whether the loaded model gives candidates that share a row the logits that they have alone; tried on it once."""
        if self.model is None:
            return False
        try:
            self.check_packing()
        except ModelError:
            return False
        return True

    def check_packing(self) -> None:
        """Make sure that the candidates of an example can share a row.

        Raises:
            ModelError: If the model does not compute the same then.
        """
        if self._packing_fault is None:
            if is_prompt_learning(self.model):
                self._packing_fault = "has virtual tokens in front of the prompt"
            elif not self._takes_position_ids:
                self._packing_fault = "takes no position_ids"
            else:
                self._packing_fault = packing_fault(self.base, self.scored_logits, self.device)
        if self._packing_fault:
            raise ModelError(f"packing=True: the model {self.model_name_or_path!r} {self._packing_fault}; leave packing out")

    def repeat_batch(self, batch: Any, copies: int) -> Any:
        """See :meth:`ZOModule.repeat_batch`."""
        return repeat_scoring_batch(batch, copies) if self.takes_copies else None

    @property
    def takes_copies(self) -> bool:
        """Whether several copies of a batch can be evaluated as one: an objective has to score each example."""
        return not self.one_prompt_for_all and (self.score is None or self.score.per_example)

    def scored_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Next-token logits at the plan's positions.

        The hidden states are gathered in front of the head, so that all that the model does to its logits afterwards
        (scaling, soft-capping) stays. The head over all positions costs 40 % of an OPT-125m forward.

        Args:
            batch: See :class:`zo_lightning.data.ScoringBatch`, and :class:`zo_lightning.data.PackedBatch` for candidates that
                share a row.

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

        mask = packed_mask(batch["segment"], self.base.dtype) if "segment" in batch else batch["attention_mask"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
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
