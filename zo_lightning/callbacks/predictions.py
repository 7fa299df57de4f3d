"""Write predictions to a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["PredictionWriter"]


class PredictionWriter(BasePredictionWriter):
    """Writes the rows that ``predict_step`` returns to ``predictions.jsonl`` in the log folder, ordered by ``index``.

    A row is a dictionary of plain values; ``class_name`` is added where the datamodule has ``class_names``. Modules that
    return anything else are left alone.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the file."""
        batches = [batch for batch in predictions if isinstance(batch, list)]
        rows = [dict(row) for batch in batches for row in batch if isinstance(row, dict) and "index" in row]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks the other processes
        if not rows or not trainer.is_global_zero:
            return
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        for row in rows:
            if names is not None and "prediction" in row:
                row["class_name"] = names[row["prediction"]]
        path = folder / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) for row in sorted(rows, key=lambda row: row["index"]))
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        rank_zero_info(f"{len(rows)} predictions in {path}")
