"""From prompts and candidates to token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The number of tokens a sequence may have: ``max_length``, capped by the tokenizer's own limit."""
    return min(max_length, int(tokenizer.model_max_length))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    max_length: int,
    describe: Callable[[int], str] = "prompt {}".format,
) -> list[EncodedPrompt]:
    """Tokenise prompts together with each of their candidates.

    A candidate is tokenised where it stands, as the tail of prompt + candidate. Where a tokenizer merges across that
    boundary, the tokens of the prompt alone do not begin those of the whole; the prompt then ends at the last token
    that the prompt alone and *all* its candidates share, so that every candidate is scored after the same context.

    A prompt that does not fit loses its beginning (never its BOS), the same tokens for all its candidates. An EOS that
    the tokenizer would append is left out: the candidate has to be the end.

    Args:
        tokenizer: The model's tokenizer.
        prompts: n prompts.
        candidates: For each prompt, its candidates, as they follow it (leading space included).
        max_length: The number of tokens that BOS, prompt and the longest candidate may have together.
        describe: Names the prompt of a given position in messages.

    Returns:
        n encoded prompts.

    Raises:
        DataError: If a candidate has no tokens of its own, two candidates of a prompt have the same tokens, nothing
            comes before a candidate, or a candidate alone does not fit.
    """
    limit = length_limit(tokenizer, max_length)
    prefix = _special_prefix(tokenizer)
    texts = list(prompts)
    for prompt, endings in zip(prompts, candidates, strict=True):
        texts += [prompt + ending for ending in endings]
    tokens = _tokenize(tokenizer, texts)
    encoded = []
    start = len(prompts)
    for position, endings in enumerate(candidates):
        whole = tokens[start : start + len(endings)]
        start += len(endings)
        shared = _shared_length([tokens[position], *whole])
        candidate_ids = [ids[shared:] for ids in whole]
        _check_candidates(endings, candidate_ids, describe(position))
        longest = max(len(ids) for ids in candidate_ids)
        dropped = max(0, len(prefix) + shared + longest - limit)
        prompt_ids = prefix + whole[0][dropped:shared]
        if dropped > shared or not prompt_ids:
            raise DataError(
                f"{describe(position)}: nothing is left before the candidates {list(endings)} of up to {longest} "
                f"tokens; the limit is {limit} tokens and the prompt has {shared}, raise --data.max_length or lengthen "
                "the template"
            )
        encoded.append(EncodedPrompt(prompt_ids, candidate_ids, dropped))
    return encoded


def _shared_length(sequences: list[list[int]]) -> int:
    """The number of tokens with which all sequences begin."""
    length = 0
    for column in zip(*sequences, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return length


def _check_candidates(endings: Sequence[str], candidate_ids: list[list[int]], where: str) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for ending, ids in zip(endings, candidate_ids, strict=True):
        if not ids:
            raise DataError(f"{where}: the verbalizer {ending!r} has no tokens after the prompt, choose another")
        other = seen.get(tuple(ids))
        if other is not None:
            raise DataError(f"{where}: the verbalizers {other!r} and {ending!r} have the same tokens {ids}, change one")
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
