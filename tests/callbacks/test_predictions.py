"""Predictions as a file of rows."""

import json

from torch.utils.data import DataLoader

from tests.quadratic import Quadratic, trainer
from zo_lightning.callbacks import PredictionWriter


class Predicts(Quadratic):
    def predict_step(self, batch, batch_idx):
        return [{"index": int(i), "prediction": int(i) % 2} for i in batch]


class PredictsTensors(Quadratic):
    def predict_step(self, batch, batch_idx):
        return batch


def test_rows_in_the_order_of_their_index(tmp_path):
    data = DataLoader([3, 1, 0, 2], batch_size=2)
    trainer(tmp_path, callbacks=[PredictionWriter()]).predict(Predicts(), data)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert rows == [{"index": i, "prediction": i % 2} for i in range(4)]


def test_other_predictions_are_left_alone(tmp_path):
    data = DataLoader([3, 1], batch_size=2)
    trainer(tmp_path, callbacks=[PredictionWriter()]).predict(PredictsTensors(), data)
    assert not (tmp_path / "predictions.jsonl").exists()
