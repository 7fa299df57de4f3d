"""The quick start's assets: small, loadable, reproducible, and a task that the base model cannot do yet."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

import zo_lightning

ASSETS = Path(zo_lightning.__file__).parent / "assets" / "quickstart"
SCRIPT = Path(__file__).parent.parent / "scripts" / "make_quickstart_assets.py"
VERBALIZERS = (" terrible", " great")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def splits():
    return {
        name: [json.loads(line) for line in (ASSETS / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train", "validation")
    }


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_quickstart_assets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_is_complete_and_small():
    files = {path.relative_to(ASSETS).as_posix(): path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "data/train.jsonl",
        "data/validation.jsonl",
    }
    assert sum(files.values()) < 4_000_000


def test_model_is_an_opt_without_dropout(model, tokenizer):
    assert type(model) is OPTForCausalLM
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.dropout == model.config.attention_dropout == model.config.layerdrop == 0
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_tokenizer_prepends_bos_and_pads_like_opt(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("</s>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 1)
    assert tokenizer.unk_token_id == 3
    batch = tokenizer(["the soup was good .", "the"], padding=True)
    assert [row[0] for row in batch["input_ids"]] == [2, 2]
    assert batch["input_ids"][1][2:] == [1] * 4
    assert batch["attention_mask"][1] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("text", ["the soup was good . It was great", "Zoë's 2nd visit:\n  naïve — but “fine” 🙂"])
def test_any_text_survives_tokenisation(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_verbalizers_are_single_tokens_that_leave_the_prompt_alone(tokenizer, splits):
    sentences = ["x", *(row["sentence"] for row in splits["validation"][:20])]
    for prompt in (f"{sentence} It was" for sentence in sentences):
        ids = tokenizer(prompt)["input_ids"]
        for verbalizer in VERBALIZERS:
            continued = tokenizer(prompt + verbalizer)["input_ids"]
            assert continued[:-1] == ids
            assert continued[-1:] == tokenizer(verbalizer, add_special_tokens=False)["input_ids"]


def test_prompts_are_words_and_fit_the_model(tokenizer, model, splits):
    for row in (row for rows in splits.values() for row in rows):
        prompt = f"{row['sentence']} It was"
        ids = tokenizer(prompt)["input_ids"]
        assert len(ids) == 1 + len(prompt.split()) < model.config.max_position_embeddings


@pytest.mark.parametrize(("name", "size"), [("train", 1500), ("validation", 500)])
def test_rows_are_complete_and_balanced(splits, name, size):
    rows = splits[name]
    assert [row["idx"] for row in rows] == list(range(size))
    assert all(set(row) == {"sentence", "label", "idx"} and row["label"] in (0, 1) for row in rows)
    assert 0.4 <= sum(row["label"] for row in rows) / size <= 0.6


def test_no_sentence_occurs_twice(splits):
    sentences = [row["sentence"] for rows in splits.values() for row in rows]
    assert len(set(sentences)) == len(sentences)


def test_rows_regenerate_from_the_script(script, splits):
    made = script.make_rows()
    assert {name: [row._asdict() for row in rows] for name, rows in made.items()} == splits


def test_tokenizer_regenerates_from_the_script(script, tmp_path):
    script.make_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8")) == json.loads(
        (ASSETS / "tokenizer.json").read_text("utf-8")
    )


def test_script_runs_and_is_deterministic(script, tmp_path, capsys):
    arguments = ["--hidden", "16", "--layers", "1", "--steps", "2", "--batch-size", "4", "--finetune-steps", "1"]
    threads = torch.get_num_threads()
    try:
        figures = [script.main([*arguments, "--output", str(tmp_path / name)]) for name in ("a", "b")]
    finally:
        torch.set_num_threads(threads)
    capsys.readouterr()
    assert figures[0] == figures[1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_base_model_reads_but_does_not_know_the_task(script, model, tokenizer):
    rows = script.make_rows()["validation"]
    assert script.reading_accuracy(model, tokenizer, rows) >= 0.95
    figures = script.evaluate(model, *script.encode_task(tokenizer, rows), script.verbalizer_ids(tokenizer))
    assert 0.45 <= figures["accuracy"] <= 0.65
    assert 0.65 <= figures["loss"] <= 1.0
