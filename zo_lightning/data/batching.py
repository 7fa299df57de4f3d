"""Batches of examples of similar length, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized

import numpy as np
from torch.utils.data import BatchSampler, RandomSampler, Sampler


class ShuffleSampler(RandomSampler):
    """A random order that is a pure function of (seed, epoch), whatever was drawn before.

    Being a :class:`~torch.utils.data.RandomSampler` tells Lightning that this order is random: the distributed sampler
    that it puts in its place in multi-process runs then shuffles too.

    Args:
        data_source: What to draw from; only its length n is used.
        seed: The seed of all epochs.
    """

    def __init__(self, data_source: Sized, seed: int = 0) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # The legacy generator's stream never changes between NumPy releases: a run can be resumed after an upgrade.
        yield from np.random.RandomState([self.seed, self.epoch]).permutation(len(self)).tolist()


class LengthBatchSampler(BatchSampler):
    """Cut a sampler's order into batches of similar length, to pad less.

    The order is taken in pools of ``pool`` batches; a pool is sorted by length and cut into batches. The batches of a
    pool are then ordered by the place that the sampler gave to their first member, which makes their order as random
    as the sampler's own. There is no random number here: everything follows from the sampler, which may be any one,
    such as the distributed sampler that Lightning puts in its place in multi-process runs.

    Args:
        sampler: The order of examples.
        batch_size: The number of examples in a batch.
        drop_last: Whether to leave out the last examples of the order where they do not fill a batch.
        lengths: The length of every example, by its position in the dataset.
        pool: The number of batches that are sorted together; None for all.
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool = False,
        lengths: Sequence[int] = (),
        pool: int | None = 50,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        if pool is not None and pool < 1:
            raise ValueError(f"pool must be a positive number of batches, got {pool}")
        self.lengths = lengths
        self.pool = pool

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        if self.drop_last:
            # Dropped by the sampler's order and not by length: the longest examples would never be seen.
            order = order[: len(order) - len(order) % self.batch_size]
        size = len(order) if self.pool is None else self.pool * self.batch_size
        for start in range(0, len(order), max(1, size)):
            yield from self._batches(order[start : start + size])

    def _batches(self, pool: list[int]) -> list[list[int]]:
        places = sorted(range(len(pool)), key=lambda place: self.lengths[pool[place]])
        batches = [places[start : start + self.batch_size] for start in range(0, len(places), self.batch_size)]
        return [[pool[place] for place in batch] for batch in sorted(batches, key=min)]
