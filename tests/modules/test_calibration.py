"""Calibrated scores: what a candidate gains by its prompt, against candidates fed one at a time."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tests.data.conftest import word_tokenizer as data_tokenizer
from tests.modules.slow import Scorer, log_likelihood, logged
from tests.modules.test_multiple_choice import copa_texts, options
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import main
from zo_lightning.data import DataError, Example, PromptDataModule, ScoringCollator, repeat_scoring_batch
from zo_lightning.modules import CausalLMClassificationModule, CausalLMMultipleChoiceModule

PAD = 1
#: Prompt, candidates, the right one, neutral prompt, the candidates behind that.
CASES = [
    ([2, 3, 4, 5], [[10], [11, 12], [11, 13, 5]], 1, [2, 8], [[10], [11, 12], [11, 13, 5]]),
    ([2, 3, 11, 4, 6, 7, 8], [[10, 4], [13, 14, 15, 3]], 0, [2], [[16, 10, 4], [16, 13, 14, 15, 3]]),
    ([2, 9], [[10], [11, 12], [11, 13, 5]], 2, [2, 8], [[10], [11, 12], [11, 13, 5]]),
    ([2, 9, 9], [[10], [12]], 0, [2, 8], [[10], [12]]),
]


def make_examples(calibrated=True) -> list[Example]:
    examples = []
    for index, (prompt, candidates, label, neutral, behind) in enumerate(CASES):
        example = Example(
            prompt="", candidates=[], prompt_ids=prompt, candidate_ids=candidates, label=label, gold=[label], index=index
        )
        if calibrated:
            example["neutral_ids"], example["neutral_candidate_ids"] = neutral, behind
        examples.append(example)
    return examples


@pytest.fixture(params=["classification", "multiple choice"])
def module(request, tiny_opt):
    if request.param == "classification":
        made = CausalLMClassificationModule(str(tiny_opt), num_classes=3)
    else:
        made = CausalLMMultipleChoiceModule(str(tiny_opt))
    made.configure_model()
    made.model.double()
    return made.eval()


@pytest.fixture
def batch():
    return ScoringCollator(PAD)(make_examples())


def trainer(tmp_path, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **arguments})


def slow(module) -> list[list[float]]:
    return [
        [
            log_likelihood(module.model, prompt, ids) - log_likelihood(module.model, neutral, alone)
            for ids, alone in zip(candidates, behind, strict=True)
        ]
        for prompt, candidates, _, neutral, behind in CASES
    ]


@torch.no_grad()
def test_scores_are_differences_of_sums(module, batch):
    expected = torch.tensor([row + [-math.inf] * (3 - len(row)) for row in slow(module)], dtype=torch.float64)
    torch.testing.assert_close(module(batch), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_loss_is_not_calibrated(module, batch):
    plain = ScoringCollator(PAD)(make_examples(calibrated=False))
    assert "neutral" not in plain
    torch.testing.assert_close(module.loss(batch), module.loss(plain), rtol=0, atol=0)
    assert not torch.equal(module(batch), module(plain))


def test_every_neutral_prompt_is_fed_once(batch):
    """The first and the third are the same; the fourth has the same prompt and other candidates."""
    neutral = batch["neutral"]
    fed = [ids[mask.bool()].tolist() for ids, mask in zip(neutral["input_ids"], neutral["attention_mask"], strict=True)]
    assert sorted(fed) == [[2, 8], [2, 8, 11, 13], [2, 16, 10], [2, 16, 13, 14, 15]]
    assert batch["candidate_neutral"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6]
    assert neutral["candidate_length"].tolist() == [1, 2, 3, 3, 5, 1, 1]


def test_one_neutral_prompt_for_all_verbalizers_of_a_batch():
    """As in SST-2: one row, whatever the number of examples."""
    examples = make_examples()[3:] * 7
    batch = ScoringCollator(PAD)(examples)
    assert batch["neutral"]["attention_mask"].sum() == 2
    assert len(batch["neutral"]["input_ids"]) == 1
    assert batch["candidate_neutral"].tolist() == [0, 1] * 7


@pytest.mark.parametrize("copies", [1, 2, 3])
@torch.no_grad()
def test_copies_in_one_batch(copies, module, batch):
    before = copy.deepcopy(batch)
    repeated = module.repeat_batch(batch, copies)
    assert len(repeated["neutral"]["input_ids"]) == copies * len(batch["neutral"]["input_ids"])
    count = len(batch["neutral"]["candidate_length"])
    owners = repeated["candidate_neutral"].view(copies, -1) // count
    assert owners.tolist() == [[i] * len(batch["candidate_neutral"]) for i in range(copies)], "each copy reads its own"
    torch.testing.assert_close(module(repeated), module(batch).repeat(copies, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.loss(repeated), module.loss(batch).repeat(copies), rtol=0, atol=1e-12)
    assert all(torch.equal(batch[key], before[key]) for key in batch if key != "neutral")
    assert repeat_scoring_batch(batch, 1).keys() == batch.keys()


@pytest.mark.parametrize("kind", [CausalLMClassificationModule, CausalLMMultipleChoiceModule])
def test_accuracy_and_predictions_follow_the_calibrated_scores(kind, tiny_opt, tmp_path):
    """With the highest difference as the label, every prediction is right."""
    options = {"num_classes": 3} if kind is CausalLMClassificationModule else {}
    reference = kind(str(tiny_opt), **options)
    reference.configure_model()
    reference.model.double().eval()
    scores = slow(reference)
    best = [max(range(len(row)), key=row.__getitem__) for row in scores]
    plain = reference(ScoringCollator(PAD)(make_examples(calibrated=False))).argmax(dim=1).tolist()
    assert best != plain, "the cases tell both apart"
    examples = make_examples()
    for example, right in zip(examples, best, strict=True):
        example["label"], example["gold"] = right, [right]
    loader = DataLoader([ScoringCollator(PAD)(examples)], batch_size=None)
    metrics = trainer(tmp_path).validate(kind(str(tiny_opt), **options), loader, verbose=False)[0]
    assert metrics["val/acc"] == 1.0
    rows = trainer(tmp_path).predict(kind(str(tiny_opt), **options), loader)[0]
    assert [row["prediction"] for row in rows] == best
    for row, expected in zip(rows, scores, strict=True):
        assert row["scores"] == pytest.approx(expected, abs=1e-4)


# ---- the datamodule ----------------------------------------------------------------------------------------------------
def test_only_evaluations_are_calibrated(films, tiny_opt, tmp_path):
    seen = {}

    class Spy(CausalLMClassificationModule):
        def on_train_batch_start(self, batch, batch_idx):
            seen["train"] = batch

        def on_validation_batch_start(self, batch, batch_idx):
            seen["val"] = batch

        def on_test_batch_start(self, batch, batch_idx):
            seen["test"] = batch

    data = PromptDataModule("sst2", str(films), batch_size=4, num_train=32, num_dev=16, calibrated=True, pin_memory=False)
    run = trainer(tmp_path, max_steps=2, callbacks=[AdaNAGED()], num_sanity_val_steps=0, val_check_interval=2)
    module = Spy(str(tiny_opt))
    run.fit(module, data)
    run.test(module, data, verbose=False)
    assert {part: "neutral" in batch for part, batch in seen.items()} == {"train": False, "val": True, "test": True}
    assert len(seen["val"]["neutral"]["input_ids"]) == 1


def test_an_empty_neutral_prompt_is_the_bos(films):
    task = {"template": "{sentence}", "verbalizers": [" bad", " good"], "neutral_template": ""}
    data = PromptDataModule(task, str(films), data_tokenizer(), calibrated=True, pin_memory=False)
    data.setup("validate")
    assert {tuple(item["neutral_ids"]) for item in data.dataset("dev").examples} == {(2,)}


def test_an_empty_neutral_prompt_needs_a_bos(films):
    from tokenizers import processors

    tokenizer = data_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    task = {"template": "{sentence}", "verbalizers": [" bad", " good"], "neutral_template": ""}
    PromptDataModule(task, str(films), tokenizer, pin_memory=False).setup("validate")
    message = (
        r"row \d+ \(from 0\) of .*train\.jsonl, neutral prompt: the prompt has no token before the candidates "
        r"\[' bad', ' good'\], and the tokenizer puts no BOS in front; lengthen the template \(`neutral_template`"
    )
    with pytest.raises(DataError, match=message):
        PromptDataModule(task, str(films), tokenizer, calibrated=True, pin_memory=False).setup("validate")


def test_generation_has_nothing_to_calibrate():
    task = {"template": "{question}", "answer_column": "answers"}
    with pytest.raises(DataError, match="calibrated=True compares candidates, and task 'custom' has none to choose from"):
        PromptDataModule(task, calibrated=True)


# ---- the command line on a real model and real rows --------------------------------------------------------------------
@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """Keep the Arrow copies that `datasets` makes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_datasets")


