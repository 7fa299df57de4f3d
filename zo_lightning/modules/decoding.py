"""Let a decoder write: the most likely token each time, up to the end of a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from zo_lightning.modules.adapters import is_prompt_learning

__all__ = ["GreedyDecoder", "stop_tokens"]

_STOPS: WeakKeyDictionary[PreTrainedTokenizerBase, list[int]] = WeakKeyDictionary()  # decoding a vocabulary takes a second


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a line of text: the EOS, and every token that holds a line break, ``"."`` with one behind it too.

    Args:
        tokenizer: The model's tokenizer, whose whole vocabulary is decoded.

    Returns:
        Their ids, in ascending order; empty where a tokenizer has neither.
    """
    if tokenizer not in _STOPS:
        ids = sorted(set(tokenizer.get_vocab().values()))
        texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
        stops = {token for token, text in zip(ids, texts, strict=True) if "\n" in text}
        if tokenizer.eos_token_id is not None:
            stops.add(tokenizer.eos_token_id)
        _STOPS[tokenizer] = sorted(stops)
    return _STOPS[tokenizer]


class GreedyDecoder:
    """Continues prompts greedily, a whole batch at a time.

    With transformers' ``generate``, so that keys and values of past tokens are kept; what a model's own generation
    configuration says (sampling, penalties) does not count. Adapters that put virtual tokens in front of the text are the
    exception: peft adds these in each forward, which therefore reads the whole text again.

    Args:
        tokenizer: The model's tokenizer.
        max_new_tokens: The number of tokens that may be written.
        end: A text that ends what is written as a line break does, such as the end of a turn in a chat.

    Attributes:
        stop_ids: The tokens after which a text ends: see :func:`stop_tokens`, and ``end`` where it is a single token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, end: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.end = end or "\n"
        last = [] if end is None else tokenizer(end, add_special_tokens=False)["input_ids"]
        single = last if len(last) == 1 and last[0] != tokenizer.unk_token_id else []
        self.stop_ids = sorted({*stop_tokens(tokenizer), *single})
        self._stops = frozenset(self.stop_ids)
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, *self.stop_ids)
        self._pad = next((token for token in ids if token is not None), None)

    def __call__(self, model: Any, input_ids: Tensor, attention_mask: Tensor, *, fixed_length: bool = False) -> list[str]:
        """Continue each prompt of a batch.

        Args:
            model: A decoder of transformers, or the ``peft.PeftModel`` around one.
            input_ids: Shape (B, T), the prompts, padded on the left.
            attention_mask: Shape (B, T), 1 for tokens and 0 for padding.
            fixed_length: Go on to the last token allowed even where all texts have ended, so that whatever is written takes as
                many forwards. The texts are the same. The optimizer runs the probes of a step as one forward only if they all
                take the same course.

        Returns:
            B texts: what was written up to the first line break or ``end``, the EOS or the last token allowed, without special
            tokens and without white space around it.
        """
        write = self._reread if is_prompt_learning(model) else self._generate
        written = write(model, input_ids, attention_mask, [] if fixed_length else self.stop_ids)
        return self.texts(written[:, input_ids.shape[1] :].tolist())

    def texts(self, rows: list[list[int]]) -> list[str]:
        """Turn tokens that were written into texts.

        Args:
            rows: The new tokens of each prompt; any after the first of :attr:`stop_ids` do not count.

        Returns:
            A text for each, see :meth:`__call__`.
        """
        written = []
        for row in rows:
            end = next((place for place, token in enumerate(row) if token in self._stops), len(row))
            written.append(row[: end + 1])  # a token may hold the end of the text and the line break
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.partition("\n")[0].partition(self.end)[0].strip() for text in texts]

    def _generate(self, model: Any, input_ids: Tensor, attention_mask: Tensor, stops: list[int]) -> Tensor:
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=self._pad,
        )
        with _without_defaults(model.get_base_model() if hasattr(model, "get_base_model") else model):
            return model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)

    @torch.no_grad()
    def _reread(self, model: Any, input_ids: Tensor, attention_mask: Tensor, stops: list[int]) -> Tensor:
        ends = input_ids.new_tensor(stops)
        done = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        for _ in range(self.max_new_tokens):
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, -1]
            token = logits.argmax(dim=-1)  # what follows a row's end is cut off later
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(token)[:, None]], dim=1)
            done |= torch.isin(token, ends)
            if done.all():
                break
        return input_ids


@contextmanager
def _without_defaults(base: PreTrainedModel) -> Iterator[None]:
    """Within this context a model has no generation configuration of its own, whose values would fill in what is not given."""
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
