"""All classification tasks on real rows with a real tokenizer, where a folder of them lies next to the repository."""

import pytest
from transformers import AutoTokenizer

from tests.data.conftest import SHARED
from zo_lightning.data import PromptDataModule

MODEL = SHARED / "models" / "opt-mini"

SIZES = {
    "boolq": (1000, 500, 1000),
    "cb": (150, 100, 56),
    "multirc": (257, 64, 1000),
    "rte": (1000, 500, 277),
    "sst2": (1000, 500, 872),
    "wic": (1000, 500, 638),
    "wsc": (444, 110, 104),
}


@pytest.mark.parametrize("task", SIZES)
def test_task(task):
    folder = SHARED / "data" / task
    if not folder.is_dir() or not MODEL.is_dir():
        pytest.skip(f"no real rows in {folder}, or no tokenizer in {MODEL}")
    data = PromptDataModule(task, str(folder), str(MODEL), pin_memory=False)
    data.setup()
    parts = [data.dataset(part) for part in ("train", "dev", "eval")]
    assert tuple(len(part) for part in parts) == SIZES[task]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for part in parts:
        assert {item["label"] for item in part.examples} == set(range(data.num_classes))
        for item in part.examples[:20]:
            assert item["prompt_ids"][0] == tokenizer.bos_token_id
            assert item["prompt"].endswith(tokenizer.decode(item["prompt_ids"][1:]))
            assert [tokenizer.decode(ids) for ids in item["candidate_ids"]] == item["candidates"]
        assert max(part.lengths) < 512
    rows = sum(len(batch["input_ids"]) for batch in data.train_dataloader())
    assert rows == SIZES[task][0], "one row for all candidates of an example"
