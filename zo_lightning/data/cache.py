"""Token ids kept on the disk, found again by the content of what they were made from."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import numpy as np
import tokenizers
import transformers
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from zo_lightning.data.tokenization import EncodedPrompt, FramedPrompt, encode_prompts, length_limit, prompt_lengths

__all__ = ["TokenCache", "default_cache_dir"]

_FORMAT = "1"  # of the files, and of what encode_prompts makes of the same texts
_Columns = dict[str, NDArray[Any]]


def default_cache_dir() -> Path:
    """The folder ``zo_lightning`` beside the datasets' own cache, which ``HF_HOME`` moves."""
    return Path(datasets.config.HF_DATASETS_CACHE).parent / "zo_lightning"


class TokenCache:
    """Tokenises like :func:`~zo_lightning.data.encode_prompts`, but the same texts only once.

    A file is found by a hash of all that its content depends on: the texts, the limit, and the content of the tokenizer, not
    its name. It is written under another name and then given its own, so that processes that run at the same time never read
    half of one. A broken file is made anew, and a folder that cannot be written is done without.

    Args:
        folder: Where the files are; None for :func:`default_cache_dir`.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = default_cache_dir() if folder is None else Path(folder)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str | FramedPrompt],
        candidates: Sequence[Sequence[str]],
        max_length: int,
        describe: Callable[[int], str] = "prompt {}".format,
    ) -> list[EncodedPrompt]:
        """Look the tokens up, or make and keep them.

        Args:
            tokenizer: See :func:`~zo_lightning.data.encode_prompts`.
            prompts: See there.
            candidates: See there.
            max_length: See there.
            describe: See there; it has no part in the key.

        Returns:
            What :func:`~zo_lightning.data.encode_prompts` returns.

        Raises:
            DataError: As that function does; nothing is kept then.
        """

        def make() -> _Columns:
            return _to_columns(encode_prompts(tokenizer, prompts, candidates, max_length, describe))

        what = f"ids within {length_limit(tokenizer, max_length)}"
        return _from_columns(self._kept(what, tokenizer, prompts, candidates, make))

    def lengths(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | FramedPrompt], candidates: Sequence[Sequence[str]]
    ) -> list[int]:
        """Look the numbers of tokens up, or count and keep them.

        Args:
            tokenizer: See :func:`~zo_lightning.data.tokenization.prompt_lengths`.
            prompts: See there.
            candidates: See there.

        Returns:
            What that function returns.
        """

        def make() -> _Columns:
            return {"length": np.array(prompt_lengths(tokenizer, prompts, candidates), dtype=np.int32)}

        return self._kept("lengths", tokenizer, prompts, candidates, make)["length"].tolist()

    def _kept(
        self,
        what: str,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str | FramedPrompt],
        candidates: Sequence[Sequence[str]],
        make: Callable[[], _Columns],
    ) -> _Columns:
        digest = _Digest()
        digest.add(_FORMAT, what, str(len(prompts)))
        if not _add_tokenizer(digest, tokenizer):
            return make()
        for prompt, endings in zip(prompts, candidates, strict=True):
            digest.add(type(prompt).__name__, *([prompt] if isinstance(prompt, str) else prompt), str(len(endings)), *endings)
        path = self.folder / f"{digest.hex()}.safetensors"
        columns = _read(path)
        if columns is None:
            columns = make()
            _write(path, columns)
        return columns


class _Digest:
    """A hash of a sequence of texts, which tells ``ab`` and ``c`` from ``a`` and ``bc``."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, *texts: str | bytes) -> None:
        for text in texts:
            data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)

    def hex(self) -> str:
        return self._hash.hexdigest()


def _add_tokenizer(digest: _Digest, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Add a tokenizer's content; False where it has none that can be written down."""
    kind = type(tokenizer)
    digest.add(f"{kind.__module__}.{kind.__qualname__}", transformers.__version__, tokenizers.__version__)
    digest.add(repr(sorted(tokenizer.special_tokens_map.items())), repr(getattr(tokenizer, "split_special_tokens", None)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # a call sets what an earlier one may have left behind: padding and truncation are part of the backend's text
        tokenizer("", add_special_tokens=False, padding=False, truncation=False)
        digest.add(backend.to_str())
        return True
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).iterdir()):
                digest.add(path.name, path.read_bytes())
    except (OSError, NotImplementedError):
        return False
    return True


def _to_columns(encoded: Sequence[EncodedPrompt]) -> _Columns:
    """Flat arrays: all ids one after the other, with the lengths that they are cut by."""
    candidates = [ids for item in encoded for ids in item.candidate_ids]
    return {
        "prompt_ids": np.array([token for item in encoded for token in item.prompt_ids], dtype=np.int32),
        "prompt_length": np.array([len(item.prompt_ids) for item in encoded], dtype=np.int32),
        "candidate_ids": np.array([token for ids in candidates for token in ids], dtype=np.int32),
        "candidate_length": np.array([len(ids) for ids in candidates], dtype=np.int32),
        "candidates": np.array([len(item.candidate_ids) for item in encoded], dtype=np.int32),
        "dropped": np.array([item.dropped for item in encoded], dtype=np.int32),
    }


def _from_columns(columns: Mapping[str, NDArray[Any]]) -> list[EncodedPrompt]:
    prompts = _cut(columns["prompt_ids"].tolist(), columns["prompt_length"])
    candidates = _cut(columns["candidate_ids"].tolist(), columns["candidate_length"])
    dropped = columns["dropped"].tolist()
    return [EncodedPrompt(*item) for item in zip(prompts, _cut(candidates, columns["candidates"]), dropped, strict=True)]


def _cut(items: list[Any], lengths: NDArray[Any]) -> list[list[Any]]:
    ends = lengths.cumsum().tolist()
    return [items[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _checksum(columns: Mapping[str, NDArray[Any]]) -> str:
    digest = _Digest()
    for name in sorted(columns):
        digest.add(name, columns[name].tobytes())
    return digest.hex()


def _read(path: Path) -> _Columns | None:
    """The columns of a file, None if it is not there or broken."""
    try:
        if not path.exists():
            return None
        with safe_open(path, framework="np") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            if (file.metadata() or {}).get("sha256") == _checksum(columns):
                return columns
    except (OSError, SafetensorError):
        pass
    rank_zero_info(f"the tokens kept in {path} cannot be read and are made anew")
    return None


def _write(path: Path, columns: _Columns) -> None:
    temporary = path.with_name(f"{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(columns, temporary, metadata={"sha256": _checksum(columns)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        rank_zero_info(f"the tokens are not kept for the next run, they cannot be written to {path.parent} ({reason})")
