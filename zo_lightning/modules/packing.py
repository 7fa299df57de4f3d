"""Candidates that share a row with their prompt: the attention mask, and whether a model computes the same with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from zo_lightning.data import Example, ScoringCollator

__all__ = ["packed_mask", "packing_fault"]

# of the deviation, relative to the spread of the logits
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# configurations' names for a number of tokens beyond which a layer does not look back; a mask of our own would overrule it
_WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_chunk_size")


def packed_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask by which every token sees the prompt and what precedes it in its own tail.

    Args:
        segment: Shape (R, T), see :class:`zo_lightning.data.PackedBatch`.
        dtype: Of the model.

    Returns:
        Shape (R, 1, T, T), to be added to the attention's scores: 0 where a token (third dimension) sees another (fourth), the
        lowest number where it does not. Padding sees padding, so that no row of scores is without any.
    """
    query, key = segment[:, :, None], segment[:, None, :]
    seen = ((key == 0) | (key == query)).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def packing_fault(model: PreTrainedModel, score: Callable[[Mapping[str, Tensor]], Tensor], device: torch.device) -> str:
    """Try on a few made-up prompts whether a model gives packed candidates the logits that they have in rows of their own.

    Args:
        model: The language model.
        score: What computes the logits of a batch with it, :meth:`PromptedModule.scored_logits`.
        device: Where batches are put.

    Returns:
        What is wrong, as the end of a sentence; empty if nothing is.
    """
    config = model.config.get_text_config()
    fault = _fault_of(config)
    if fault:
        return fault
    examples = _made_up(int(config.vocab_size))
    alone, packed = (
        {name: column.to(device) for name, column in ScoringCollator(0, packed=packed)(examples).items()}  # type: ignore[attr-defined]
        for packed in (False, True)
    )
    try:
        with _evaluating(model):
            expected, found = score(alone).double(), score(packed).double()
            mixed = score({**packed, "segment": packed["segment"].clamp(max=0)}).double()  # every tail sees those before
    except Exception as error:  # whatever a model says to a mask that it was not written for
        return f"fails with one mask per row ({type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]})"
    deviation, contrast = _distance(found, expected), _distance(mixed, expected)
    tolerance = _TOLERANCE[model.dtype]
    # a deviation that is not far less than what the mask is there to prevent would tell nothing
    if deviation <= tolerance and deviation < contrast / 4:
        return ""
    return (
        f"computes other logits for packed candidates: they deviate by {deviation:.2g} of their spread, {tolerance:.2g} is "
        f"allowed, and {contrast:.2g} is what they would deviate by without the mask"
    )


def _fault_of(config: PretrainedConfig) -> str:
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        return f"has the attention {attention!r}, which takes no mask of one's own"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"has layers that are no full attention ({', '.join(sorted(kinds))})"
    for name in _WINDOWS:
        if getattr(config, name, None) is not None:
            return f"attends to a part of the text only ({name}={getattr(config, name)!r})"
    return ""


def _made_up(vocabulary: int) -> list[Example]:
    """Two prompts of different lengths, with three candidates each that begin with different tokens."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    return [
        Example(
            prompt="",
            candidates=[],
            prompt_ids=tokens(length),
            candidate_ids=[[first, *tokens(count)] for first, count in enumerate(counts)],
            label=0,
            gold=[0],
            index=index,
        )
        for index, (length, counts) in enumerate(((9, (6, 4, 5)), (5, (2, 3, 7))))
    ]


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest root mean square of the difference at a position, relative to the spread of the logits; infinite for NaN."""
    distance = float((found - expected).square().mean(dim=1).sqrt().max() / expected.std())
    return distance if distance == distance else float("inf")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
