"""How wide batches are, and what share of them is padding, against counting the batches themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.conftest import SHARED
from tests.data.test_collate import PAD, example
from zo_lightning.data import PromptDataModule, ScoringCollator, ShuffleSampler
from zo_lightning.data.padding import padded_width, padding_share

MODEL = SHARED / "models" / "opt-mini"


@given(length=st.integers(1, 5000), multiple=st.integers(1, 64))
def test_a_width_is_the_next_multiple(length, multiple):
    width = padded_width(length, multiple)
    assert width == next(w for w in range(length, length + multiple) if w % multiple == 0)


@given(length=st.integers(1, 5000))
def test_by_default_little_is_added(length):
    width = padded_width(length)
    assert length <= width < length + max(1, length / 16)
    assert width % 8 == 0 or length < 128
    assert width % 2 == 0 or length < 32


@given(
    lengths=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=3), min_size=1, max_size=12),
    size=st.integers(1, 5),
    multiple=st.none() | st.integers(1, 16),
)
def test_the_share_is_that_of_the_grids(lengths, size, multiple):
    order = list(range(len(lengths)))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    padding = cells = 0
    for batch in batches:
        rows = [n for i in batch for n in lengths[i]]
        width = padded_width(max(rows), multiple)
        cells += width * len(rows)
        padding += sum(width - n for n in rows)
    assert padding_share(batches, lengths, multiple) == pytest.approx(padding / cells, abs=1e-12)


def test_no_batch_has_no_padding():
    assert padding_share([], [[3]]) == 0


@pytest.mark.parametrize("multiple", [None, 1, 8])
def test_the_collator_is_as_wide(multiple):
    for length in (1, 9, 40, 77, 130):
        batch = ScoringCollator(PAD, multiple)([example([2] * length, [[3], [4]]), example([2], [[3], [4]])])
        assert batch["input_ids"].shape == (2, padded_width(length, multiple))


def film_data(folder, words, **options):
    arguments = {"task": "sst2", "data_dir": str(folder), "tokenizer": words, "batch_size": 4, "pin_memory": False}
    data = PromptDataModule(**{**arguments, "shuffle_seed": 3, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize("multiple", [None, 1, 8])
def test_the_report_is_what_the_first_epoch_feeds(film_dir, words, monkeypatch, multiple):
    messages = []
    monkeypatch.setattr("zo_lightning.data.datamodule.rank_zero_info", messages.append)
    loader = film_data(film_dir, words, pad_to_multiple_of=multiple).train_dataloader()
    before = len(messages)
    padding = cells = 0
    for batch in loader:
        padding += int((batch["attention_mask"] == 0).sum())
        cells += batch["attention_mask"].numel()
    assert padding > 0
    assert messages[before:] == [f"sst2: padding {100 * padding / cells:.1f} % of the tokens fed"]
    assert type(loader.batch_sampler.sampler) is ShuffleSampler
    list(loader)
    assert len(messages) == before + 1, "once"


def test_the_multiple_must_be_positive():
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, got 0"):
        PromptDataModule(pad_to_multiple_of=0)


@pytest.mark.parametrize("task", ["sst2", "rte", "boolq", "squad"])
def test_real_rows_are_padded_by_less_than_a_tenth(task, monkeypatch):
    folder = SHARED / "data" / task
    if not folder.is_dir() or not MODEL.is_dir():
        pytest.skip(f"no real rows in {folder}, or no tokenizer in {MODEL}")
    messages = []
    monkeypatch.setattr("zo_lightning.data.datamodule.rank_zero_info", messages.append)
    data = PromptDataModule(task, str(folder), str(MODEL), num_dev=1, shuffle_seed=0, pin_memory=False)
    data.setup("fit")
    assert len(data.dataset("train")) == 1000
    next(iter(data.train_dataloader()))
    share = float(messages[-1].partition("padding ")[2].partition(" %")[0])
    assert 0 < share < 10
