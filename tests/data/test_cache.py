"""Tokens kept on the disk: found by content, whole or not at all, and never in the way."""

import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizer

import zo_lightning.data.cache as cache_module
from tests.data.conftest import WORDS, byte_tokenizer, film_rows, word_tokenizer, write_jsonl
from zo_lightning.data import DataError, EncodedPrompt, PromptDataModule, TokenCache, encode_prompts
from zo_lightning.data.cache import default_cache_dir
from zo_lightning.data.tokenization import FramedPrompt, prompt_lengths

PROMPTS = ["a film It was", "no plot", "Suppose we infer ? film film"]
CANDIDATES = [(" good", " bad"), (" terrible plot", " great", " not sure no"), ()]


@pytest.fixture
def messages(monkeypatch):
    found = []
    monkeypatch.setattr(cache_module, "rank_zero_info", found.append)
    return found


@pytest.fixture
def counts(monkeypatch):
    """How often something was really tokenised."""
    calls = []
    for name, function in (("encode_prompts", encode_prompts), ("prompt_lengths", prompt_lengths)):
        counted = lambda *arguments, function=function: calls.append(1) or function(*arguments)  # noqa: E731
        monkeypatch.setattr(cache_module, name, counted)
    return calls


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python alone: a token for each letter."""

    vocab_files_names: ClassVar = {}

    def __init__(self, letters="abcdefghijklmnopqrstuvwxyz ?", **options):
        self.letters = letters
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: place for place, letter in enumerate(self.letters)}

    def _tokenize(self, text):
        return list(text.lower())

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory, "letters.txt")
        path.write_text(self.letters)
        return (str(path),)


# ---- what is found -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [6, 2048])
def test_the_second_time_nothing_is_tokenised(words, tmp_path, counts, messages, limit):
    expected = encode_prompts(words, PROMPTS, CANDIDATES, limit)
    assert (expected[2].dropped > 0) == (limit == 6)
    for _ in range(3):
        found = TokenCache(tmp_path).encode(words, PROMPTS, CANDIDATES, limit)
        assert found == expected
        assert all(type(item) is EncodedPrompt and type(item.dropped) is int for item in found)
        assert all(type(token) is int for item in found for ids in [item.prompt_ids, *item.candidate_ids] for token in ids)
    assert len(counts) == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert messages == []


def test_lengths_are_kept_too(words, tmp_path, counts):
    expected = prompt_lengths(words, PROMPTS, CANDIDATES)
    assert [TokenCache(tmp_path).lengths(words, PROMPTS, CANDIDATES) for _ in range(2)] == [expected] * 2
    TokenCache(tmp_path).encode(words, PROMPTS, CANDIDATES, 2048)
    assert len(counts) == 2


def test_the_tokenizer_is_known_by_its_content_and_not_by_its_name(words, tmp_path, counts):
    for name in ("one", "two"):
        words.save_pretrained(tmp_path / name)
        TokenCache(tmp_path / "kept").encode(AutoTokenizer.from_pretrained(tmp_path / name), PROMPTS, CANDIDATES, 99)
    assert len(counts) == 1


def test_what_a_call_left_behind_does_not_matter(tmp_path, counts):
    tokenizer = word_tokenizer()
    TokenCache(tmp_path).encode(tokenizer, PROMPTS, CANDIDATES, 99)
    tokenizer(["a", "a film"], padding=True, truncation=True, max_length=4)
    TokenCache(tmp_path).encode(tokenizer, PROMPTS, CANDIDATES, 99)
    assert len(counts) == 1


def with_token():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([AddedToken("film film")])
    return tokenizer


def without_bos():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


def with_mask():
    tokenizer = word_tokenizer()
    tokenizer.mask_token = "<mask>"
    return tokenizer


def test_everything_that_the_tokens_depend_on_is_in_the_key(words, tmp_path, counts):
    variants = [
        (words, PROMPTS, CANDIDATES, 99),
        (words, [*PROMPTS[:2], "film"], CANDIDATES, 99),
        (words, [PROMPTS[1], PROMPTS[0], PROMPTS[2]], CANDIDATES, 99),
        (words, PROMPTS[:2], CANDIDATES[:2], 99),
        (words, PROMPTS, [(" bad", " good"), *CANDIDATES[1:]], 99),
        (words, PROMPTS, [(" good",), (" bad", *CANDIDATES[1]), ()], 99),
        (words, PROMPTS, CANDIDATES, 98),
        (words, [FramedPrompt("", "a film It was", ""), *PROMPTS[1:]], CANDIDATES, 99),
        (words, [FramedPrompt("a", " film It was", ""), *PROMPTS[1:]], CANDIDATES, 99),
        (byte_tokenizer(), PROMPTS, CANDIDATES, 99),
        (with_token(), PROMPTS, CANDIDATES, 99),
        (without_bos(), PROMPTS, CANDIDATES, 99),
        (with_mask(), PROMPTS, CANDIDATES, 99),
        (word_tokenizer(model_max_length=7), PROMPTS, CANDIDATES, 99),
        (Letters(), PROMPTS, CANDIDATES, 99),
        (Letters("zyxwvutsrqponmlkjihgfedcba ?"), PROMPTS, CANDIDATES, 99),
    ]
    for _ in range(2):
        for variant in variants:
            assert TokenCache(tmp_path).encode(*variant) == encode_prompts(*variant)
    assert len(counts) == len(variants)
    assert len(list(tmp_path.iterdir())) == len(variants)


def test_a_limit_that_the_tokenizer_caps_is_the_same_limit(tmp_path, counts):
    for limit in (7, 99):
        TokenCache(tmp_path).encode(word_tokenizer(model_max_length=7), PROMPTS, CANDIDATES, limit)
    assert len(counts) == 1


def test_a_tokenizer_that_cannot_be_written_down_is_done_without(tmp_path, counts):
    class Unwritable(Letters):
        def save_vocabulary(self, save_directory, filename_prefix=None):
            raise NotImplementedError

    for _ in range(2):
        assert TokenCache(tmp_path).encode(Unwritable(), PROMPTS, CANDIDATES, 99)
    assert len(counts) == 2
    assert not list(tmp_path.iterdir())


# ---- broken files, folders, processes ----------------------------------------------------------------------------------
def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: data[:-3], lambda data: data[:40], lambda data: b"", lambda data: b"not at all" * 20],
    ids=["one bit", "truncated", "header only", "empty", "something else"],
)
def test_a_broken_file_is_made_anew(words, tmp_path, counts, messages, damage):
    expected = TokenCache(tmp_path).encode(words, PROMPTS, CANDIDATES, 99)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert TokenCache(tmp_path).encode(words, PROMPTS, CANDIDATES, 99) == expected
    assert messages == [f"the tokens kept in {path} cannot be read and are made anew"]
    assert TokenCache(tmp_path).encode(words, PROMPTS, CANDIDATES, 99) == expected
    assert len(counts) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_done_without(words, tmp_path, messages):
    (tmp_path / "file").write_text("")
    expected = encode_prompts(words, PROMPTS, CANDIDATES, 99)
    assert TokenCache(tmp_path / "file").encode(words, PROMPTS, CANDIDATES, 99) == expected
    (message,) = messages
    assert message.startswith(f"the tokens are not kept for the next run, they cannot be written to {tmp_path / 'file'} (")
    assert (tmp_path / "file").read_text() == ""


def test_a_write_that_ends_early_leaves_nothing(words, tmp_path, monkeypatch, messages):
    def half(columns, path, metadata):
        Path(path).write_bytes(b"half")
        assert [file.suffix for file in tmp_path.iterdir()] == [".tmp"]
        raise OSError("no space left")

    monkeypatch.setattr(cache_module, "save_file", half)
    assert TokenCache(tmp_path).encode(words, PROMPTS, CANDIDATES, 99) == encode_prompts(words, PROMPTS, CANDIDATES, 99)
    assert not list(tmp_path.iterdir())
    assert "no space left" in messages[0]


def test_writers_at_the_same_time(tmp_path, messages):
    """All of them start before any has written; whoever reads meanwhile finds a whole file or none."""
    prompts = [f"a film {'good ' * (i % 7)}It was" for i in range(300)]
    candidates = [(" good", " bad")] * 300
    expected = encode_prompts(word_tokenizer(), prompts, candidates, 99)
    barrier, found = threading.Barrier(4), []

    def work():
        tokenizer = word_tokenizer()
        barrier.wait()
        found.extend(TokenCache(tmp_path).encode(tokenizer, prompts, candidates, 99) == expected for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12
    assert len(list(tmp_path.iterdir())) == 1
    assert messages == []


def test_what_cannot_be_tokenised_is_not_kept(words, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match=r"prompt 0: .* ' good' and '  good' have the same tokens"):
            TokenCache(tmp_path).encode(words, PROMPTS[:1], [(" good", "  good")], 99)
    assert not list(tmp_path.iterdir())


# ---- in the datamodule -------------------------------------------------------------------------------------------------
def make(folder, words, **options):
    arguments = {"task": "sst2", "data_dir": str(folder), "tokenizer": words, "batch_size": 4, "pin_memory": False}
    return PromptDataModule(**{**arguments, **options})


def test_the_default_folder_lies_beside_the_cache_of_the_datasets(film_dir, words, tmp_path, monkeypatch, counts):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    assert default_cache_dir() == tmp_path / "home" / "zo_lightning"
    examples = []
    for _ in range(2):
        data = make(film_dir, words)
        data.setup()
        examples.append([data.dataset(part).examples for part in ("train", "dev", "eval")])
    assert examples[0] == examples[1]
    assert len(counts) == 3
    assert len(list((tmp_path / "home" / "zo_lightning").iterdir())) == 3


def test_a_folder_of_ones_own_and_none(film_dir, words, tmp_path, monkeypatch, counts):
    make(film_dir, words, cache_dir=str(tmp_path / "kept")).setup("fit")
    assert len(list((tmp_path / "kept").iterdir())) == 2
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    make(film_dir, words, cache=False).setup("fit")
    assert len(counts) == 2
    assert not (tmp_path / "home" / "zo_lightning").exists()


def test_changed_rows_are_tokenised_again(film_dir, words, tmp_path, counts):
    prompts = []
    for adjective in ("good", "bad", "good"):
        write_jsonl(film_dir / "validation.jsonl", [{**row, "sentence": f"a {adjective} film"} for row in film_rows(4)])
        data = make(film_dir, words, cache_dir=str(tmp_path / "kept"))
        data.setup("test")
        prompts.append(np.array([item["prompt_ids"] for item in data.dataset("eval").examples]))
    place = 4 + WORDS.index("good"), 4 + WORDS.index("bad")
    assert [int(p[0, 2]) for p in prompts] == [place[0], place[1], place[0]]
    assert len(counts) == 2


def test_demonstrations_are_counted_once(film_dir, words, tmp_path, counts):
    examples, done = [], []
    for _ in range(2):
        data = make(film_dir, words, num_demonstrations=4, max_length=30, cache_dir=str(tmp_path / "kept"))
        data.setup("test")
        examples.append(data.dataset("eval").examples)
        done.append(len(counts))
    assert examples[0] == examples[1]
    assert done[0] == done[1] > 1


def test_the_suite_leaves_the_users_cache_alone():
    assert not default_cache_dir().is_relative_to(Path.home() / ".cache")
