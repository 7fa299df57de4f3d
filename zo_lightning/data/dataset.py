"""The tokenised examples of one split."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypedDict

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from zo_lightning.data.cache import TokenCache
from zo_lightning.data.errors import DataError
from zo_lightning.data.packing import row_lengths
from zo_lightning.data.prompting import (
    NO_DEMONSTRATIONS,
    PLAIN,
    Demonstration,
    Demonstrations,
    Need,
    Prompting,
    fit_demonstrations,
)
from zo_lightning.data.sources import SourceSplit, read_rows
from zo_lightning.data.splits import Rows
from zo_lightning.data.tasks import GenerationTask, Task
from zo_lightning.data.tokenization import encode_prompts, length_limit, prompt_lengths


class _Scored(TypedDict):
    """What every example has."""

    prompt: str
    """The whole prompt, demonstrations and chat included, before truncation."""
    candidates: list[str]
    """The K texts that may continue it."""
    prompt_ids: list[int]
    """The tokens all candidates follow."""
    candidate_ids: list[list[int]]
    """The tokens of each candidate."""
    label: int
    """The index of the right candidate, the one to train on."""
    gold: list[int]
    """The indices of all right candidates."""
    index: int
    """The row number in the source split."""


class Example(_Scored, total=False):
    """One example, as text and as token ids."""

    neutral_ids: list[int]
    """For calibrated scores: the tokens of the neutral prompt."""
    neutral_candidate_ids: list[list[int]]
    """For calibrated scores: the tokens of each candidate after the neutral prompt."""
    generation_ids: list[int]
    """For generation: the tokens of the prompt alone, short enough for what is to be generated."""
    answers: list[str]
    """For generation: all right answers."""


def _as_text(task: Task, row: dict[str, Any]) -> Example:
    gold = task.gold(row)
    example = Example(
        prompt=task.prompt(row),
        candidates=list(task.candidates(row)),
        prompt_ids=[],
        candidate_ids=[],
        label=gold[0],
        gold=gold,
        index=-1,
    )
    if isinstance(task, GenerationTask):
        example["answers"] = task.answers(row)
    return example


def _count(shown: list[list[Demonstration]]) -> str:
    counts = [len(each) for each in shown]
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}, {fmean(counts):.1f} on average"


def _without_others(example: Example) -> Example:
    label = example["label"]
    alone: Example = {
        **example,
        "candidates": [example["candidates"][label]],
        "candidate_ids": [example["candidate_ids"][label]],
        "label": 0,
        "gold": [0],
    }
    return alone


class PromptDataset(Dataset[Example]):
    """Examples in the order of the split, tokenised.

    Args:
        examples: The examples.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.lengths: list[int] = []
        self.measure(packed=False)
        self._position = {example["index"]: position for position, example in enumerate(self.examples)}

    @classmethod
    def from_rows(
        cls,
        task: Task,
        source: SourceSplit,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        calibrated: bool = False,
        prompting: Prompting = PLAIN,
        demonstrations: Demonstrations = NO_DEMONSTRATIONS,
        cache: TokenCache | None = None,
    ) -> PromptDataset:
        """Fill the task's template with rows of a source, and tokenise.

        Args:
            task: The task.
            source: The source split.
            rows: The row numbers to take, shape (n,).
            tokenizer: The model's tokenizer.
            max_length: The number of tokens that a prompt and its longest candidate may have.
            calibrated: Whether neutral prompts are needed too; they stand behind the same demonstrations.
            prompting: How prompts are put to the model.
            demonstrations: What stands in front of each prompt, as far as it fits in whole.
            cache: Where tokens are kept for the next time.

        Returns:
            The dataset of n examples.

        Raises:
            DataError: If a row has no value in one of the task's columns, or cannot be tokenised, or if ``max_length`` leaves
                no room for a prompt before what is to be generated.
        """

        def describe(position: int) -> str:
            return source.row(int(rows[position]))

        examples = read_rows(task, source, rows, lambda row: _as_text(task, row))
        for example, number in zip(examples, rows, strict=True):
            example["index"] = int(number)
            example["candidates"] = prompting.candidates(example["candidates"], ends=isinstance(task, GenerationTask))
        texts = [example["prompt"] for example in examples]
        candidates = [example["candidates"] for example in examples]
        neutral_texts = read_rows(task, source, rows, task.neutral_prompt) if calibrated else []
        limit = length_limit(tokenizer, max_length)
        encode, measure = (encode_prompts, prompt_lengths) if cache is None else (cache.encode, cache.lengths)
        shown = [demonstrations.before(source.origin, example["index"]) for example in examples]
        if demonstrations.number:
            needs = [Need(texts, candidates)]
            if calibrated:
                needs.append(Need(neutral_texts, candidates))
            if isinstance(task, GenerationTask):
                needs.append(Need(texts, [()] * len(texts), task.max_new_tokens))
            shown = fit_demonstrations(tokenizer, prompting, needs, shown, limit, measure)
            rank_zero_info(f"{source.origin}: demonstrations that fit into {limit} tokens with each prompt: {_count(shown)}")
        prompts = [prompting.prompt(text, before) for text, before in zip(texts, shown, strict=True)]
        for example, prompt in zip(examples, prompts, strict=True):
            example["prompt"] = prompt if isinstance(prompt, str) else prompt.text
        encoded = encode(tokenizer, prompts, candidates, max_length, describe)
        for example, item in zip(examples, encoded, strict=True):
            example["prompt_ids"], example["candidate_ids"] = item.prompt_ids, item.candidate_ids
        cut = sum(item.dropped > 0 for item in encoded)
        if cut:
            rank_zero_info(f"{source.origin}: {cut} of {len(rows)} prompts lost their beginning to fit into {limit} tokens")
        if isinstance(task, GenerationTask):
            room = limit - task.max_new_tokens
            if room < 1:
                raise DataError(
                    f"there is no room for a prompt before the {task.max_new_tokens} tokens that task {task.name!r} may write: "
                    f"the limit is {limit} tokens, raise --data.max_length or lower the task's max_new_tokens"
                )
            alone = encode(tokenizer, prompts, [()] * len(prompts), room, describe)
            for example, item in zip(examples, alone, strict=True):
                example["generation_ids"] = item.prompt_ids
            cut = sum(item.dropped > 0 for item in alone)
            if cut:
                rank_zero_info(
                    f"{source.origin}: {cut} of {len(rows)} prompts lose their beginning where the model writes the answer, to "
                    f"leave room for {task.max_new_tokens} tokens of {limit}"
                )
        if calibrated:
            neutral = [prompting.prompt(text, before) for text, before in zip(neutral_texts, shown, strict=True)]
            plain = encode(tokenizer, neutral, candidates, max_length, lambda i: f"{describe(i)}, neutral prompt")
            for example, item in zip(examples, plain, strict=True):
                example["neutral_ids"], example["neutral_candidate_ids"] = item.prompt_ids, item.candidate_ids
        return cls(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> Example:
        return self.examples[position]

    def measure(self, packed: bool) -> None:
        """Write the length of each example's longest row into :attr:`lengths`, the same list that samplers were given.

        Args:
            packed: Whether the candidates of an example share a row.
        """
        self.lengths[:] = [max(*row_lengths(e, packed), len(e.get("generation_ids", ()))) for e in self.examples]

    @property
    def packable(self) -> bool:
        """Whether there is an example that puts several rows into a batch, which one could do."""
        return any(len(row_lengths(example, packed=False)) > 1 for example in self.examples)

    def gold_only(self) -> PromptDataset:
        """The same examples with no candidate but the one to train on, for losses that read no other.

        Returns:
            The dataset; every label is 0.
        """
        return PromptDataset([_without_others(example) for example in self.examples])

    def by_index(self, index: int) -> Example:
        """The example of a given row of the source split, the ``index`` of a batch.

        Args:
            index: The row number.

        Returns:
            The example.

        Raises:
            KeyError: If this row is not in the dataset.
        """
        return self.examples[self._position[index]]
