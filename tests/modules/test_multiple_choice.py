"""The multiple-choice module against candidates fed one at a time, and its life in a Trainer and on the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from tests.modules.slow import Scorer, log_likelihood, logged, make_examples
from tests.tiny import save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import main
from zo_lightning.data import PromptDataModule, PromptDataset, ScoringCollator
from zo_lightning.modules import CausalLMClassificationModule, CausalLMMultipleChoiceModule

PAD = 1
#: Prompt, candidates, the right ones: 2 to 5 candidates of 1 to 4 tokens, which may begin alike.
CASES = [
    ([2, 3, 4, 5], [[10], [11, 12], [11, 13, 5]], [1]),
    ([2, 3, 11, 4, 6, 7, 8], [[10, 4], [13, 14, 15, 3]], [0]),
    ([2, 9], [[10, 11], [11], [12], [13, 10], [14, 3, 4]], [3, 0, 4]),
    ([2, 5, 5, 6], [[20, 21, 22], [20, 21, 3], [4]], [2, 1]),
]


@pytest.fixture
def batch():
    return ScoringCollator(PAD)(make_examples(CASES))


def make(folder, dtype=torch.float64, **arguments) -> CausalLMMultipleChoiceModule:
    module = CausalLMMultipleChoiceModule(str(folder), **arguments)
    module.configure_model()
    module.model.to(dtype)
    return module.eval()


def trainer(tmp_path, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **arguments})


def slow(module, normalised=True) -> list[list[float]]:
    """The score of each candidate of each case."""
    return [
        [log_likelihood(module.model, prompt, ids) / (len(ids) if normalised else 1) for ids in candidates]
        for prompt, candidates, _ in CASES
    ]


def table(rows: list[list[float]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_scores_are_those_of_one_candidate_at_a_time(kind, normalised, batch, tmp_path):
    module = make(save_tiny_model(tmp_path, tiny_config(kind)), length_normalised=normalised)
    torch.testing.assert_close(module(batch), table(slow(module, normalised)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_the_language_modelling_loss_is_that_of_the_first_right_choice(normalised, batch, tiny_opt):
    """Per token, whether the scores are or not; and the same from batches that hold nothing else."""
    module = make(tiny_opt, length_normalised=normalised)
    expected = [-scores[gold[0]] for scores, (_, _, gold) in zip(slow(module), CASES, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(module.loss(batch), expected, rtol=0, atol=1e-10)
    alone = ScoringCollator(PAD)(PromptDataset(make_examples(CASES)).gold_only().examples)
    assert len(alone["input_ids"]) == len(alone["candidate_length"]) == len(CASES)
    torch.testing.assert_close(module.loss(alone), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_the_classification_loss_is_the_cross_entropy_over_the_choices(normalised, batch, tiny_opt):
    module = make(tiny_opt, length_normalised=normalised, train_on="classification")
    expected = []
    for scores, (_, _, gold) in zip(slow(module, normalised), CASES, strict=True):
        expected.append(math.log(sum(math.exp(score) for score in scores)) - scores[gold[0]])
    torch.testing.assert_close(module.loss(batch), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("train_on", ["lm", "classification"])
@pytest.mark.parametrize("copies", [2, 3])
@torch.no_grad()
def test_copies_in_one_batch_score_alike(train_on, copies, batch, tiny_opt):
    module = make(tiny_opt, train_on=train_on)
    repeated = module.repeat_batch(batch, copies)
    torch.testing.assert_close(module(repeated), module(batch).repeat(copies, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.loss(repeated), module.loss(batch).repeat(copies), rtol=0, atol=1e-12)
    assert repeated["candidate_gold"].tolist() == batch["candidate_gold"].tolist() * copies


def test_a_prediction_is_right_if_it_is_any_of_the_right_choices(batch, tiny_opt, tmp_path):
    """Every set of right choices of every case is tried: what counts is whether the best candidate is in it."""
    best = [max(range(len(scores)), key=scores.__getitem__) for scores in slow(make(tiny_opt))]
    cases = [
        (prompt, candidates, [k for k in range(len(candidates)) if subset >> k & 1])
        for prompt, candidates, _ in CASES
        for subset in range(1, 2 ** len(candidates))
    ]
    count = sum(best[[prompt for prompt, _, _ in CASES].index(prompt)] in gold for prompt, _, gold in cases)
    batches = [ScoringCollator(PAD)(make_examples(cases[i : i + 7])) for i in range(0, len(cases), 7)]
    module = CausalLMMultipleChoiceModule(str(tiny_opt))
    metrics = trainer(tmp_path).validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    assert 0 < count < len(cases)
    assert metrics["val/acc"] == pytest.approx(count / len(cases), abs=1e-7)
    assert set(metrics) == {"val/loss", "val/acc"}


def test_the_count_is_exact_in_half_precision(tiny_opt, tmp_path):
    """In bfloat16 a sum of ones ends at 256."""
    module = CausalLMMultipleChoiceModule(str(tiny_opt))
    loader = DataLoader([ScoringCollator(PAD)([example]) for example in make_examples(CASES[:2])] * 150, batch_size=None)
    metrics = trainer(tmp_path, precision="bf16-true").validate(module, loader, verbose=False)[0]
    predictions = [max(range(len(row)), key=row.__getitem__) for row in slow(make(tiny_opt))[:2]]
    share = sum(best in gold for best, (_, _, gold) in zip(predictions, CASES, strict=False)) / 2
    assert metrics["val/acc"] == share


def test_loss_weighted_by_the_size_of_the_batches(tiny_opt, tmp_path):
    batches = [ScoringCollator(PAD)(make_examples(CASES[:3])), ScoringCollator(PAD)(make_examples(CASES[3:]))]
    module = CausalLMMultipleChoiceModule(str(tiny_opt))
    metrics = trainer(tmp_path).test(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    scores = slow(make(tiny_opt))
    expected = -sum(row[gold[0]] for row, (_, _, gold) in zip(scores, CASES, strict=True)) / len(CASES)
    assert metrics["test/loss"] == pytest.approx(expected, abs=1e-5)


def test_predictions(batch, tiny_opt, tmp_path):
    module = CausalLMMultipleChoiceModule(str(tiny_opt))
    rows = trainer(tmp_path).predict(module, DataLoader([batch], batch_size=None))[0]
    expected = slow(make(tiny_opt))
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["prediction"] for row in rows] == [max(range(len(s)), key=s.__getitem__) for s in expected]
    assert [len(row["scores"]) for row in rows] == [3, 2, 5, 3]
    for row, scores in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)


def test_an_unknown_objective(tiny_opt):
    with pytest.raises(ValueError, match="train_on must be 'lm' or 'classification', got 'nll'"):
        CausalLMMultipleChoiceModule(str(tiny_opt), train_on="nll")


# ---- with a datamodule -------------------------------------------------------------------------------------------------
@pytest.fixture
def questions(tmp_path) -> Path:
    """Rows of 2 to 4 choices."""
    choices = [["good", "bad"], ["no plot", "a plot", "great"], ["terrible", "good", "bad film", "No"]]
    rows = [{"text": "a film" + " with no plot" * (i % 2), "options": choices[i % 3], "label": i % 2} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


TASK = {"template": "{text} It was", "choices": "options"}


@pytest.mark.parametrize("train_on", ["lm", "classification"])
def test_training_feeds_what_the_loss_reads(train_on, questions, tiny_opt):
    fed = {"train": [], "val": []}

    class Spy(CausalLMMultipleChoiceModule):
        def on_train_batch_start(self, batch, batch_idx):
            fed["train"].append(batch)

        def on_validation_batch_start(self, batch, batch_idx):
            fed["val"].append(batch)

    data = PromptDataModule(TASK, str(questions), batch_size=4, num_train=16, num_dev=8, pin_memory=False)
    fit = trainer(questions, max_steps=4, callbacks=[AdaNAGED()], limit_val_batches=1, num_sanity_val_steps=0)
    fit.fit(Spy(str(tiny_opt), train_on=train_on), data)
    train, dev = data.dataset("train"), data.dataset("dev")
    assert len(train[0]["candidates"]) > 1, "the dataset keeps all"
    seen = [int(index) for batch in fed["train"] for index in batch["index"]]
    assert sorted(seen) == sorted(item["index"] for item in train.examples)
    for batch in fed["train"]:
        examples = [train.by_index(int(index)) for index in batch["index"]]
        counts = [1 if train_on == "lm" else len(item["candidates"]) for item in examples]
        assert torch.bincount(batch["candidate_example"]).tolist() == counts
        if train_on == "lm":
            assert len(batch["input_ids"]) == 4
            right = [token for item in examples for token in item["candidate_ids"][item["label"]]]
            assert batch["token_id"].tolist() == right
    (batch,) = fed["val"]
    counts = [len(dev.by_index(int(index))["candidates"]) for index in batch["index"]]
    assert torch.bincount(batch["candidate_example"]).tolist() == counts


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_task_of_another_kind_is_refused(stage, questions, films, tiny_opt):
    (questions / "validation.jsonl").write_text((questions / "train.jsonl").read_text())
    wrong = [
        (CausalLMMultipleChoiceModule(str(tiny_opt)), PromptDataModule("sst2", str(films), pin_memory=False)),
        (CausalLMClassificationModule(str(tiny_opt)), PromptDataModule(TASK, str(questions), pin_memory=False)),
    ]
    messages = [
        "CausalLMMultipleChoiceModule is for tasks of the kind 'multiple_choice', and 'sst2' is one of the kind "
        "'classification': use CausalLMClassificationModule",
        "CausalLMClassificationModule is for tasks of the kind 'classification', and 'custom' is one of the kind "
        "'multiple_choice': use CausalLMMultipleChoiceModule",
    ]
    for (module, data), message in zip(wrong, messages, strict=True):
        run = trainer(questions, max_steps=1, callbacks=[AdaNAGED()])
        with pytest.raises(MisconfigurationException, match=message):
            getattr(run, stage)(module, datamodule=data)


def test_the_objective_is_kept_in_a_checkpoint(questions, tiny_opt):
    data = PromptDataModule(TASK, str(questions), batch_size=4, pin_memory=False)
    fit = trainer(questions, max_steps=1, callbacks=[AdaNAGED()], limit_val_batches=0)
    fit.fit(CausalLMMultipleChoiceModule(str(tiny_opt), train_on="classification", length_normalised=False), data)
    fit.save_checkpoint(questions / "x.ckpt")
    again = CausalLMMultipleChoiceModule.load_from_checkpoint(questions / "x.ckpt")
    assert (again.train_on, again.length_normalised) == ("classification", False)


# ---- the command line on a real model and real rows --------------------------------------------------------------------
@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """Keep the Arrow copies that `datasets` makes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_datasets")