def test_zero_shot_copa(shared, tmp_path):
    main(["validate", *options(shared, tmp_path, "--data.num_dev", "50", "--data.calibrated", "true")])
    rows = [json.loads(line) for line in (shared / "data" / "copa" / "train.jsonl").read_text().splitlines()]
    score = Scorer(shared / "models" / "opt-mini")
    hits, loss = 0, 0.0
    for number in np.random.RandomState(0).permutation(400)[350:]:
        prompt, choices = copa_texts(rows[number])
        sums, counts = score(prompt, choices)
        alone, _ = score(prompt.rpartition(" ")[2], choices)
        gains = [a - b for a, b in zip(sums, alone, strict=True)]
        label = rows[number]["label"]
        hits += gains[label] > gains[1 - label]
        loss -= sums[label] / counts[label]
    assert logged(tmp_path, "val/acc") == pytest.approx(hits / 50, abs=1e-7)
    assert logged(tmp_path, "val/loss") == pytest.approx(loss / 50, abs=1e-5)


@pytest.mark.parametrize("calibrated", [False, True])
def test_zero_shot_sst2(calibrated, shared, tmp_path):
    folder, model = shared / "data" / "sst2", shared / "models" / "opt-mini"
    if not folder.is_dir() or not model.is_dir():
        pytest.skip(f"no rows of SST-2 or no model in {shared}")
    arguments = [
        *("--model", "CausalLMClassificationModule", "--model.model_name_or_path", str(model)),
        *("--data", "PromptDataModule", "--data.task", "sst2", "--data.data_dir", str(folder), "--data.num_dev", "50"),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path)),
    ]
    main(["validate", *arguments, "--data.calibrated", str(calibrated).lower()])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    score = Scorer(model)
    neutral = score("It was", [" terrible", " great"])[0]
    hits, loss = 0, 0.0
    for number in np.random.RandomState(0).permutation(len(rows))[1000:1050]:
        sums, counts = score(rows[number]["sentence"].strip() + " It was", [" terrible", " great"])
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        decisive = [total - base for total, base in zip(sums, neutral, strict=True)] if calibrated else means
        label = rows[number]["label"]
        hits += decisive[label] > decisive[1 - label]
        loss += math.log(sum(math.exp(mean) for mean in means)) - means[label]
    assert logged(tmp_path, "val/acc") == pytest.approx(hits / 50, abs=1e-7)
    assert logged(tmp_path, "val/loss") == pytest.approx(loss / 50, abs=1e-5)
