"""Several tasks side by side: a batch of each in every step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from zo_lightning.data.datamodule import PromptDataModule
from zo_lightning.data.errors import DataError
from zo_lightning.data.tasks import GenerationTask

__all__ = ["MultiTaskDataModule"]


class MultiTaskDataModule(LightningDataModule):
    """Training batches of several tasks together, for learning that is not of one task.

    A batch is a dictionary from the tasks' names to a :class:`~zo_lightning.data.ScoringBatch` each. An epoch is as long as
    that of the longest task; shorter ones begin again. What is learned of several tasks is tested on others, one at a time.

    Args:
        tasks: A datamodule for each task, with its own rows, batch size and seeds.

    Raises:
        DataError: If there is none, two tasks have one name, or one is a generation task, which has batches of another kind.
    """

    def __init__(self, tasks: list[PromptDataModule]) -> None:
        super().__init__()
        if not tasks:
            raise DataError("tasks: give at least one datamodule")
        names = [member.task.name for member in tasks]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"tasks: two have the name {twice!r}; a task of your own takes a `name`")
        for member in tasks:
            if isinstance(member.task, GenerationTask):
                raise DataError(f"tasks: {member.task.name!r} is a generation task; give tasks with candidates only")
        self.members = dict(zip(names, tasks, strict=True))

    @property
    def num_classes(self) -> int:
        """The largest number of classes."""
        return max(member.num_classes or 0 for member in self.members.values())

    def prepare_data(self) -> None:
        """Download what is needed."""
        for member in self.members.values():
            member.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Choose the rows of each task and tokenise them."""
        for member in self.members.values():
            member.trainer = self.trainer  # from whose module the tokenizer is
            member.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        """A batch of each task."""
        return CombinedLoader({name: member.train_dataloader() for name, member in self.members.items()}, "max_size_cycle")

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The development batches, one task after the other."""
        return [member.val_dataloader() for member in self.members.values()]
