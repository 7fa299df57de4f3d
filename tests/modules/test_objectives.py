"""Scores of decisions as objectives: their values, the losses made of them, and runs that train on them."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from tests.modules.slow import make_examples
from tests.tiny import film_folder, save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.cli import main
from zo_lightning.data import GenerationTask, PromptDataModule, ScoringCollator
from zo_lightning.modules import (
    CausalLMClassificationModule,
    CausalLMGenerationModule,
    CausalLMMultipleChoiceModule,
)
from zo_lightning.modules.objectives import OBJECTIVES, Objective, accuracy, exact_match, token_f1
from zo_lightning.optim import LMO, ZerothOrder

#: Prompt, candidates, the right ones.
CASES = [
    ([2, 3, 4, 5], [[10], [11, 12], [11, 13, 5]], [1]),
    ([2, 3, 11, 4, 6, 7, 8], [[10, 4], [13, 14, 15, 3]], [0]),
    ([2, 9], [[10, 11], [11], [12], [13, 10], [14, 3, 4]], [3, 0, 4]),
]


def scoring_batch():
    return ScoringCollator(1)(make_examples(CASES))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), tiny_config("opt"))


def made(kind, folder, **arguments):
    module = kind(str(folder), **arguments)
    module.configure_model()
    return module.eval()


def both_classes(predictions, batch):
    """An objective of a user's: the share of the rarer class among the decisions, one number for a batch."""
    share = float(predictions.float().mean())
    return 2 * min(share, 1 - share)


def halved(predictions, batch):
    """Another, one number for each example, from -1 to 1."""
    return torch.where(predictions == batch["label"], 1.0, -1.0)


# ---- scores ------------------------------------------------------------------------------------------------------------
def test_accuracy_counts_any_right_candidate():
    batch = scoring_batch()
    for chosen in ([1, 0, 0], [0, 1, 1], [2, 0, 4], [1, 1, 2]):
        expected = [float(k in gold) for k, (_, _, gold) in zip(chosen, CASES, strict=True)]
        assert accuracy(torch.tensor(chosen), batch).tolist() == expected


def test_scores_of_texts():
    """By hand: shared words over those written (precision) and those of the answer (recall), articles left out."""
    batch = {"answers": [["The Red Lion", "red"], ["a 12th century"], ["no"], ["yes"]]}
    texts = ["the red lion inn", "in the 12th century", "", "Yes."]
    assert token_f1(texts, batch).tolist() == pytest.approx(
        [2 * (2 / 3) * 1 / (2 / 3 + 1), 2 * (2 / 3) / (2 / 3 + 1), 0.0, 1.0]
    )
    assert exact_match(texts, batch).tolist() == [0.0, 0.0, 0.0, 1.0]


# ---- losses ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [CausalLMClassificationModule, CausalLMMultipleChoiceModule])
def test_the_loss_is_what_is_missing_to_the_best_score(kind, tiny_folder):
    module, batch = made(kind, tiny_folder, objective="accuracy"), scoring_batch()
    with torch.no_grad():
        chosen = module(batch).argmax(dim=1).tolist()
        losses = module.loss(batch)
    assert losses.tolist() == [float(k not in gold) for k, (_, _, gold) in zip(chosen, CASES, strict=True)]
    assert module.f_high == 1.0
    assert made(kind, tiny_folder).f_high is None


def test_all_candidates_are_fed_for_a_decision(tiny_folder):
    assert made(CausalLMMultipleChoiceModule, tiny_folder).reads_gold_only
    assert not made(CausalLMMultipleChoiceModule, tiny_folder, objective="accuracy").reads_gold_only


def test_bounds_of_a_users_score(tiny_folder):
    module = made(CausalLMClassificationModule, tiny_folder, objective=halved, best_score=1.0, worst_score=-1.0)
    batch = scoring_batch()
    with torch.no_grad():
        right = module(batch).argmax(dim=1) == batch["label"]
        assert module.loss(batch).tolist() == (2.0 * ~right).tolist()
    assert module.f_high == 2.0


