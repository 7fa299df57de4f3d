"""From prompts and candidates to token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from reprlib import repr as shortened
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from zo_lightning.data.errors import DataError


class EncodedPrompt(NamedTuple):
    """A prompt and its candidates as token ids.

    Attributes:
        prompt_ids: The tokens that all candidates follow, beginning with the BOS token if the tokenizer adds one.
        candidate_ids: For each of the K candidates, its tokens (one or more).
        dropped: The number of tokens cut from the left of the prompt.
    """

    prompt_ids: list[int]
    candidate_ids: list[list[int]]
    dropped: int


class FramedPrompt(NamedTuple):
    """A prompt in a frame that must stay whole, such as what a chat template writes around the user's turn.

    Attributes:
        before: What stays in front, all special tokens written out.
        content: What may lose its beginning.
        after: What stays behind.
    """

    before: str
    content: str
    after: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.before + self.content + self.after


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The number of tokens a sequence may have: ``max_length``, capped by the tokenizer's own limit."""
    return min(max_length, int(tokenizer.model_max_length))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | FramedPrompt],
    candidates: Sequence[Sequence[str]],
    max_length: int,
    describe: Callable[[int], str] = "prompt {}".format,
) -> list[EncodedPrompt]:
    """Tokenise prompts together with each of their candidates.

    A candidate is tokenised where it stands, as the tail of prompt + candidate. Where a tokenizer merges across that
    boundary, the tokens of the prompt alone do not begin those of the whole; the prompt then ends at the last token
    that the prompt alone and *all* its candidates share, so that every candidate is scored after the same context.

    A prompt that does not fit loses its beginning (never its BOS or its frame), the same tokens for all its candidates.
    An EOS that the tokenizer would append is left out: the candidate has to be the end.

    Args:
        tokenizer: The model's tokenizer.
        prompts: n prompts. One in a frame gets no special tokens besides those written there.
        candidates: For each prompt, its candidates, as they follow it (leading space included). A prompt without any is
            tokenised alone.
        max_length: The number of tokens that BOS, prompt and the longest candidate may have together.
        describe: Names the prompt of a given position in messages.

    Returns:
        n encoded prompts.

    Raises:
        DataError: If a candidate has no tokens of its own, two candidates of a prompt have the same tokens, nothing
            comes before a candidate, or a candidate alone does not fit.
    """
    limit = length_limit(tokenizer, max_length)
    encoded = []
    for position, whole in enumerate(_encode_whole(tokenizer, prompts, candidates)):
        prompt, endings = prompts[position], candidates[position]
        _check_candidates(endings, whole.candidate_ids, describe(position))
        if not whole.prompt_ids:
            raise DataError(
                f"{describe(position)}: the prompt has no token before the candidates {list(endings)}, and the tokenizer puts "
                "no BOS in front; lengthen the template (`neutral_template` where the prompt is a neutral one), or take a "
                "tokenizer that adds a BOS"
            )
        dropped = max(0, _length(whole) - limit)
        start, stop = _droppable(tokenizer, prompt, whole.prompt_ids) if dropped else (0, 0)
        prompt_ids = whole.prompt_ids[:start] + whole.prompt_ids[start + dropped :]
        if start + dropped > stop or not prompt_ids:
            raise DataError(
                f"{describe(position)}: nothing is left before the candidates {shortened(list(endings))} of up to "
                f"{_length(whole) - len(whole.prompt_ids)} tokens; the limit is {limit} tokens and the prompt has "
                f"{len(whole.prompt_ids)}, raise --data.max_length or lengthen the template"
            )
        encoded.append(EncodedPrompt(prompt_ids, whole.candidate_ids, dropped))
    return encoded


def prompt_lengths(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | FramedPrompt], candidates: Sequence[Sequence[str]]
) -> list[int]:
    """Count the tokens of prompts together with their longest candidates, nothing cut.

    Args:
        tokenizer: The model's tokenizer.
        prompts: n prompts.
        candidates: For each prompt, its candidates; the prompt alone is counted where there are none.

    Returns:
        n numbers of tokens, BOS included: a prompt of which :func:`encode_prompts` cuts nothing has at most ``max_length``.
    """
    return [_length(whole) for whole in _encode_whole(tokenizer, prompts, candidates)]


def _encode_whole(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | FramedPrompt], candidates: Sequence[Sequence[str]]
) -> Iterator[EncodedPrompt]:
    prefix = _special_prefix(tokenizer)
    texts = [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]
    start = len(texts)
    texts += [text + ending for text, endings in zip(texts, candidates, strict=True) for ending in endings]
    tokens = _tokenize(tokenizer, texts)
    for position, endings in enumerate(candidates):
        follow = tokens[start : start + len(endings)]
        start += len(endings)
        shared = _shared_length([tokens[position], *follow])
        special = prefix if isinstance(prompts[position], str) else []
        yield EncodedPrompt(special + tokens[position][:shared], [ids[shared:] for ids in follow], 0)


def _length(encoded: EncodedPrompt) -> int:
    return len(encoded.prompt_ids) + max((len(ids) for ids in encoded.candidate_ids), default=0)


def _droppable(tokenizer: PreTrainedTokenizerBase, prompt: str | FramedPrompt, ids: list[int]) -> tuple[int, int]:
    """The part of a prompt's tokens, from start to stop, that may be cut from the left."""
    if isinstance(prompt, str):
        return len(_special_prefix(tokenizer)), len(ids)
    before, whole, after = _tokenize(tokenizer, [prompt.before, prompt.text, prompt.after])
    start = _shared_length([before, ids])
    stop = len(whole) - _shared_length([after[::-1], whole[::-1]])
    return start, min(max(start, stop), len(ids))


def _shared_length(sequences: list[list[int]]) -> int:
    """The number of tokens with which all sequences begin."""
    # all that lies between the first and the last in alphabetical order begins as these two do
    first, last = min(sequences), max(sequences)
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))


def _check_candidates(endings: Sequence[str], candidate_ids: list[list[int]], where: str) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for ending, ids in zip(endings, candidate_ids, strict=True):
        if not ids:
            raise DataError(f"{where}: the candidate {ending!r} has no tokens after the prompt, choose another")
        other = seen.get(tuple(ids))
        if other is not None:
            raise DataError(f"{where}: the candidates {other!r} and {ending!r} have the same tokens {ids}, change one")
        seen[tuple(ids)] = ending


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text: [BOS], or nothing."""
    bare = _tokenize(tokenizer, ["a"])[0]
    wrapped = list(tokenizer("a", verbose=False)["input_ids"])
    # The largest offset wins: a tokenizer whose BOS, EOS and unknown token are one (OPT's) is read as adding a BOS.
    for offset in range(len(wrapped) - len(bare), -1, -1):
        if wrapped[offset : offset + len(bare)] == bare:
            return wrapped[:offset]
    raise DataError(f"cannot tell which special tokens {type(tokenizer).__name__} puts in front of a text")


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: prompts beyond the model's limit are cut here, a warning about them would mislead.
    batch = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return [list(ids) for ids in batch["input_ids"]]
