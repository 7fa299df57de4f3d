"""Fixtures of the data tests: a tokenizer built here, folders of rows written here, nothing from the network."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHARED = Path(__file__).parents[2].parent / "shared"

WORDS = [
    *("a", "film", "with", "no", "plot", "It", "was", "terrible", "great", "good", "bad", "okay"),
    *("Yes", "No", "Maybe", "not", "sure", "Suppose", "we", "infer", "?", ",", ".", ":", "\n", "one", "two"),
]


def opt_like(tokenizer: Tokenizer, **kwargs) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer as OPT's: `</s>` (id 2) is BOS, EOS and unknown, put in front of every text; `<pad>` is 1."""
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>", **kwargs
    )


def word_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """One token for each word of WORDS, in that order from id 4 on, with or without a space in front."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 3, **{word: 4 + i for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    return opt_like(tokenizer, **kwargs)


def byte_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """A byte-level BPE such as OPT's: it has a token for `Ġgood`, so that a space may belong to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "<pad>", "</s>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=400,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["It was good. It was bad. Answer: good, Answer: bad, Yes or No? Maybe"] * 4, trainer)
    return opt_like(tokenizer, **kwargs)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    """Keep the Arrow copies that `datasets` makes out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf_datasets")
    datasets.disable_progress_bars()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def film_rows(count: int) -> list[dict]:
    """Rows for SST-2, of lengths 3 to 12 words."""
    adjectives = ["bad", "good"]
    return [
        {"sentence": f"a {adjectives[i % 2]} film" + " with no plot" * (i % 4), "label": i % 2, "idx": i} for i in range(count)
    ]


@pytest.fixture
def film_dir(tmp_path) -> Path:
    """A folder with 40 training and 12 validation rows for SST-2."""
    write_jsonl(tmp_path / "train.jsonl", film_rows(40))
    write_jsonl(tmp_path / "validation.jsonl", film_rows(12))
    return tmp_path
