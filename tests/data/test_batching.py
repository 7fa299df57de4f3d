"""The order of examples: random, reproducible, complete, and of similar length in each batch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler

from zo_lightning.data import LengthBatchSampler, ResumableDataLoader, ShuffleSampler
from zo_lightning.data.loader import PreparedDataLoader


def make(lengths, batch_size, seed=0, pool: int | None = 50, drop_last=False):
    return LengthBatchSampler(ShuffleSampler(lengths, seed), batch_size, drop_last, lengths=lengths, pool=pool)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    batch_size=st.integers(1, 20),
    pool=st.none() | st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 1000),
    drop_last=st.booleans(),
)
def test_every_example_once_per_epoch(lengths, batch_size, pool, seed, epoch, drop_last):
    sampler = make(lengths, batch_size, seed, pool, drop_last)
    sampler.sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    seen = [index for batch in batches for index in batch]
    assert len(set(seen)) == len(seen)
    if drop_last:
        assert all(len(batch) == batch_size for batch in batches)
    else:
        assert sorted(seen) == list(range(len(lengths)))
        assert sum(len(batch) < batch_size for batch in batches) <= 1
    again = make(lengths, batch_size, seed, pool, drop_last)
    again.sampler.set_epoch(epoch)
    assert list(again) == batches


def test_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(100))
    one, two = make(lengths, 4), make(lengths, 4)
    assert list(one) == list(one) == list(two)
    first = list(one)
    one.sampler.set_epoch(1)
    assert list(one) != first
    assert list(make(lengths, 4, seed=1)) != first


def test_lengths_are_similar_and_batches_not_sorted():
    lengths = [(7 * i) % 100 for i in range(400)]
    batches = list(make(lengths, 8))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) <= 4
    shortest = [min(lengths[i] for i in batch) for batch in batches]
    assert shortest != sorted(shortest)
    # No trend: short and long batches are spread over the epoch.
    assert abs(sum(shortest[:25]) / 25 - sum(shortest[25:]) / 25) < 20


def test_pools_keep_the_composition_of_batches_random():
    lengths = [i // 4 for i in range(64)]
    groups = {frozenset(batch) for batch in make(lengths, 4, pool=4)}
    whole = {frozenset(batch) for batch in make(lengths, 4, pool=None)}
    assert whole == {frozenset(range(i, i + 4)) for i in range(0, 64, 4)}
    assert groups != whole


def test_evaluation_order_is_fixed():
    sampler = LengthBatchSampler(SequentialSampler(range(5)), 2, lengths=[5, 1, 4, 2, 3], pool=None)
    assert list(sampler) == list(sampler) == [[0], [1, 3], [4, 2]]


def test_pool_must_be_positive():
    with pytest.raises(ValueError, match="pool must be a positive number of batches, got 0"):
        make([1], 1, pool=0)


def loader(count=10, batch_size=2):
    return ResumableDataLoader(range(count), batch_sampler=make([1] * count, batch_size), collate_fn=list)


def test_loader_resumes_in_the_middle():
    one = loader()
    one.batch_sampler.sampler.set_epoch(3)
    batches = list(one)
    iterator = iter(one)
    seen = [next(iterator), next(iterator)]
    state = one.state_dict()
    assert state == {"epoch": 3, "batches": 2}

    two = loader()
    two.load_state_dict(state)
    iterator = iter(two)  # Lightning creates the iterator first and sets the epoch then
    two.batch_sampler.sampler.set_epoch(3)
    assert seen + list(iterator) == batches
    assert two.state_dict() == {"epoch": 3, "batches": 5}
    assert list(two) == batches, "only the next iteration is a continuation"


@pytest.mark.parametrize("state", [{"epoch": 3, "batches": 5}, {"epoch": 3, "batches": 2}])
def test_a_finished_epoch_is_not_resumed(state):
    # The second: an epoch that limit_train_batches=2 cut short.
    one = loader()
    one.load_state_dict(state)
    one.batch_sampler.sampler.set_epoch(4)
    assert len(list(one)) == 5


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [PreparedDataLoader, ResumableDataLoader])
def test_a_loader_is_prepared_once_before_its_first_batch(kind, workers):
    """What is prepared reaches the order of the batches and the workers, which a copy of all that is there then starts."""
    lengths, shift, calls = [1] * 12, [0], []

    def collate(items):
        return [item + shift[0] for item in items]

    def prepare(one):
        calls.append((one, one.batch_sampler.sampler.epoch))
        lengths[:] = [i % 3 for i in range(12)]
        shift[0] = 100

    options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": collate, "prepare": prepare}
    one = kind(range(12), batch_sampler=make(lengths, 4), **options)
    iterator = iter(one)
    one.batch_sampler.sampler.set_epoch(3)
    assert calls == []
    epochs = [list(iterator), list(one)]
    assert calls == [(one, 3)]
    assert epochs[0] == epochs[1]
    assert sorted(sorted(batch) for batch in epochs[0]) == [[100 + i for i in range(12) if i % 3 == k] for k in range(3)]


def test_a_loader_without_anything_to_prepare():
    assert list(PreparedDataLoader(range(4), batch_size=2, collate_fn=list)) == [[0, 1], [2, 3]]
