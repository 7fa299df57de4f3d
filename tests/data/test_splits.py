"""The sizes of the splits, and that they are those of MeZO."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zo_lightning.data import DataError, PromptDataModule, sample_eval, sample_shots, split_train_dev
from zo_lightning.data.splits import shuffled_rows


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


@given(
    sizes=st.lists(st.integers(0, 60), min_size=2, max_size=5),
    num_shots=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(use_true_random=False),
)
def test_shots_are_of_each_class(sizes, num_shots, seed, order):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    order.shuffle(labels)
    names = [f"class {label}" for label in range(len(sizes))]
    arguments = len(labels), num_shots, seed, np.array(labels, dtype=np.int64), names
    short = [label for label, size in enumerate(sizes) if size < 2 * num_shots]
    if short:
        label = short[0]
        message = (
            f"num_shots is {num_shots}, which takes {2 * num_shots} rows of class 'class {label}' for training and "
            f"development, and there are {sizes[label]}; lower it"
        )
        with pytest.raises(DataError, match=f"^{message}$"):
            sample_shots(*arguments)
        return
    train, dev = (rows.tolist() for rows in sample_shots(*arguments))
    for rows in (train, dev):
        assert [[labels[row] for row in rows].count(label) for label in range(len(sizes))] == [num_shots] * len(sizes)
    assert len({*train, *dev}) == len(train) + len(dev)
    assert [rows.tolist() for rows in sample_shots(*arguments)] == [train, dev]


@given(
    num_rows=st.integers(2, 80),
    num_shots=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    colours=st.randoms(use_true_random=False),
)
def test_shots_are_those_of_lm_bff(num_rows, num_shots, seed, colours):
    """Of the shuffled rows the first of each class train, the next develop, whatever else a class holds."""
    labels = [colours.randrange(2) for _ in range(num_rows)]
    np.random.seed(seed)  # noqa: NPY002
    rows = list(range(num_rows))
    np.random.shuffle(rows)  # noqa: NPY002
    expected = {"train": set(), "dev": set()}
    for label in (0, 1):
        of_class = [row for row in rows if labels[row] == label]
        expected["train"] |= set(of_class[:num_shots])
        expected["dev"] |= set(of_class[num_shots : 2 * num_shots])
    if len(expected["dev"]) < 2 * num_shots:
        with pytest.raises(DataError, match=r"rows of class '[01]' .*lower it"):
            sample_shots(num_rows, num_shots, seed, np.array(labels), ["0", "1"])
        return
    train, dev = sample_shots(num_rows, num_shots, seed, np.array(labels), ["0", "1"])
    assert (set(train.tolist()), set(dev.tolist())) == (expected["train"], expected["dev"])
    assert train.tolist() == [row for row in rows if row in expected["train"]], "mixed, in the order of the permutation"


def test_shots_without_classes():
    train, dev = sample_shots(50, 16, seed=3)
    assert [*train, *dev] == shuffled_rows(50, 3)[:32].tolist()
    with pytest.raises(DataError, match="num_shots is 16, which takes 32 rows for training and development, and there are 31"):
        sample_shots(31, 16, seed=3)


def test_a_class_that_no_row_has():
    with pytest.raises(DataError, match="rows of class 'Maybe' for training and development, and there are 0"):
        sample_shots(8, 2, 0, np.array([0, 1] * 4), ["Yes", "No", "Maybe"])


def test_shots_of_the_datamodule(film_dir, words, monkeypatch):
    messages = []
    monkeypatch.setattr("zo_lightning.data.datamodule.rank_zero_info", messages.append)
    options = {"data_dir": str(film_dir), "tokenizer": words, "num_shots": 3}
    data = PromptDataModule(**options)
    data.setup("fit")
    for part in ("train", "dev"):
        assert sorted(item["label"] for item in data.dataset(part).examples) == [0, 0, 0, 1, 1, 1]
    origin = film_dir / "train.jsonl"
    assert messages[0] == f"sst2: 6 training and 6 development rows, 3 of each class, of the 40 of {origin}, seed 0"
    other = PromptDataModule(**options, seed=1)
    other.setup("fit")
    assert {item["index"] for item in other.dataset("train").examples} != {
        item["index"] for item in data.dataset("train").examples
    }
    too_many = r"train\.jsonl: num_shots is 11, which takes 22 rows of class 'negative' .* there are 20; lower it"
    with pytest.raises(DataError, match=too_many):
        PromptDataModule(**options | {"num_shots": 11}).setup("fit")


def test_bad_shots():
    with pytest.raises(ValueError, match="num_shots must be at least 1, got 0"):
        PromptDataModule(num_shots=0)
    for sizes in ({"num_train": 100}, {"num_dev": 100}):
        with pytest.raises(ValueError, match="num_shots takes the place of num_train and num_dev, leave these out"):
            PromptDataModule(num_shots=16, **sizes)
