"""How wide a batch is, and how much of it is padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["padded_width", "padding_share"]


def padded_width(length: int, multiple: int | None = None) -> int:
    """The number of columns of a batch whose longest row has ``length`` tokens.

    The products with the weights see rows times columns at once, which is a multiple of 8 wherever the number of rows is. Only
    attention sees the columns by themselves, and costs little where they are few: it does not pay to round a short row far up.

    Args:
        length: Of the longest row, in tokens.
        multiple: What the width is a multiple of. None for the largest of 8, 4, 2 and 1 that is at most a sixteenth of the
            length, which adds less than that sixteenth: 8 from 128 tokens on, 4 from 64, 2 from 32.

    Returns:
        The width, ``length`` or more.
    """
    if multiple is None:
        multiple = next((power for power in (8, 4, 2) if 16 * power <= length), 1)
    return -(-length // multiple) * multiple


def padding_share(batches: Iterable[Sequence[int]], rows: Sequence[Sequence[int]], multiple: int | None = None) -> float:
    """The share of padding among the tokens that batches feed, all columns of all rows.

    Args:
        batches: The examples of each batch.
        rows: For each example the lengths of the rows that it puts into a batch.
        multiple: See :func:`padded_width`.

    Returns:
        From 0 to 1.
    """
    tokens = fed = 0
    for batch in batches:
        lengths = [length for position in batch for length in rows[position]]
        tokens += sum(lengths)
        fed += len(lengths) * padded_width(max(lengths), multiple)
    return 1 - tokens / fed if fed else 0.0