def copa_texts(row) -> tuple[str, list[str]]:
    """A row of COPA as a prompt and its continuations."""
    premise = row["premise"].strip()
    premise = premise[:-1] if premise[-1] == "." else premise
    prompt = premise + {"cause": " because", "effect": " so"}[row["question"]]
    words = [row[f"choice{k}"].strip().split(" ") for k in (1, 2)]
    return prompt, ["".join(f" {w}" for w in [w[0] if w[0] == "I" else w[0].lower(), *w[1:]]) for w in words]


def options(shared, out, *more: str) -> list[str]:
    if not (shared / "data" / "copa").is_dir() or not (shared / "models" / "opt-mini").is_dir():
        pytest.skip(f"no rows of COPA or no model in {shared}")
    return [
        *("--model", "CausalLMMultipleChoiceModule", "--model.model_name_or_path", str(shared / "models" / "opt-mini")),
        *("--data", "PromptDataModule", "--data.task", "copa", "--data.data_dir", str(shared / "data" / "copa")),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(out), *more),
    ]


def test_zero_shot_copa_from_the_command_line(shared, tmp_path):
    main(["validate", *options(shared, tmp_path)])
    rows = [json.loads(line) for line in (shared / "data" / "copa" / "train.jsonl").read_text().splitlines()]
    score = Scorer(shared / "models" / "opt-mini")
    losses, hits = [], 0
    for number in np.random.RandomState(0).permutation(400)[300:]:
        sums, counts = score(*copa_texts(rows[number]))
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        losses.append(-means[rows[number]["label"]])
        hits += max((0, 1), key=means.__getitem__) == rows[number]["label"]
    assert logged(tmp_path, "val/loss") == pytest.approx(sum(losses) / 100, abs=1e-5)
    assert logged(tmp_path, "val/acc") == pytest.approx(hits / 100, abs=1e-7)


def test_a_run_from_the_command_line_lowers_the_objective(shared, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "AdaNAGED"}]}}))
    steps = ("--trainer.max_steps", "100", "--trainer.limit_val_batches", "0", "--data.batch_size", "8")
    main(["fit", "--config", str(config), *options(shared, tmp_path, *steps)])
    rows = [json.loads(line) for line in (shared / "data" / "copa" / "train.jsonl").read_text().splitlines()]
    rows = [rows[number] for number in np.random.RandomState(0).permutation(400)[:40]]
    score = Scorer(shared / "models" / "opt-mini")

    def objective() -> float:
        total = 0.0
        for row in rows:
            prompt, choices = copa_texts(row)
            (log_p,), (count,) = score(prompt, [choices[row["label"]]])
            total -= log_p / count
        return total / len(rows)

    before = objective()
    (path,) = tmp_path.glob("**/last.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    score.model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})

    assert objective() < before - 0.05
