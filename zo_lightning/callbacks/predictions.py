"""Write predictions to a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from zo_lightning.data import Example, PromptDataModule

__all__ = ["PredictionWriter"]

Row = dict[str, Any]


class PredictionWriter(Callback):
    """Writes what a model predicts in ``test`` and ``predict`` to ``predictions.jsonl`` in the log folder, a line per example.

    ``predict_step`` returns a list of rows, and ``test_step`` returns ``{"rows": [...]}``. A row is a dictionary of plain
    values: the ``index`` of an example, a ``prediction`` (the number of a candidate, or a text), and the ``scores`` of the
    candidates.

    With a :class:`~zo_lightning.data.PromptDataModule` a line also has the ``prompt`` that the model was given, in whole even
    if it had to be cut; the ``candidates``; the ``prediction_text``; the ``class_name`` of the prediction; what is right, as
    ``label`` and ``gold`` (the first right candidate, and all) or as ``answers``; and whether the prediction is ``correct``.
    What else a row has is written as it is, but for numbers that JSON does not know (NaN and infinite scores), which are
    ``null``. Lines are in the order of ``index``, each written once.

    Modules that return anything else are left alone.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], Row] = {}  # by dataloader and index

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        self._keep(outputs.get("rows") if isinstance(outputs, Mapping) else None, dataloader_idx)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        self._keep(outputs, dataloader_idx)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the rows of a run that was cut short."""
        self._rows = {}

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the rows of a run that was cut short."""
        self._rows = {}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer, trainer.test_dataloaders)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._write(trainer, trainer.predict_dataloaders)

    def _keep(self, rows: Any, dataloader_idx: int) -> None:
        if isinstance(rows, list):
            kept = (row for row in rows if isinstance(row, dict) and "index" in row)
            self._rows |= {(dataloader_idx, row["index"]): row for row in kept}

    def _write(self, trainer: Trainer, loaders: Any) -> None:
        rows, self._rows = self._rows, {}
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            # a distributed sampler gives some rows to two processes
            rows = {key: row for part in parts for key, row in part.items()}
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks the other processes
        if not rows or not trainer.is_global_zero:
            return
        datamodule, fed = getattr(trainer, "datamodule", None), getattr(loaders, "dataset", None)
        ordered = [rows[key] for key in sorted(rows)]
        # the Trainer keeps the datamodule of an earlier call, from which other loaders need not be
        if isinstance(datamodule, PromptDataModule) and fed is datamodule.dataset("eval"):
            names, dataset = datamodule.class_names, datamodule.dataset("eval")
            ordered = [_completed(row, dataset.by_index(row["index"]), names) for row in ordered]
        path = folder / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) for row in ordered)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        rank_zero_info(f"{len(ordered)} predictions in {path}")


def _completed(row: Row, example: Example, class_names: list[str] | None) -> Row:
    """A row with the texts of its example, in the order in which one reads them."""
    prediction = row.get("prediction")
    told: Row = {"index": row["index"], "prompt": example["prompt"], "candidates": example["candidates"]}
    if isinstance(prediction, str):
        answers = example.get("answers", [])
        del told["candidates"]  # what is trained on: the first answer
        told |= {"prediction": prediction, "prediction_text": prediction, "answers": answers}
        told["correct"] = row.get("em", prediction in answers) == 1
    elif isinstance(prediction, int):
        told |= {"scores": row.get("scores"), "prediction": prediction}
        told["prediction_text"] = example["candidates"][prediction].strip()
        if class_names is not None:
            told["class_name"] = class_names[prediction]
        told |= {"label": example["label"], "gold": example["gold"], "correct": prediction in example["gold"]}
    return told | row


def _finite(value: Any) -> Any:
    """The same with None for numbers that are NaN or infinite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
