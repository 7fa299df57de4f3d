"""How a task's prompts are put to a model: plainly, behind demonstrations, or (see ``chat``) as turns of a chat."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from zo_lightning.data.errors import DataError
from zo_lightning.data.sources import SourceSplit, read_rows
from zo_lightning.data.splits import Rows, shuffled_rows
from zo_lightning.data.tasks import Task
from zo_lightning.data.tokenization import FramedPrompt, prompt_lengths

__all__ = [
    "NO_DEMONSTRATIONS",
    "PLAIN",
    "Demonstration",
    "Demonstrations",
    "Need",
    "PlainPrompting",
    "Prompting",
    "draw_demonstrations",
    "fit_demonstrations",
    "fitting_counts",
]


@dataclass(frozen=True)
class Demonstration:
    """A training row with its right answer, to be shown in front of a prompt.

    Attributes:
        prompt: The task's prompt.
        answer: The right candidate, as it follows the prompt.
        origin: The source that the row is from.
        index: Its number there.
    """

    prompt: str
    answer: str
    origin: str
    index: int


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations of a run, in the order in which they are shown.

    Attributes:
        rows: Those that were drawn: one more than is shown, so that a training row that is among them has a substitute.
        number: The number that is shown where all fit.
    """

    rows: tuple[Demonstration, ...] = ()
    number: int = 0

    def before(self, origin: str, index: int) -> list[Demonstration]:
        """The demonstrations in front of a row: never the row itself.

        Args:
            origin: The source that the row is from.
            index: Its number there.

        Returns:
            The first ``number`` of the others.
        """
        return [shown for shown in self.rows if (shown.origin, shown.index) != (origin, index)][: self.number]


class Prompting(Protocol):
    """A way to put prompts to a model."""

    @property
    def end_of_turn(self) -> str | None:
        """What the model writes to end its answer, as text; None where that is left to the task."""

    def prompt(self, prompt: str, shown: Sequence[Demonstration] = ()) -> str | FramedPrompt:
        """Put a task's prompt behind its demonstrations."""

    def candidates(self, candidates: Sequence[str], ends: bool = False) -> list[str]:
        """A task's candidates as they follow the prompt; with ``ends``, including what ends the model's answer."""


@dataclass(frozen=True)
class PlainPrompting:
    """The prompt as a text to be continued; demonstrations are texts too, a blank line after each (as in MeZO)."""

    end_of_turn: None = None

    def prompt(self, prompt: str, shown: Sequence[Demonstration] = ()) -> str:
        """See :class:`Prompting`."""
        return "\n\n".join([*((each.prompt + each.answer).strip() for each in shown), prompt])

    def candidates(self, candidates: Sequence[str], ends: bool = False) -> list[str]:
        """The candidates as they are; what ends an answer is in the task's own."""
        return list(candidates)


PLAIN = PlainPrompting()
NO_DEMONSTRATIONS = Demonstrations()


def draw_demonstrations(task: Task, source: SourceSplit, train: Rows, number: int, seed: int | None = None) -> Demonstrations:
    """Draw demonstrations from the training rows.

    Args:
        task: The task.
        source: The training split.
        train: The training rows, in random order.
        number: How many are shown.
        seed: The seed of the draw; without one, the first of the training rows are taken.

    Returns:
        The demonstrations.

    Raises:
        DataError: If there are fewer training rows, or one of them cannot be read.
    """
    if number > len(train):
        raise DataError(
            f"{source.origin}: num_demonstrations is {number}, and there are {len(train)} training rows to take them from; "
            "lower it or raise num_train"
        )
    order = train if seed is None else train[shuffled_rows(len(train), seed)]
    drawn = order[: number + 1]
    texts = read_rows(task, source, drawn, lambda row: (task.prompt(row), task.candidates(row)[task.gold(row)[0]]))
    rows = (
        Demonstration(prompt, answer, source.origin, int(index)) for (prompt, answer), index in zip(texts, drawn, strict=True)
    )
    return Demonstrations(tuple(rows), number)


class Need(NamedTuple):
    """What has to fit into the limit behind the demonstrations.

    Attributes:
        prompts: The task's prompts.
        candidates: The candidates of each, as they follow it.
        new_tokens: The number of tokens that the model may write after each.
    """

    prompts: Sequence[str]
    candidates: Sequence[Sequence[str]]
    new_tokens: int = 0


def fit_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    prompting: Prompting,
    needs: Sequence[Need],
    shown: Sequence[Sequence[Demonstration]],
    limit: int,
    measure: Callable[..., list[int]] = prompt_lengths,
) -> list[list[Demonstration]]:
    """Keep as many whole demonstrations in front of each prompt as fit, the first ones.

    Args:
        tokenizer: The model's tokenizer.
        prompting: How prompts are put to the model.
        needs: What has to fit, of n prompts each; all of it has to.
        shown: The demonstrations that there are for each prompt.
        limit: The number of tokens that there may be in all.
        measure: What counts tokens, with the arguments of :func:`~zo_lightning.data.tokenization.prompt_lengths`.

    Returns:
        Those to show in front of each prompt; none where the prompt alone is too long.
    """

    def lengths(positions: list[int], counts: list[int]) -> list[int]:
        behind = [shown[position][:count] for position, count in zip(positions, counts, strict=True)]
        columns = []
        for prompts, candidates, new_tokens in needs:
            texts = [prompting.prompt(prompts[position], before) for position, before in zip(positions, behind, strict=True)]
            found = measure(tokenizer, texts, [candidates[position] for position in positions])
            columns.append([length + new_tokens for length in found])
        return [max(row) for row in zip(*columns, strict=True)]

    most = [len(each) for each in shown]
    return [list(each[:count]) for each, count in zip(shown, fitting_counts(lengths, most, limit), strict=True)]


def fitting_counts(lengths: Callable[[list[int], list[int]], list[int]], most: Sequence[int], limit: int) -> list[int]:
    """Find how many demonstrations fit in front of each prompt.

    How long demonstrations are is seen in front of one prompt, and the number for each other follows from its own length; as
    tokens may merge where texts meet, the number is then put to the test, and moved until one more is too long.

    Args:
        lengths: Given the positions of some prompts and a number of demonstrations for each, the number of tokens of each.
        most: The number of demonstrations that there are for each of n prompts.
        limit: The number of tokens that there may be.

    Returns:
        For each prompt the largest number of demonstrations within the limit; 0 where even the prompt alone is too long.
    """
    model = most.index(max(most))
    steps = lengths([model] * (most[model] + 1), list(range(most[model] + 1)))
    alone = lengths(list(range(len(most))), [0] * len(most))
    trial = [min(bisect_right(steps, limit - own + steps[0]) - 1, there) for own, there in zip(alone, most, strict=True)]
    low, high = [0] * len(most), list(most)
    while searched := [position for position in range(len(most)) if low[position] < high[position]]:
        counts = [max(1, trial[position]) for position in searched]
        for position, count, needed in zip(searched, counts, lengths(searched, counts), strict=True):
            if needed <= limit:
                low[position], trial[position] = count, count + 1
            else:
                high[position] = trial[position] = count - 1
    return low
