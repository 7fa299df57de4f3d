"""Question answering by generation: a decoder is trained on the answers' likelihood and evaluated by what it writes."""

from __future__ import annotations

from statistics import fmean
from typing import Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from zo_lightning.data import GenerationBatch, repeat_generation_batch
from zo_lightning.modules.decoding import GreedyDecoder
from zo_lightning.modules.errors import ModelError
from zo_lightning.modules.objectives import match
from zo_lightning.modules.prompted import PromptedModule
from zo_lightning.modules.scoring import candidate_log_likelihoods

__all__ = ["CausalLMGenerationModule"]

_DEFAULT_NEW_TOKENS = 50


class CausalLMGenerationModule(PromptedModule):
    """A causal language model that writes its answer.

    The batches are :class:`~zo_lightning.data.GenerationBatch`, those of :class:`~zo_lightning.data.PromptDataModule` for a
    :class:`~zo_lightning.data.GenerationTask`. It is trained on the likelihood of the first right answer, as in MeZO. To be
    evaluated, the model continues the prompts greedily up to the first line break. What it writes is compared with all right
    answers of an example as SQuAD does it, without case, punctuation and articles: ``em`` is the share of exact matches, ``f1``
    the mean over the examples of the F1 of the words shared with the nearest answer. Both are fractions from 0 to 1, where
    publications mostly give percentages.

    Logs ``train/loss``, and ``loss``, ``em`` and ``f1`` under ``val/`` and ``test/``.

    Args:
        model_name_or_path: A folder or a name on the Hugging Face hub; ``quickstart`` is the tiny model of this package.
        max_new_tokens: The number of tokens that the model may write; None takes the task's.
        validate_by: ``"generation"`` logs all three in validations; ``"loss"`` the loss alone, which is cheaper: nothing is
            written. Tests and predictions always write.
        **options: See :class:`PromptedModule`.

    Attributes:
        model: The language model, or the ``peft.PeftModel`` around it, once :meth:`configure_model` has run.

    Raises:
        ValueError: If an argument is out of its range.
    """

    task_kind = "generation"

    def __init__(
        self,
        model_name_or_path: str = "facebook/opt-1.3b",
        max_new_tokens: int | None = None,
        validate_by: Literal["loss", "generation"] = "generation",
        **options: Any,
    ) -> None:
        super().__init__(model_name_or_path, **options)
        self.save_hyperparameters(ignore=self.unsaved)
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if validate_by not in ("loss", "generation"):
            raise ValueError(f"validate_by must be 'loss' or 'generation', got {validate_by!r}")
        self.max_new_tokens = max_new_tokens
        self.validate_by = validate_by
        self._decoder: GreedyDecoder | None = None

    # ---- set-up --------------------------------------------------------------------------------------------------------
    def setup(self, stage: str) -> None:
        """Refuse a task that another module is for, or whose prompts leave no room for ``max_new_tokens``.

        Raises:
            MisconfigurationException: If so; see also :meth:`ZOModule.setup`.
        """
        super().setup(stage)
        self._decoder = None  # that of a run before may be for another task
        room = getattr(self._task, "max_new_tokens", None)
        if room is not None and self.max_new_tokens is not None and self.max_new_tokens > room:
            raise MisconfigurationException(
                f"max_new_tokens={self.max_new_tokens} exceeds the {room} tokens that the prompts of task {self._task.name!r} "
                "leave room for; give the task a larger max_new_tokens"
            )

    @property
    def decoder(self) -> GreedyDecoder:
        """What writes the answers; made at its first use with the tokenizer of the datamodule, or of the model without one."""
        if self._decoder is None:
            limit: int = getattr(self._task, "max_new_tokens", _DEFAULT_NEW_TOKENS)
            end: str | None = getattr(self._datamodule, "end_of_turn", None)
            self._decoder = GreedyDecoder(self._tokenizer(), self.max_new_tokens or limit, end)
        return self._decoder

    @property
    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    @property
    def _task(self) -> Any:
        return getattr(self._datamodule, "task", None)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        given = getattr(self._datamodule, "tokenizer_in_use", None)
        if given is not None:
            return given
        try:
            return AutoTokenizer.from_pretrained(self.model_name_or_path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"cannot load the tokenizer of {self.model_name_or_path!r}: {reason}") from error

    # ---- training ------------------------------------------------------------------------------------------------------
    def loss(self, batch: GenerationBatch) -> Tensor:
        """Mean negative log-likelihood of the first answer's tokens, per example: shape (B,), float32, in nats.

        With an ``objective``, what the score of the texts that the model writes lacks to the best there is.
        """
        if self.score is not None:
            return self.score(self(batch), batch, len(batch["answers"]), batch["input_ids"].device)
        return -candidate_log_likelihoods(self.scored_logits(batch["scoring"]), batch["scoring"])  # type: ignore[arg-type]

    def repeat_batch(self, batch: GenerationBatch, copies: int) -> GenerationBatch | None:
        """See :meth:`ZOModule.repeat_batch`: for a likelihood only.

        Texts of two probes end after different numbers of tokens, and writing one token costs much the same for one copy as
        for two: one after the other, each stops when it is done.
        """
        return repeat_generation_batch(batch, copies) if self.takes_copies and self.score is None else None

    # ---- evaluation ----------------------------------------------------------------------------------------------------
    def forward(self, batch: GenerationBatch) -> list[str]:
        """Write an answer to each prompt.

        Args:
            batch: See :class:`zo_lightning.data.GenerationBatch`; only the prompts are used.

        Returns:
            B texts.
        """
        with self.positions_after_prompt():
            return self.decoder(self.model, batch["input_ids"], batch["attention_mask"])

    def validation_step(self, batch: GenerationBatch, batch_idx: int) -> None:
        """Log ``val/loss``, ``val/em`` and ``val/f1``; with ``validate_by="loss"`` only the first."""
        self._log(batch, "val", None if self.validate_by == "loss" else self(batch))

    def test_step(self, batch: GenerationBatch, batch_idx: int) -> dict[str, Any]:
        """Log ``test/loss``, ``test/em`` and ``test/f1``; ``rows`` are those of :meth:`predict_step`."""
        texts = self(batch)
        return {"rows": self._log(batch, "test", texts)}

    def predict_step(self, batch: GenerationBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One dictionary per example: ``index`` (row of the split), ``prediction`` (text), ``answers``, ``em`` and ``f1``."""
        return _compared(batch, self(batch))

    def _log(self, batch: GenerationBatch, prefix: str, texts: list[str] | None) -> list[dict[str, Any]]:
        rows = [] if texts is None else _compared(batch, texts)
        if self.score is None or texts is None:
            loss = self.loss(batch)
        else:  # the texts are there already
            loss = self.score(texts, batch, len(texts), batch["input_ids"].device)
        values: dict[str, Any] = {f"{prefix}/loss": loss.mean()}
        if rows:
            values |= {f"{prefix}/{name}": fmean(row[name] for row in rows) for name in ("em", "f1")}
        # Lightning weights the mean over batches by their sizes, and adds up in float32 whatever the precision: a metric of
        # torchmetrics would count in that of the module
        self.log_dict(values, on_epoch=True, batch_size=len(batch["answers"]), sync_dist=True)
        return rows


def _compared(batch: GenerationBatch, texts: list[str]) -> list[dict[str, Any]]:
    """The rows that :meth:`CausalLMGenerationModule.predict_step` returns."""
    rows = []
    for index, text, answers in zip(batch["index"].tolist(), texts, batch["answers"], strict=True):
        em, f1 = match(text, answers)
        rows.append({"index": index, "prediction": text, "answers": answers, "em": em, "f1": f1})
    return rows
