"""Make the assets of the quick start: a tiny pretrained OPT, its tokenizer and a sentiment task.

The model is a real ``OPTForCausalLM`` with a few hundred thousand weights. It is pretrained with AdamW on a synthetic
language: English-like reviews of one or two clauses that a small grammar generates from the word lists in this file,
each followed by one or two remarks. Most remarks depend on the sentiment of the review ("overall , we felt happy ."),
some do not ("It was monday ."), and so a model that predicts the remarks has to understand the reviews, with their
negations and their contrasting clauses.

The task is the one of SST-2: complete ``"<review> It was"`` with `` great`` or `` terrible``. These two words occur
in the language in the remarks "It was great ." and "It was terrible ." alone, drawn independently of the review. So the
base model encodes the sentiment and was never taught the task: it starts near chance, and fine-tuning has something real
to learn in a minute on a laptop, offline.

Usage:
    python scripts/make_quickstart_assets.py --output zo_lightning/assets/quickstart
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import OPTConfig, OPTForCausalLM, TokenizersBackend
from transformers.utils.logging import disable_progress_bar

T = TypeVar("T")

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "zo_lightning" / "assets" / "quickstart"
DEFAULT_SEED = 0
TRAIN_ROWS = 1500
VALIDATION_ROWS = 500

PROMPT = "{sentence} It was"
VERBALIZERS = (" terrible", " great")  # by label: 0 is negative, 1 is positive

# OPT's own special tokens and their ids.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
PAD_ID, BOS_ID = 1, 2
MAX_LENGTH = 64

# ------------------------------------------------------------------------------------------------------- the language
# Pairs and lists are indexed by the label: 0 is negative, 1 is positive.
SINGULAR = (
    "soup bread salad coffee pasta cake menu kitchen room bed view lobby pool balcony shower garden plot music script "
    "ending story stage costume concert museum tour bus ticket"
).split()
PLURAL = "waiters guides songs scenes jokes chairs lamps paintings drinks noodles actors streets".split()
ADJECTIVES = (
    "bad awful dreadful poor dull ugly boring nasty horrible weak disappointing shabby".split(),
    "good lovely superb pleasant charming splendid delightful fine excellent impressive wonderful brilliant".split(),
)
NEUTRAL_ADJECTIVES = "small red old local large new round long wooden blue early narrow".split()
VERBS = (
    (("hated", "hate"), ("disliked", "dislike"), ("regretted", "regret"), ("despised", "despise")),
    (("loved", "love"), ("enjoyed", "enjoy"), ("admired", "admire"), ("liked", "like")),
)
INTENSIFIERS = "very really truly quite rather so".split()
NEGATIONS = "not never hardly".split()
PEOPLE = "i we".split()
OPENERS = (
    "on monday ,",
    "on friday ,",
    "last week ,",
    "in the evening ,",
    "after the show ,",
    "this time ,",
    "to be honest ,",
    "in may ,",
)
PLACES = ("in the corner", "near the station", "by the river", "at the inn", "upstairs", "across the street")
CLOSERS = ("as usual", "with my brother", "during our stay", "for two days", "that night", "with the children")

FEELINGS = (
    "sad angry upset bored tired gloomy cheated miserable".split(),
    "happy glad cheerful calm thankful proud thrilled delighted".split(),
)
VERDICTS = (
    ("we will never come back", "my friends complained", "nobody smiled", "i want a refund"),
    ("we will surely come back", "my friends applauded", "everybody smiled", "i want another visit"),
)
OUTCOMES = (
    "a waste of time|too much to bear|painful to watch|no use at all".split("|"),
    "worth the money|money well spent|easy to love|the best choice".split("|"),
)
NEUTRAL_REMARKS = (
    "the shop next door was closed",
    "then we took the train",
    "my brother was with us",
    "outside it was raining",
    "we left before noon",
    "i wrote this on the bus",
)
CIRCUMSTANCES = "monday|friday|cold outside|late|early in the day|my second visit|in may|raining".split("|")


class Language:
    """The synthetic language: a stream of random reviews and documents.

    Only ``random.Random.random`` is used, whose sequence is the same on every Python version and platform.

    Args:
        seed: Seed of the stream.
        consistency: How often a sentiment-dependent remark agrees with the review.
    """

    def __init__(self, seed: int | str, consistency: float = 0.995) -> None:
        self._rng = random.Random(seed)
        self.consistency = consistency

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._rng.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """Return one of the items, all equally likely."""
        return items[int(self._rng.random() * len(items))]

    def _maybe(self, probability: float, items: Sequence[str]) -> list[str]:
        return [self.pick(items)] if self.chance(probability) else []

    def _noun_phrase(self) -> tuple[list[str], bool]:
        plural = self.chance(0.3)
        words = ["the", *self._maybe(0.2, NEUTRAL_ADJECTIVES), self.pick(PLURAL if plural else SINGULAR)]
        return words, plural

    def clause(self, label: int, plain: bool = False) -> str:
        """Return a clause of the given sentiment, possibly expressed by negating its opposite."""
        if plain:
            return f"the {self.pick(SINGULAR)} was {self.pick(ADJECTIVES[label])}"
        negated = self.chance(0.12)
        polarity = label ^ int(negated)
        noun_phrase, plural = self._noun_phrase()
        if self.chance(0.3):
            past, infinitive = self.pick(VERBS[polarity])
            verb = ["did", "not", infinitive] if negated else [*self._maybe(0.2, ("really", "truly")), past]
            words = [self.pick(PEOPLE), *verb, *noun_phrase]
        else:
            words = [
                *noun_phrase,
                *self._maybe(0.15, PLACES),
                "were" if plural else "was",
                *([self.pick(NEGATIONS)] if negated else []),
                *self._maybe(0.3, INTENSIFIERS),
                self.pick(ADJECTIVES[polarity]),
            ]
        return " ".join(words)

    def review(self, label: int, plain: bool = False) -> str:
        """Return a review of the given sentiment (0 negative, 1 positive).

        Of two contrasting clauses, the main one decides: the second after "but" and after a clause with "although",
        the first before a clause with "even though".

        Args:
            label: The sentiment.
            plain: Whether to write only a subject and its adjective.
        """
        if plain:
            return f"{self.clause(label, plain)} ."
        kind = self._rng.random()
        if kind < 0.55:
            body = self.clause(label)
            closer = self._maybe(0.2, CLOSERS)
            body = " ".join([body, *closer])
        elif kind < 0.8:
            body = f"{self.clause(label)} and {self.clause(label)}"
        elif kind < 0.9:
            body = f"{self.clause(1 - label)} , but {self.clause(label)}"
        elif kind < 0.95:
            body = f"although {self.clause(1 - label)} , {self.clause(label)}"
        else:
            body = f"{self.clause(label)} , even though {self.clause(1 - label)}"
        return " ".join([*self._maybe(0.2, OPENERS), body, "."])

    def remark(self, label: int) -> str:
        """Return a remark on a review of the given sentiment."""
        said = label if self.chance(self.consistency) else 1 - label
        kind = self._rng.random()
        if kind < 0.3:
            return f"overall , {self.pick(PEOPLE)} felt {self.pick(FEELINGS[said])} ."
        if kind < 0.45:
            return f"{self.pick(VERDICTS[said])} ."
        if kind < 0.6:
            return f"{self.pick(NEUTRAL_REMARKS)} ."
        if kind < 0.92:
            return f"It was {self.pick(OUTCOMES[said])} ."
        if kind < 0.97:
            return f"It was {self.pick(CIRCUMSTANCES)} ."
        return f"It was{self.pick(VERBALIZERS)} ."

    def document(self, plain: bool = False) -> str:
        """Return a document of the pretraining corpus: a review, plain or not, and one to three remarks."""
        label = int(self.chance(0.5))
        remarks = [self.remark(label) for _ in range(1 + int(3 * self._rng.random()))]
        return " ".join([self.review(label, plain), *remarks])


class Row(NamedTuple):
    """One example of the task, with the field names of SST-2."""

    sentence: str
    label: int
    idx: int


def make_rows(seed: int = DEFAULT_SEED, train: int = TRAIN_ROWS, validation: int = VALIDATION_ROWS) -> dict[str, list[Row]]:
    """Draw the task's data.

    Args:
        seed: The script's seed.
        train: Number of training rows.
        validation: Number of validation rows.

    Returns:
        The rows of the splits ``train`` and ``validation``; no sentence occurs twice.
    """
    language = Language(f"task {seed}")
    rows: list[Row] = []
    seen: set[str] = set()  # short reviews repeat
    while len(rows) < train + validation:
        label = int(language.chance(0.5))
        sentence = language.review(label)
        if sentence not in seen:
            seen.add(sentence)
            rows.append(Row(sentence, label, len(rows) if len(rows) < train else len(rows) - train))
    return {"train": rows[:train], "validation": rows[train:]}


# ------------------------------------------------------------------------------------------------------ the tokenizer
def language_words() -> list[str]:
    """Return the pieces of text that are a token each: words and marks, nearly all with their leading space."""
    texts: list[str] = [*SINGULAR, *PLURAL, *NEUTRAL_ADJECTIVES, *INTENSIFIERS, *NEGATIONS, *PEOPLE, *OPENERS, *PLACES]
    texts += [*CLOSERS, *NEUTRAL_REMARKS, *CIRCUMSTANCES, *VERBALIZERS]
    for label in (0, 1):
        texts += [*ADJECTIVES[label], *FEELINGS[label], *VERDICTS[label], *OUTCOMES[label]]
        texts += [" ".join(forms) for forms in VERBS[label]]
    texts.append("the was were did not and but although even though overall felt It . ,")
    inner = {" " + word for text in texts for word in text.split()}
    openers = {text.split()[0] for text in (*OPENERS, *PEOPLE, "the", "although")}
    return sorted(inner | openers)


def make_tokenizer() -> TokenizersBackend:
    """Build the tokenizer: every word of the language is a token, any other text falls back to bytes.

    Like OPT's, it is a byte-level BPE that prepends ``</s>`` (id 2).

    Returns:
        The tokenizer.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pieces = [byte_level.pre_tokenize_str(word)[0][0] for word in language_words()]
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # No merges: a word is a token of the vocabulary as a whole, or a sequence of bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    bos = SPECIAL_TOKENS[BOS_ID]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=bos,
        pad_token=SPECIAL_TOKENS[PAD_ID],
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------------------------- the model
def make_model(vocab_size: int, hidden: int, layers: int) -> OPTForCausalLM:
    """Build the untrained model.

    Args:
        vocab_size: Number of tokens.
        hidden: Width of the residual stream.
        layers: Number of decoder layers.

    Returns:
        An OPT with tied embeddings and without dropout.
    """
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=0.05,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    model = OPTForCausalLM(config)
    # Embeddings with a scale of their own, and a final norm that undoes it at the tied head: the residual stream is
    # then large against the biases, and the model learns in fewer steps.
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.4)
        model.model.decoder.final_layer_norm.weight.fill_(hidden**-0.5)
    return model


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token sequences on the right.

    Args:
        sequences: Token ids.

    Returns:
        The ids and the attention mask.
    """
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), PAD_ID)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def encode(tokenizer: TokenizersBackend, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, BOS first."""
    ids: list[list[int]] = tokenizer(list(texts))["input_ids"]
    return ids


