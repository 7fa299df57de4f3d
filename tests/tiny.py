"""Tiny random models in the hub's layout, data folders and batches for the tests; nothing comes from the network."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

WORDS = ("a", "film", "with", "no", "plot", "It", "was", "terrible", "great", "good", "bad", "Yes", "No", "Maybe", "?", ".")
VOCABULARY = {"<s>": 0, "<pad>": 1, "</s>": 2, **{word: 3 + i for i, word in enumerate(WORDS)}}
VOCABULARY_SIZE = 24


def tiny_config(kind: str, **changes) -> PretrainedConfig:
    """A configuration of two layers and 16 hidden units."""
    common = {"vocab_size": VOCABULARY_SIZE, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, **changes}
    llama = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    if kind == "opt":
        sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return OPTConfig(**sizes, max_position_embeddings=64, **{"dropout": 0.0, **common})
    if kind == "gpt2":
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)
    if kind == "llama":
        return LlamaConfig(**llama, **common)
    return Qwen2Config(**llama, **common)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and OPT's `</s>` in front of every text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )


def save_tiny_model(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a random model, large enough in its weights for its logits to differ, and its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.to(dtype).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def film_folder(folder: Path, train: int = 64, validation: int = 12) -> Path:
    """Rows for SST-2 of 3 to 12 words; the adjective decides the label."""
    for name, count in (("train", train), ("validation", validation)):
        rows = [
            {"sentence": f"a {('bad', 'good')[i % 2]} film" + " with no plot" * (i % 4), "label": i % 2, "idx": i}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def plan(rows: list[list[int]], candidates: list[list[list[int]]], labels: list[int]) -> dict[str, torch.Tensor]:
    """A scoring plan made the slow way: one padded row per candidate, every token its own logit position.

    Args:
        rows: The prompt of each example.
        candidates: For each example the tokens of each candidate.
        labels: The right candidate of each example.
    """
    fed, starts, owners, texts, index = [], [], [], [], []
    for example, (prompt, options) in enumerate(zip(rows, candidates, strict=True)):
        for k, tokens in enumerate(options):
            fed.append(prompt + tokens[:-1])
            starts.append(len(prompt) - 1)
            owners.append(example)
            texts.append(tokens)
            index.append(k)
    width = max(len(row) for row in fed) + 1  # one column of padding for all
    pad = [width - len(row) for row in fed]
    scored = [(c, i) for c, tokens in enumerate(texts) for i in range(len(tokens))]
    return {
        "input_ids": torch.tensor([[1] * p + row for p, row in zip(pad, fed, strict=True)]),
        "attention_mask": torch.tensor([[0] * p + [1] * len(row) for p, row in zip(pad, fed, strict=True)]),
        "position_ids": torch.tensor([[0] * p + list(range(len(row))) for p, row in zip(pad, fed, strict=True)]),
        "logit_row": torch.tensor([c for c, _ in scored]),
        "logit_position": torch.tensor([pad[c] + starts[c] + i for c, i in scored]),
        "token_logit": torch.arange(len(scored)),
        "token_id": torch.tensor([texts[c][i] for c, i in scored]),
        "token_candidate": torch.tensor([c for c, _ in scored]),
        "candidate_length": torch.tensor([len(tokens) for tokens in texts]),
        "candidate_example": torch.tensor(owners),
        "candidate_index": torch.tensor(index),
        "label": torch.tensor(labels),
        "index": torch.arange(len(rows)),
    }


PROMPTS = [[2, 3, 4, 5], [2, 3, 11, 4, 6, 7, 8], [2, 9]]
CANDIDATES = [[[10], [11, 12]], [[10], [13, 14, 15]], [[10], [11, 12]]]
