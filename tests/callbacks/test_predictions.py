"""Predictions as a file of rows, in tests and predictions, alone and through the command line."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.quadratic import Quadratic, trainer
from tests.tiny import film_folder
from zo_lightning.callbacks import PredictionWriter
from zo_lightning.cli import main
from zo_lightning.data import PromptDataModule

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """Keep the Arrow copies that `datasets` makes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_datasets")


def read(folder):
    (path,) = folder.glob("**/predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- modules of any kind -----------------------------------------------------------------------------------------------
class Predicts(Quadratic):
    def predict_step(self, batch, batch_idx):
        return [{"index": int(i), "prediction": int(i) % 2} for i in batch]

    def test_step(self, batch, batch_idx):
        return {"rows": self.predict_step(batch, batch_idx)}


class PredictsTensors(Quadratic):
    def predict_step(self, batch, batch_idx):
        return batch

    def test_step(self, batch, batch_idx):
        return batch.sum()


class PredictsNothing(Quadratic):
    def predict_step(self, batch, batch_idx):
        return []

    def test_step(self, batch, batch_idx):
        return None


@pytest.mark.parametrize("verb", ["predict", "test"])
def test_rows_in_the_order_of_their_index(verb, tmp_path):
    run = trainer(tmp_path, callbacks=[PredictionWriter()])
    getattr(run, verb)(Predicts(), DataLoader([3, 1, 0, 2], batch_size=2))
    assert read(tmp_path) == [{"index": i, "prediction": i % 2} for i in range(4)]
    # a second run over fewer rows keeps nothing of the first
    getattr(run, verb)(Predicts(), DataLoader([5, 5, 1], batch_size=2))
    assert read(tmp_path) == [{"index": i, "prediction": 1} for i in (1, 5)]


@pytest.mark.parametrize("verb", ["predict", "test"])
@pytest.mark.parametrize("kind", [PredictsTensors, PredictsNothing])
def test_other_predictions_are_left_alone(verb, kind, tmp_path):
    getattr(trainer(tmp_path, callbacks=[PredictionWriter()]), verb)(kind(), DataLoader([3, 1], batch_size=2))
    assert not (tmp_path / "predictions.jsonl").exists()


def test_scores_that_are_no_numbers_are_null(tmp_path):
    """JSON has no NaN: what Python writes for it other readers refuse."""

    class Broken(Quadratic):
        def predict_step(self, batch, batch_idx):
            return [{"index": int(i), "scores": [0.5, math.nan, -math.inf], "more": {"loss": math.inf}} for i in batch]

    trainer(tmp_path, callbacks=[PredictionWriter()]).predict(Broken(), DataLoader([0], batch_size=1))
    assert read(tmp_path) == [{"index": 0, "scores": [0.5, None, None], "more": {"loss": None}}]


def test_several_dataloaders(tmp_path):
    class Several(Predicts):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            return {"rows": [{"index": int(i), "loader": dataloader_idx} for i in batch]}

    data = [DataLoader([1, 0], batch_size=2), DataLoader([0], batch_size=2)]
    trainer(tmp_path, callbacks=[PredictionWriter()]).test(Several(), data)
    assert read(tmp_path) == [{"index": 0, "loader": 0}, {"index": 1, "loader": 0}, {"index": 0, "loader": 1}]


def test_rows_of_several_processes(tmp_path, monkeypatch):
    """A distributed sampler evens the processes' numbers of rows out by giving some of them twice."""
    others = {(0, index): {"index": index, "prediction": 1} for index in (1, 3, 0)}

    def gather(parts, rows):
        parts[:] = [rows, others]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    writer = PredictionWriter()
    for zero in (False, True):
        run = SimpleNamespace(world_size=2, log_dir=str(tmp_path), is_global_zero=zero, predict_dataloaders=None)
        writer.on_predict_epoch_start(run, None)
        writer.on_predict_batch_end(run, None, [{"index": index, "prediction": 1} for index in (0, 2)], None, 0)
        writer.on_predict_epoch_end(run, None)
        assert list(tmp_path.iterdir()) == ([tmp_path / "predictions.jsonl"] if zero else [])
    assert read(tmp_path) == [{"index": index, "prediction": 1} for index in range(4)]


class Writes(Quadratic):
    """Stands for a model that writes its answers."""

    def __init__(self, texts, **extra):
        super().__init__()
        self.texts, self.extra = texts, extra

    def predict_step(self, batch, batch_idx):
        return [{"index": i, "prediction": self.texts[i], **self.extra} for i in batch["index"].tolist()]


def test_generated_texts(tmp_path, tiny_opt):
    rows = [{"q": "a film", "answers": ["good", "great"]}, {"q": "no plot", "answers": ["bad"]}]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"template": "{q}?", "answer_column": "answers", "candidate": " {answer}", "max_new_tokens": 3}
    data = PromptDataModule(task, str(tmp_path), str(tiny_opt), pin_memory=False)
    run = trainer(tmp_path, callbacks=[PredictionWriter()])
    run.predict(Writes(["great", "Bad."]), data)
    first = {"index": 0, "prompt": "a film?", "prediction": "great", "prediction_text": "great", "answers": ["good", "great"]}
    second = {"index": 1, "prompt": "no plot?", "prediction": "Bad.", "prediction_text": "Bad.", "answers": ["bad"]}
    assert read(tmp_path) == [{**first, "correct": True}, {**second, "correct": False}]
    # a module that compares in its own way says whether they match
    run.predict(Writes(["great", "Bad."], em=1.0, f1=1.0), data)
    assert read(tmp_path) == [{**row, "correct": True, "em": 1.0, "f1": 1.0} for row in (first, second)]


