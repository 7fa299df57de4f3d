"""Data loaders that prepare themselves when they are first used, and that resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

__all__ = ["PreparedDataLoader", "ResumableDataLoader"]


class PreparedDataLoader(DataLoader[Any]):
    """A :class:`~torch.utils.data.DataLoader` that waits with what depends on the model until its first batch is asked for.

    Lightning may make the loaders before the model, to count the steps.

    Args:
        dataset: See the base class.
        batch_size: See the base class.
        prepare: Called with the loader before its first iteration, ahead of any worker process.
        **kwargs: See the base class.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        *,
        prepare: Callable[[DataLoader[Any]], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, batch_size, **kwargs)
        self.prepare = prepare
        self._prepared = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator starts at its first `next`: by then Lightning, which creates it earlier, has set the epoch.
        if self.prepare is not None and not self._prepared:
            self._prepared = True
            self.prepare(self)
        yield from super().__iter__()


class ResumableDataLoader(PreparedDataLoader):
    """A loader whose place in the epoch is part of the checkpoint.

    Lightning saves and restores the state of loaders that have one. A run that is resumed then sees exactly the batches
    that it would have seen, provided that the order of the batches depends on the epoch alone, as that of
    :class:`~zo_lightning.data.ShuffleSampler` does. The batches before that place are collated again and dropped, which
    costs little where examples are tokenised once and kept. Arguments are those of the base class.
    """

    _handed_out = 0
    _resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        resume, self._resume = self._resume, None
        skip = 0
        # An epoch cut short by limit_train_batches ends at a place that is no place to go on from in the next epoch.
        if resume is not None and resume["epoch"] == self._epoch and resume["batches"] < len(self):
            skip = resume["batches"]
        self._handed_out = 0
        for batch in super().__iter__():
            self._handed_out += 1
            if self._handed_out > skip:
                yield batch

    @property
    def _epoch(self) -> int:
        return int(getattr(getattr(self.batch_sampler, "sampler", None), "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were handed out; what was loaded, until the next iteration begins."""
        if self._resume is not None:
            return dict(self._resume)
        return {"epoch": self._epoch, "batches": self._handed_out}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iteration leave out the batches that were handed out, if it is one of the same epoch."""
        self._resume = dict(state_dict)
