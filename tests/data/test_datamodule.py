"""The DataModule: its parts, its loaders under a Trainer, resuming, and its arguments."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.data.conftest import film_rows, word_tokenizer, write_jsonl
from zo_lightning.data import ClassificationTask, DataError, PromptDataModule, num_candidates

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # Lightning 2.6 asks for the LeafSpec that newer releases of torch deprecate.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def make(folder, words, **kwargs):
    options = {"task": "sst2", "data_dir": str(folder), "tokenizer": words, "batch_size": 4, "pin_memory": False}
    return PromptDataModule(**{**options, **kwargs})


def test_parts(film_dir, words):
    data = make(film_dir, words, num_train=20, num_dev=10, num_eval=8)
    data.prepare_data()
    data.setup()
    train, dev, evaluation = (data.dataset(part) for part in ("train", "dev", "eval"))
    assert [len(part) for part in (train, dev, evaluation)] == [20, 10, 8]
    assert not {item["index"] for item in train.examples} & {item["index"] for item in dev.examples}
    assert data.num_classes == 2
    assert data.class_names == ["negative", "positive"]
    item = evaluation.by_index(evaluation[3]["index"])
    assert item is evaluation[3]
    assert item["prompt"] == film_rows(12)[item["index"]]["sentence"] + " It was"
    assert item["candidates"] == [" terrible", " great"]
    assert item["label"] == item["index"] % 2
    with pytest.raises(KeyError):
        train.by_index(10**6)


def test_stages_prepare_what_they_need_once(film_dir, words, monkeypatch):
    data = make(film_dir, words)
    with pytest.raises(RuntimeError, match=r"'dev' is not prepared: call setup\('fit'\)"):
        data.val_dataloader()
    data.setup("validate")
    dev = data.dataset("dev")
    with pytest.raises(RuntimeError, match=r"'eval' is not prepared: call setup\('test'\)"):
        data.test_dataloader()
    data.setup("fit")
    assert data.dataset("dev") is dev
    data.setup("predict")
    evaluation = data.dataset("eval")
    data.setup("test")
    assert data.dataset("eval") is evaluation


def test_counts_are_logged(film_dir, words, monkeypatch):
    messages = []
    monkeypatch.setattr("zo_lightning.data.datamodule.rank_zero_info", messages.append)
    monkeypatch.setattr("zo_lightning.data.dataset.rank_zero_info", messages.append)
    make(film_dir, words, max_length=8).setup()
    origin = film_dir / "train.jsonl"
    assert messages[0] == f"sst2: 32 training and 8 development rows of the 40 of {origin}, seed 0"
    assert any("prompts lost their beginning to fit into 8 tokens" in message for message in messages)
    assert any("sst2: 12 evaluation rows of the 12" in message for message in messages)


def test_batches(film_dir, words):
    data = make(film_dir, words)
    data.setup()
    for loader, size, count in (
        (data.train_dataloader(), 4, 32),
        (data.val_dataloader(), 8, 8),
        (data.test_dataloader(), 8, 12),
        (data.predict_dataloader(), 8, 12),
    ):
        batches = list(loader)
        assert sorted(int(i) for batch in batches for i in batch["index"]) == sorted(
            item["index"] for item in loader.dataset.examples
        )
        assert len(batches[0]["label"]) == min(size, count)
        assert type(batches[0]) is dict
        for batch in batches:
            assert len(batch["input_ids"]) == len(batch["label"]), "one row for both verbalizers"
            assert num_candidates(batch).tolist() == [2] * len(batch["label"])


def test_seeds(film_dir, words):
    def rows(**kwargs):
        data = make(film_dir, words, num_train=10, num_dev=5, **kwargs)
        data.setup("fit")
        order = [int(i) for batch in data.train_dataloader() for i in batch["index"]]
        return {item["index"] for item in data.dataset("train").examples}, order

    assert rows() == rows()
    assert rows(seed=1)[0] != rows()[0]
    assert rows(shuffle_seed=1)[0] == rows()[0]
    assert rows(shuffle_seed=1)[1] != rows(shuffle_seed=0)[1]  # without one it is that of torch


def test_workers_give_the_same_batches(film_dir, words):
    batches = []
    for workers in (0, 2):
        data = make(film_dir, words, num_workers=workers)
        data.setup("fit")
        batches.append([batch["input_ids"].tolist() for batch in data.train_dataloader()])
    assert batches[0] == batches[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1"),
        ({"num_train": 0}, "num_train must be at least 1"),
        ({"num_dev": 0}, "num_dev must be at least 1"),
        ({"num_eval": 0}, "num_eval must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"shuffle_seed": 2**32}, "shuffle_seed must be from 0 to"),
        ({"task": "sst3"}, "unknown task 'sst3', did you mean 'sst2'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**arguments)


def test_tokenizers(film_dir, words, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer: the module has no `model_name_or_path`.*--data\.tokenizer"):
        make(film_dir, None).setup("fit")
    with pytest.raises(DataError, match=r"cannot load the tokenizer '.*nowhere' \(.*\), check .* --data\.tokenizer"):
        make(film_dir, str(tmp_path / "nowhere")).prepare_data()
    words.save_pretrained(tmp_path / "tokenizer")
    data = make(film_dir, str(tmp_path / "tokenizer"))
    data.prepare_data()
    data.setup("fit")
    assert data.dataset("train")[0]["prompt_ids"][0] == 2


def test_a_second_model_brings_its_own_tokenizer(film_dir, words, bpe, tmp_path):
    """Unless one was given: ids of the first would be other words to the second."""
    for name, tokenizer in (("first", words), ("second", bpe)):
        tokenizer.save_pretrained(tmp_path / name)
    data, given = make(film_dir, None), make(film_dir, words)
    seen = []
    for name in ("first", "second", "second"):
        module = Recorder()
        module.model_name_or_path = str(tmp_path / name)
        for each in (data, given):
            trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, each)
        seen.append([data.dataset("train")[0]["prompt_ids"], given.dataset("train")[0]["prompt_ids"]])
    (first, kept), (second, still), again = seen
    assert first == kept == still != second
    assert again == seen[1]
    assert second[1:] == bpe(data.dataset("train")[0]["prompt"], add_special_tokens=False)["input_ids"]


def test_padding_without_a_pad_token(film_dir):
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    data = make(film_dir, tokenizer)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert bool((batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.eos_token_id).all())


def test_a_row_without_a_value(film_dir, words):
    rows = film_rows(6)
    rows[2]["sentence"] = None
    write_jsonl(film_dir / "validation.jsonl", rows)
    with pytest.raises(DataError, match=r"row 2 \(from 0\) of .*validation\.jsonl: no value in \['sentence'\]"):
        make(film_dir, words).setup("test")


def test_too_few_rows(film_dir, words):
    write_jsonl(film_dir / "train.jsonl", film_rows(1))
    with pytest.raises(DataError, match=r"train\.jsonl: 1 training rows cannot be split"):
        make(film_dir, words).setup("fit")


def test_verbalizers_with_the_same_tokens(film_dir, words):
    task = {"template": "{sentence} It was", "verbalizers": [" good", "  good"]}
    with pytest.raises(DataError, match=r"row \d+ \(from 0\) of .*train\.jsonl: the candidates ' good' and '  good'"):
        make(film_dir, words, task=task).setup("fit")


def test_candidates_that_differ_from_row_to_row(tmp_path, words):
    class Choice(ClassificationTask):
        def __init__(self):
            super().__init__("{question}", ["first", "second"], columns=["question", "answers"])

        def candidates(self, row):
            return [f" {answer}" for answer in row["answers"]]

    rows = [
        {"question": "one", "answers": ["bad", "good"], "label": 0},
        {"question": "two", "answers": ["great", "okay not", "no plot"], "label": 1},
    ]
    write_jsonl(tmp_path / "validation.jsonl", rows)
    data = make(tmp_path, words, task=Choice())
    data.setup("test")
    (batch,) = data.test_dataloader()
    counts = {int(i): int(n) for i, n in zip(batch["index"], num_candidates(batch), strict=True)}
    assert counts == {0: 2, 1: 3}


class Recorder(LightningModule):
    """Learns nothing and writes down which rows it is given."""

    def __init__(self, model_name_or_path=None):
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["index"].tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch["index"].tolist())

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch["index"].tolist())

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch["index"].tolist())
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path, **kwargs):
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**options, **kwargs})


def test_under_a_trainer(film_dir, words, tmp_path):
    words.save_pretrained(tmp_path / "model")
    module = Recorder(str(tmp_path / "model"))
    data = make(film_dir, None)
    run = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    run.fit(module, data)
    flat = {part: [i for batch in seen for i in batch] for part, seen in module.seen.items()}
    train = [item["index"] for item in data.dataset("train").examples]
    assert sorted(flat["train"][:32]) == sorted(flat["train"][32:]) == sorted(train)
    assert flat["train"][:32] != flat["train"][32:]
    assert sorted(flat["val"]) == sorted([item["index"] for item in data.dataset("dev").examples] * 2)
    run.test(module, data, verbose=False)
    run.predict(module, data)
    assert sorted(i for batch in module.seen["test"] for i in batch) == list(range(12))
    assert module.seen["predict"] == module.seen["test"]


def test_overfitting_takes_the_same_batches(film_dir, words, tmp_path):
    module = Recorder()
    trainer(tmp_path, max_epochs=3, overfit_batches=2, limit_val_batches=0).fit(module, make(film_dir, words))
    assert module.seen["train"][:2] == module.seen["train"][2:4] == module.seen["train"][4:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("stop_at", [3, 8, 11, 16, 19])
@pytest.mark.parametrize("limit", [None, 5])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(film_dir, words, tmp_path, stop_at, limit):
    # 8 batches an epoch (5 with the limit): inside the first, at its end, inside the second, at its end, in the third.
    options = {"limit_val_batches": 0, "limit_train_batches": limit}
    whole = Recorder()
    trainer(tmp_path, max_steps=24, **options).fit(whole, make(film_dir, words))

    first = Recorder()
    save = {"every_n_train_steps": stop_at, "save_top_k": -1, "filename": "{step}"}
    options |= {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(tmp_path / "saved", **save)]}
    run = trainer(tmp_path, max_steps=stop_at, **options)
    run.fit(first, make(film_dir, words))

    second = Recorder()
    run = trainer(tmp_path, max_steps=24, **options)
    run.fit(second, make(film_dir, words), ckpt_path=tmp_path / "saved" / f"step={stop_at}.ckpt")
    assert first.seen["train"] + second.seen["train"] == whole.seen["train"]