def test_evaluations_log_the_objective_as_their_loss(tiny_folder, tmp_path):
    film_folder(tmp_path)
    data = PromptDataModule("sst2", str(tmp_path), num_train=30, num_dev=20)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    for run, prefix in ((trainer.validate, "val"), (trainer.test, "test")):
        (found,) = run(CausalLMClassificationModule(str(tiny_folder), objective="accuracy"), data, verbose=False)
        assert found[f"{prefix}/loss"] == pytest.approx(1 - found[f"{prefix}/acc"])


@pytest.mark.parametrize(("objective", "name"), [("f1", "f1"), ("exact_match", "em")])
def test_the_loss_of_what_is_written(objective, name, tiny_folder, tmp_path):
    rows = [
        {"text": "a film", "answer": "good"},
        {"text": "no plot", "answer": "bad"},
        {"text": "a plot with no film", "answer": "a"},
    ]
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = GenerationTask("{text} ?", "answer", max_new_tokens=4)
    data = PromptDataModule(task, str(tmp_path), num_train=2, num_dev=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    (found,) = trainer.test(CausalLMGenerationModule(str(tiny_folder), objective=objective), data, verbose=False)
    assert found["test/loss"] == pytest.approx(1 - found[f"test/{name}"])


# ---- runs --------------------------------------------------------------------------------------------------------------
def fit(module, data, tmp_path, steps, **arguments):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        **arguments,
    )
    trainer.fit(module, data)
    return trainer


def test_the_rule_is_told_of_the_bounds(tiny_folder, tmp_path):
    film_folder(tmp_path)
    data = PromptDataModule("sst2", str(tmp_path), num_train=30, num_dev=20)
    rules = {}
    for objective in ("loss", "accuracy"):
        rule = AdaNAGED()
        fit(CausalLMClassificationModule(str(tiny_folder), objective=objective), data, tmp_path, 1, callbacks=[rule])
        rules[objective] = (rule.rule.f_low, rule.rule.f_high, rule.rule.attainable, rule.rule.probe_rise)
    assert rules == {"loss": (0.0, None, 0.1, 0.01), "accuracy": (0.0, 1.0, 0.5, 0.05)}
    own = AdaNAGED(attainable=0.2, probe_rise=0.1, f_high=3.0)
    fit(CausalLMClassificationModule(str(tiny_folder), objective="accuracy"), data, tmp_path, 1, callbacks=[own])
    assert (own.rule.f_high, own.rule.attainable, own.rule.probe_rise) == (3.0, 0.2, 0.1)


def test_one_score_for_a_batch_is_probed_one_forward_after_the_other(tiny_folder, tmp_path):
    film_folder(tmp_path)
    data = PromptDataModule("sst2", str(tmp_path), num_train=30, num_dev=20)
    sizes = []

    def counted(predictions, batch):
        sizes.append(len(predictions))
        return both_classes(predictions, batch)

    module = CausalLMClassificationModule(str(tiny_folder), objective=counted, optimizer=partial(ZerothOrder, smoothing=0.5))
    trainer = fit(module, data, tmp_path, 4)
    assert trainer.global_step == 4
    assert set(sizes[-2:]) <= {14, 16}


def test_by_import_path_on_the_command_line(tiny_folder, tmp_path):
    film_folder(tmp_path)
    main(
        [
            *("fit", "--model", "CausalLMClassificationModule", "--model.model_name_or_path", str(tiny_folder)),
            *("--model.objective", "tests.modules.test_objectives.halved", "--model.worst_score", "-1"),
            *("--data", "PromptDataModule", "--data.task", "sst2", "--data.data_dir", str(tmp_path)),
            *("--data.num_train", "30", "--data.num_dev", "10", "--trainer.callbacks", "AdaNAGED"),
            *("--trainer.accelerator", "cpu", "--trainer.max_steps", "3", "--trainer.default_root_dir", str(tmp_path / "run")),
        ]
    )
    assert (tmp_path / "run/lightning_logs/version_0/metrics.csv").exists()