@pytest.mark.parametrize("verb", ["predict", "test"])
def test_rows_of_other_loaders_are_not_taken_for_those_of_an_earlier_datamodule(verb, tmp_path, tiny_opt, films):
    data = PromptDataModule("sst2", str(films), str(tiny_opt), num_eval=4, pin_memory=False)
    run = trainer(tmp_path, callbacks=[PredictionWriter()])
    run.predict(Writes(["great"] * 12), data)
    assert all(row["prompt"].endswith("It was") for row in read(tmp_path))
    getattr(run, verb)(Predicts(), DataLoader([40, 41], batch_size=2))  # which the datamodule has not
    assert read(tmp_path) == [{"index": 40, "prediction": 0}, {"index": 41, "prediction": 1}]


# ---- the command line --------------------------------------------------------------------------------------------------
WORDS = ("terrible", "great")


def slow_rows(model_folder, data_folder, shown=""):
    """What the file holds, one prompt and candidate at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    for index, line in enumerate((data_folder / "validation.jsonl").read_text().splitlines()):
        row = json.loads(line)
        prompt = f"{shown}{row['sentence']} It was"
        scores = []
        for word in WORDS:
            ids = tokenizer(f"{prompt} {word}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(model(ids).logits[0, -2].double().log_softmax(-1)[ids[0, -1]].item())
        best = scores.index(max(scores))
        yield {
            "index": index,
            "prompt": prompt,
            "candidates": [f" {word}" for word in WORDS],
            "scores": pytest.approx(scores, abs=2e-6),
            "prediction": best,
            "prediction_text": WORDS[best],
            "class_name": ("negative", "positive")[best],
            "label": row["label"],
            "gold": [row["label"]],
            "correct": best == row["label"],
        }


@pytest.mark.parametrize("verb", ["test", "predict"])
@pytest.mark.parametrize("demonstrations", [0, 1])
def test_the_file_of_a_run(verb, demonstrations, tiny_opt, tmp_path, capsys):
    data = film_folder(tmp_path, train=2, validation=6)
    main(
        [
            *(verb, "--model", "CausalLMClassificationModule", "--model.model_name_or_path", str(tiny_opt)),
            *("--data", "PromptDataModule", "--data.data_dir", str(data), "--data.eval_batch_size", "4"),
            *("--data.num_train", "1", "--data.num_dev", "1", "--data.num_demonstrations", str(demonstrations)),
            *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "OUT")),
        ]
    )
    written = read(tmp_path / "OUT")
    shown = written[0]["prompt"].removesuffix("a bad film It was")
    assert shown in (
        ["a bad film It was terrible\n\n", "a good film with no plot It was great\n\n"] if demonstrations else [""]
    )
    expected = list(slow_rows(tiny_opt, data, shown))
    assert written == expected
    assert list(written[0]) == list(expected[0]), "in the order in which one reads them"
    if verb == "test":
        accuracy = sum(row["correct"] for row in written) / 6
        (metrics,) = (tmp_path / "OUT").glob("**/metrics.csv")
        header, values = metrics.read_text().splitlines()[:2]
        logged = dict(zip(header.split(","), values.split(","), strict=True))
        assert float(logged["test/acc"]) == pytest.approx(accuracy, abs=1e-6)


def test_multiple_choice_has_no_class_names(tiny_opt, tmp_path):
    rows = [
        {"q": "a film", "options": ["bad", "good plot", "great"], "label": 1},
        {"q": "It was", "options": ["a", "no"], "label": 0},
    ]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            *("test", "--model", "CausalLMMultipleChoiceModule", "--model.model_name_or_path", str(tiny_opt)),
            *(
                "--data",
                "PromptDataModule",
                "--data.data_dir",
                str(tmp_path),
                "--data.task",
                "{template: '{q}', choices: options}",
            ),
            *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "OUT")),
        ]
    )
    for row, line in zip(rows, read(tmp_path / "OUT"), strict=True):
        assert "class_name" not in line
        assert line["candidates"] == [f" {option}" for option in row["options"]]
        assert len(line["scores"]) == len(row["options"])
        assert line["prediction_text"] == row["options"][line["prediction"]]
        assert line["correct"] == (line["prediction"] == row["label"])
