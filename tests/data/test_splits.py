"""The sizes of the splits, and that they are those of MeZO."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_lightning.data import DataError, sample_eval, split_train_dev


@pytest.mark.parametrize(
    ("num_rows", "small_dev", "train", "dev"),
    [
        (67349, None, 1000, 500),  # SST-2
        (2490, None, 1000, 500),  # RTE
        (1500, None, 1000, 500),  # exactly enough
        (1499, None, 1000, 299),  # a fifth, the rest capped at num_train
        (554, None, 444, 110),  # WSC
        (321, None, 257, 64),
        (250, 100, 150, 100),  # CB
        (400, 100, 300, 100),  # COPA
        (150, 100, 120, 30),  # small_dev would be more than half
        (4, None, 3, 1),
        (2, None, 1, 1),
    ],
)
def test_sizes(num_rows, small_dev, train, dev):
    train_rows, dev_rows = split_train_dev(num_rows, 1000, 500, seed=0, small_dev=small_dev)
    assert (len(train_rows), len(dev_rows)) == (train, dev)


def test_the_rows_are_those_of_mezo():
    # MeZO: np.random.seed(seed), the first 1500 of np.random.permutation(n), of which the last 500 are dev.
    np.random.seed(7)  # noqa: NPY002
    permutation = np.random.permutation(4000)  # noqa: NPY002
    train, dev = split_train_dev(4000, 1000, 500, seed=7)
    assert train.tolist() == permutation[:1000].tolist()
    assert dev.tolist() == permutation[1000:1500].tolist()
    np.random.seed(7)  # noqa: NPY002
    assert sample_eval(872, 1000, seed=7).tolist() == np.random.permutation(872).tolist()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    permutation = np.random.permutation(250)  # noqa: NPY002
    train, dev = split_train_dev(250, 1000, 500, seed=0, small_dev=100)
    assert [*train, *dev] == permutation.tolist()


@given(
    num_rows=st.integers(2, 400),
    num_train=st.integers(1, 300),
    num_dev=st.integers(1, 200),
    small_dev=st.none() | st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_split_is_a_split(num_rows, num_train, num_dev, small_dev, seed):
    train, dev = split_train_dev(num_rows, num_train, num_dev, seed, small_dev)
    assert 1 <= len(train) <= num_train
    assert 1 <= len(dev) <= num_dev
    chosen = [*train, *dev]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(num_rows))
    if num_rows >= num_train + num_dev:
        assert (len(train), len(dev)) == (num_train, num_dev)
    again = split_train_dev(num_rows, num_train, num_dev, seed, small_dev)
    assert [*again[0], *again[1]] == chosen


def test_eval_takes_all_where_there_are_fewer():
    assert len(sample_eval(5000, 1000, seed=0)) == 1000
    assert sorted(sample_eval(56, 1000, seed=0)) == list(range(56))
    assert sample_eval(5000, 10, seed=0).tolist() != sample_eval(5000, 10, seed=1).tolist()


def test_nothing_to_split():
    with pytest.raises(DataError, match="1 training rows cannot be split"):
        split_train_dev(1, 1000, 500, seed=0)
    with pytest.raises(DataError, match="no rows to evaluate on"):
        sample_eval(0, 1000, seed=0)
