"""The measurement of the data's side: a short run on tiny data, its figures against the batches, and its slow collator."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.data.test_collate import PAD, example
from tests.tiny import film_folder
from zo_lightning.data import PromptDataModule, ScoringCollator, num_candidates
from zo_lightning.data.packing import row_lengths

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("measure_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "sst2").mkdir()
    film_folder(tmp_path / "sst2")
    (tmp_path / "copa").mkdir()
    rows = [
        {
            "premise": "a film with no plot" if i % 3 else "a film",
            "choice1": "No film was good.",
            "choice2": "A plot was bad" + " with no plot" * (i % 2) + ".",
            "question": ("cause", "effect")[i % 2],
            "label": i % 2,
        }
        for i in range(24)
    ]
    for name in ("train", "validation"):
        (tmp_path / "copa" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def test_a_short_run(script, data, tiny_opt, tmp_path, capsys):
    threads = torch.get_num_threads()
    file = tmp_path / "out.json"
    options = ["--steps", "2", "--repeats", "1", "--rows", "24", "--batch-size", "4", "--json", str(file)]
    script.main(["--model", str(tiny_opt), "--data", str(data), "--tasks", "sst2", "copa", *options])
    result = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == result
    assert (result["model"], result["threads"], result["batch_size"]) == (tiny_opt.name, 1, 4)
    assert torch.get_num_threads() == threads
    sst2, copa = result["tasks"]["sst2"], result["tasks"]["copa"]
    assert "unpacked" not in sst2
    assert set(copa) - set(sst2) == {"unpacked", "speed_up_by_packing"}
    for task in (sst2, copa):
        assert 0 <= task["after"]["padding"] < task["before"]["padding"] < 1
        assert task["after"]["fed_per_step"] < task["before"]["fed_per_step"]
        assert set(task["waiting"]) == {"0", "2"}
        assert all(0 < share < 1 for share in task["waiting"].values())
        assert all(seconds > 0 for seconds in task["tokenising_s"].values())
        assert all(task["after"][name] > 0 for name in ("ms_per_step", "tokens_per_s", "examples_per_s"))
    datamodule = PromptDataModule(
        "sst2", str(data / "sst2"), str(tiny_opt), batch_size=4, num_train=24, shuffle_seed=0, pin_memory=False
    )
    datamodule.setup("fit")
    masks = [batch["attention_mask"] for batch in datamodule.train_dataloader()]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert sst2["after"]["padding"] == pytest.approx(padding, abs=1e-4)
    assert list(sst2["padding_by_multiple"]) == ["1", "2", "4", "8"]
    # rows of less than 32 tokens are not rounded up by default
    assert sst2["padding_by_multiple"]["1"] == sst2["after"]["padding"] < sst2["padding_by_multiple"]["8"]


def test_a_row_for_each_candidate(script):
    examples = [example([2, 8, 9], [[11], [12], [13, 14]], label=2, index=7), example([2], [[5, 6], [5, 7]], label=0, index=3)]
    batch = script.RowPerCandidate(PAD, multiple=8)(examples)
    shared = ScoringCollator(PAD)(examples)
    lengths = [len(e["prompt_ids"]) + len(ids) - 1 for e in examples for ids in e["candidate_ids"]]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert len(lengths) > sum(len(row_lengths(e, packed=False)) for e in examples)
    assert num_candidates(batch).tolist() == [3, 2]
    for key in ("token_id", "token_candidate", "candidate_length", "candidate_example", "candidate_index", "candidate_gold"):
        assert torch.equal(batch[key], shared[key])
    for key in ("label", "index"):
        assert torch.equal(batch[key], shared[key])
    for token, logit in zip(batch["token_id"].tolist(), batch["token_logit"].tolist(), strict=True):
        row, column = int(batch["logit_row"][logit]), int(batch["logit_position"][logit])
        following = batch["input_ids"][row, column + 1 :].tolist()
        assert following[:1] in ([], [token])
