"""The seeded split of a dataset's rows into training, development and evaluation rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zo_lightning.data.errors import DataError

Rows = NDArray[np.int64]
"""Row numbers, shape (n,)."""


def shuffled_rows(num_rows: int, seed: int) -> Rows:
    """The seeded permutation that every split is cut from.

    NumPy's legacy generator is used on purpose: its stream is frozen for ever, and it is the one MeZO draws from, so
    that the same seed gives the same rows as in the publications that follow it.

    Args:
        num_rows: The number of rows n.
        seed: The seed of the split.

    Returns:
        All row numbers in random order, shape (n,).
    """
    return np.random.RandomState(seed).permutation(num_rows).astype(np.int64)


def split_train_dev(num_rows: int, num_train: int, num_dev: int, seed: int, small_dev: int | None = None) -> tuple[Rows, Rows]:
    """Choose training and development rows from the training split.

    With ``num_train + num_dev`` rows or more, the first ``num_train`` of the permutation train and the next ``num_dev``
    develop. With fewer, development takes ``small_dev`` rows (a fifth of all where that is not given, or more than half
    of what there is), never more than ``num_dev``, from the end of the permutation, and the rest trains.

    Args:
        num_rows: The number of rows n of the training split.
        num_train: The number of training rows wanted.
        num_dev: The number of development rows wanted.
        seed: The seed of the split.
        small_dev: The number of development rows of a small training split.

    Returns:
        The training rows, shape (<= num_train,), and the development rows, shape (<= num_dev,), without an overlap.

    Raises:
        DataError: If there are fewer than two rows, so that nothing can be split.
    """
    if num_rows < 2:
        raise DataError(f"{num_rows} training rows cannot be split into training and development rows, give two or more")
    rows = shuffled_rows(num_rows, seed)
    if num_rows >= num_train + num_dev:
        return rows[:num_train], rows[num_train : num_train + num_dev]
    if small_dev is None or 2 * small_dev > num_rows:
        small_dev = max(1, num_rows // 5)
    held_out = min(small_dev, num_dev)
    return rows[: min(num_train, num_rows - held_out)], rows[num_rows - held_out :]


def sample_shots(
    num_rows: int,
    num_shots: int,
    seed: int,
    labels: NDArray[np.int64] | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[Rows, Rows]:
    """Choose as few training and development rows as in few-shot learning: the same number of each class.

    Of each class the first ``num_shots`` rows of the permutation train and the next ``num_shots`` develop. LM-BFF, and MeZO
    in its experiments with masked language models, draw their rows in the same way: the same seed gives the same rows.

    Args:
        num_rows: The number of rows n of the training split.
        num_shots: The number of training rows, and of development rows, of each class.
        seed: The seed of the split.
        labels: The class of every row, shape (n,); without classes all rows are of one.
        class_names: What messages call the classes; by default their numbers.

    Returns:
        The training rows, shape (num_shots · classes,), and as many development rows, without an overlap; both in the
        order of the permutation, so that the classes are mixed.

    Raises:
        DataError: If a class has fewer than ``2 * num_shots`` rows.
    """
    rows = shuffled_rows(num_rows, seed)
    ordered = np.zeros(num_rows, dtype=np.int64) if labels is None else labels[rows]
    classes = 1 if labels is None else len(class_names) if class_names is not None else int(labels.max()) + 1
    train, dev = [], []
    for number in range(classes):
        places = np.flatnonzero(ordered == number)
        if len(places) < 2 * num_shots:
            name = number if class_names is None else repr(class_names[number])
            of_class = "" if labels is None else f" of class {name}"
            raise DataError(
                f"num_shots is {num_shots}, which takes {2 * num_shots} rows{of_class} for training and development, and there "
                f"are {len(places)}; lower it"
            )
        train.append(places[:num_shots])
        dev.append(places[num_shots : 2 * num_shots])
    return rows[np.sort(np.concatenate(train))], rows[np.sort(np.concatenate(dev))]


def sample_eval(num_rows: int, num_eval: int, seed: int) -> Rows:
    """Choose evaluation rows: the first ``num_eval`` of the permutation, or all of them where there are fewer.

    Args:
        num_rows: The number of rows n of the evaluation split.
        num_eval: The number of rows wanted.
        seed: The seed of the split.

    Returns:
        The evaluation rows, shape (min(n, num_eval),).

    Raises:
        DataError: If there are no rows.
    """
    if num_rows < 1:
        raise DataError("there are no rows to evaluate on")
    return shuffled_rows(num_rows, seed)[:num_eval]