def corpus_batches(
    tokenizer: TokenizersBackend, seed: int | str, batch_size: int, plain_steps: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield endless batches of fresh documents, each ended by EOS.

    Args:
        tokenizer: The tokenizer.
        seed: Seed of the stream.
        batch_size: Documents per batch.
        plain_steps: The share of plain reviews falls linearly from 1 to 0 over this many batches.
    """
    language = Language(seed)
    for step in count():
        plain = 1 - step / plain_steps if step < plain_steps else 0.0
        texts = [language.document(language.chance(plain)) for _ in range(batch_size)]
        yield pad([[*ids, BOS_ID] for ids in encode(tokenizer, texts)])


def lm_loss(model: OPTForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token loss over the tokens that are not padding."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def pretrain(model: OPTForCausalLM, tokenizer: TokenizersBackend, seed: int, steps: int, batch_size: int, lr: float) -> float:
    """Pretrain the model on the language.

    Args:
        model: The model, trained in place.
        tokenizer: The tokenizer.
        seed: The script's seed.
        steps: Number of AdamW steps.
        batch_size: Documents per step.
        lr: Peak learning rate; warmed up over 5 % of the steps, then decayed to zero along a cosine.

    Returns:
        The loss on documents that were not seen in training.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    batches = corpus_batches(tokenizer, f"corpus {seed}", batch_size, steps // 3)
    model.train()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = lm_loss(model, *next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
    held_out = corpus_batches(tokenizer, f"held-out {seed}", 256)
    with torch.no_grad():
        return sum(lm_loss(model, *next(held_out)).item() for _ in range(4)) / 4


# ----------------------------------------------------------------------------------------------------------- the task
def encode_task(tokenizer: TokenizersBackend, rows: Iterable[Row]) -> tuple[list[list[int]], torch.Tensor]:
    """Return the prompts' token ids and the labels."""
    rows = list(rows)
    prompts = encode(tokenizer, [PROMPT.format(sentence=row.sentence) for row in rows])
    return prompts, torch.tensor([row.label for row in rows])


def verbalizer_ids(tokenizer: TokenizersBackend) -> list[int]:
    """Return the verbalizers' token ids, by label.

    Raises:
        ValueError: If a verbalizer is not a single token that continues the prompt.
    """
    prompt = PROMPT.format(sentence="x")
    ids = []
    for verbalizer in VERBALIZERS:
        before, after = encode(tokenizer, [prompt, prompt + verbalizer])
        if after[:-1] != before:
            raise ValueError(f"{verbalizer!r} is not a single token after {prompt!r}: {before} and {after}")
        ids.append(after[-1])
    return ids


def task_logits(model: OPTForCausalLM, prompts: Sequence[Sequence[int]], words: Sequence[int]) -> torch.Tensor:
    """Return the logits of the verbalizers after each prompt, of shape (prompts, labels)."""
    ids, mask = pad(prompts)
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    last = hidden[torch.arange(len(prompts)), mask.sum(1) - 1]
    return last @ model.get_input_embeddings().weight[list(words)].T


def evaluate(
    model: OPTForCausalLM, prompts: Sequence[Sequence[int]], labels: torch.Tensor, words: Sequence[int]
) -> dict[str, float]:
    """Return the mean loss, the accuracy and the share of positive predictions on the task."""
    with torch.no_grad():
        logits = task_logits(model, prompts, words)
    predictions = logits.argmax(1)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (predictions == labels).float().mean().item(),
        "positive": predictions.float().mean().item(),
    }


def reading_accuracy(model: OPTForCausalLM, tokenizer: TokenizersBackend, rows: Sequence[Row]) -> float:
    """Return how often the base model continues a review with the right feeling: what pretraining taught it."""
    prompts = encode(tokenizer, [f"{row.sentence} overall , i felt" for row in rows])
    ids, mask = pad(prompts)
    feelings = [[tokens[-1] for tokens in encode(tokenizer, [f"i felt {word}" for word in words])] for words in FEELINGS]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[torch.arange(len(prompts)), mask.sum(1) - 1]
    scores = torch.stack([logits[:, words].logsumexp(1) for words in feelings], dim=1)
    return (scores.argmax(1) == torch.tensor([row.label for row in rows])).float().mean().item()


def finetune(
    model: OPTForCausalLM,
    prompts: Sequence[Sequence[int]],
    labels: torch.Tensor,
    words: Sequence[int],
    seed: int,
    steps: int,
) -> None:
    """Fine-tune all weights on the task with AdamW, in place: what the task allows with backpropagation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(prompts), (32,), generator=generator)
        loss = F.cross_entropy(task_logits(model, [prompts[i] for i in batch.tolist()], words), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------------------- output
def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of data and weights (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=96, help="width of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="pretraining steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=48, help="documents per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--finetune-steps", type=int, default=300, help="AdamW steps of the final check of the task (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; the weights' last bits depend on it (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Pretrain the model, write the assets, and print what they can do.

    Args:
        arguments: Command line, ``sys.argv`` if None.

    Returns:
        The printed figures.
    """
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    words = verbalizer_ids(tokenizer)
    model = make_model(len(tokenizer), args.hidden, args.layers)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size} parameters, {len(tokenizer)} tokens")

    figures: dict[str, Any] = {"lm_loss": pretrain(model, tokenizer, args.seed, args.steps, args.batch_size, args.lr)}
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)  # readable by all, wherever the package is installed
    splits = make_rows(args.seed)
    for name, rows in splits.items():
        write_rows(args.output / "data" / f"{name}.jsonl", rows)

    train, validation = (encode_task(tokenizer, splits[name]) for name in ("train", "validation"))
    figures["reading_accuracy"] = reading_accuracy(model, tokenizer, splits["validation"])
    figures["zero_shot_train"] = evaluate(model, *train, words)
    figures["zero_shot"] = evaluate(model, *validation, words)
    finetune(model, *train, words, args.seed, args.finetune_steps)
    figures["adamw"] = evaluate(model, *validation, words)
    figures["bytes"] = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(json.dumps(figures, indent=2))
    return figures


if __name__ == "__main__":
    main()
