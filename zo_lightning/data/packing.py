"""Which rows the candidates of an example are fed in: one for each, or all of them behind a single copy of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from zo_lightning.data.dataset import Example

__all__ = ["FedRow", "fed_rows", "row_lengths", "shared_tails"]

Tail = tuple[int, ...]


class FedRow(NamedTuple):
    """One row of a batch: a prompt, and the tails that follow it, each as if it were the only one.

    Attributes:
        prompt: The tokens of the prompt.
        tails: The tokens of each tail.
    """

    prompt: list[int]
    tails: list[Tail]

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.prompt) + sum(map(len, self.tails))

    @property
    def ids(self) -> list[int]:
        """The tokens of the row."""
        return [*self.prompt, *(token for tail in self.tails for token in tail)]

    @property
    def positions(self) -> list[int]:
        """The position of each token: those of every tail go on from the prompt's end."""
        start = len(self.prompt)
        return [*range(start), *(start + i for tail in self.tails for i in range(len(tail)))]

    @property
    def segments(self) -> list[int]:
        """0 for the prompt's tokens, k for those of the k-th tail."""
        return [*[0] * len(self.prompt), *(k for k, tail in enumerate(self.tails, 1) for _ in tail)]

    def places(self) -> Iterator[tuple[Tail, list[int]]]:
        """For each tail the places in the row whose logits predict its tokens and the one after them."""
        start = len(self.prompt)
        for tail in self.tails:
            yield tail, [len(self.prompt) - 1, *range(start, start + len(tail))]
            start += len(tail)


def shared_tails(candidates: Sequence[Sequence[int]]) -> list[Tail]:
    """The fewest tails, to be fed after the prompt, in which every candidate less its last token is a beginning.

    Args:
        candidates: The tokens of each candidate.

    Returns:
        One tail or more, the longest first.
    """
    tails: list[Tail] = []
    for ids in sorted(candidates, key=len, reverse=True):
        fed = tuple(ids[:-1])
        if not any(tail[: len(fed)] == fed for tail in tails):
            tails.append(fed)
    return tails


def fed_rows(example: Example, packed: bool) -> list[FedRow]:
    """The rows that an example puts into a batch.

    Args:
        example: The example.
        packed: Whether all tails are to be in one row.

    Returns:
        One row or more.
    """
    tails = shared_tails(example["candidate_ids"])
    return [FedRow(example["prompt_ids"], group) for group in ([tails] if packed else [[tail] for tail in tails])]


def row_lengths(example: Example, packed: bool) -> list[int]:
    """The lengths of the rows that an example puts into a batch; see :func:`fed_rows`."""
    return [row.length for row in fed_rows(example, packed)]