class Coin(LMO):
    """Steps to the side that a coin says."""

    def __init__(self, seed: int) -> None:
        self._coins = torch.Generator().manual_seed(seed)

    def coefficient(self, slope: float) -> float:
        return 2.0 * torch.randint(0, 2, (), generator=self._coins).item() - 1.0


def trained_accuracy(seed, tmp_path, **options) -> tuple[float, float, int]:
    """Accuracy on the training rows of the quickstart task before and after 60 steps on it, and the forwards."""
    seed_everything(seed, verbose=False)
    data = PromptDataModule("sst2", data_dir="quickstart", num_train=48, num_dev=1, batch_size=48)
    module = CausalLMClassificationModule(
        "quickstart", objective="accuracy", optimizer=partial(ZerothOrder, seed=seed, **options)
    )
    data.trainer = None
    data.tokenizer = module.model_name_or_path
    data.setup("fit")
    rows = DataLoader(data.dataset("train"), batch_size=48, collate_fn=ScoringCollator(1))
    evaluator = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module.num_classes = 2
    before = evaluator.validate(module, rows, verbose=False)[0]["val/acc"]
    trainer = fit(module, data, tmp_path, 60, callbacks=[AdaNAGED()])
    after = evaluator.validate(module, rows, verbose=False)[0]["val/acc"]
    return before, after, trainer.optimizers[0].forwards


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_rises_and_beats_random_signs(seed, tmp_path):
    before, after, forwards = trained_accuracy(seed, tmp_path)
    _, chance, same = trained_accuracy(seed, tmp_path, update=Coin(seed))
    assert forwards == same
    assert after >= before + 0.2
    assert after > chance


# ---- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "objective", "message"),
    [
        (
            CausalLMClassificationModule,
            "f1",
            "objective='f1': CausalLMClassificationModule has 'loss', 'accuracy', or the",
        ),
        (CausalLMGenerationModule, "accuracy", "CausalLMGenerationModule has 'loss', 'f1', 'exact_match', or the import path"),
    ],
)
def test_objectives_of_another_kind_of_task(kind, objective, message, tiny_folder):
    with pytest.raises(ValueError, match=message):
        kind(str(tiny_folder), objective=objective)


def test_every_named_objective_can_be_named_in_a_configuration():
    assert {name for scores in OBJECTIVES.values() for name in scores} == {"accuracy", "f1", "exact_match"}


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ([0.5, 0.5], r"scores of shape \(2,\) for 3 examples: return one for each, or one number for all"),
        ([0.5, 1.5, 0.0], r"scores from 0 to 1.5, not all from worst_score=0 to best_score=1: give the lowest and the highest"),
        (-0.5, r"scores from -0.5 to -0.5, not all from worst_score=0"),
        (float("nan"), r"scores from nan to nan, not all from"),
    ],
)
def test_scores_that_cannot_be(score, message):
    with pytest.raises(ValueError, match=message):
        Objective(lambda predictions, batch: score)(None, None, 3, torch.device("cpu"))


def test_bounds_in_the_wrong_order(tiny_folder):
    with pytest.raises(ValueError, match=r"best_score must be above worst_score, both finite, got 0.0 and 1.0"):
        CausalLMClassificationModule(str(tiny_folder), objective=halved, best_score=0.0, worst_score=1.0)


def test_backpropagation_of_decisions_is_refused(tiny_folder, tmp_path):
    film_folder(tmp_path)
    data = PromptDataModule("sst2", str(tmp_path), num_train=30, num_dev=20)
    module = CausalLMClassificationModule(
        str(tiny_folder), objective="accuracy", first_order=True, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    with pytest.raises(MisconfigurationException, match="first_order=True trains by gradients, and a score of"):
        fit(module, data, tmp_path, 1)
