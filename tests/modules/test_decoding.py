"""Greedy decoding of a padded batch against a loop over single prompts, without a cache, that takes the largest logit."""

import copy
import gc
import logging
from functools import partial

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.tiny import plan, save_tiny_model, tiny_config
from zo_lightning.data import GenerationBatch
from zo_lightning.modules import CausalLMGenerationModule, GreedyDecoder, decoding, stop_tokens
from zo_lightning.optim import Address, LowRank, ZerothOrder

WORDS = [
    *("<s>", "<pad>", "</s>"),
    *"abcdefghijklmnop",
    "\n",
    "q\n",
    "r\ns",
    "t",
    "u",
]  # ids 0 to 23, all that the tiny models know
EOS, PAD, STOPS = 2, 1, [2, 19, 20, 21]
PROMPTS = [
    [2, 3, 4, 5],
    [2, 3, 11, 4, 6, 7, 8],
    [2, 9],
    [2, 18, 17],
    [2, 3, 3, 3, 3, 3],
    [2, 12, 6],
    [2, 2, 10],
    [2, 22, 23, 14, 5],
]
NEW_TOKENS = 9
EVERY_KIND = pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "qwen2"])
PEFT = {
    "lora": {"peft_type": "LORA", "r": 2, "init_lora_weights": False, "target_modules": "all-linear"},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
}


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token for each of WORDS, written one after the other; EOS is BOS too, as in OPT."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^a-u]?[a-u]?\n?"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{key: value for key, value in special.items() if value})


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


def module_of(folder, kind, peft=None, seed=0, **config) -> CausalLMGenerationModule:
    """Random float64 weights, without a Trainer."""
    save_tiny_model(folder, tiny_config(kind, **config), torch.float64, seed)
    module = CausalLMGenerationModule(str(folder), peft=peft)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # of the adapter
        module.configure_model()
    return module.double().eval()


def padded(prompts, pad=PAD, columns=1) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts)) + columns
    return {
        "input_ids": torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


@torch.no_grad()
def slow(model, prompt, stops=(), limit=NEW_TOKENS) -> list[int]:
    """The new tokens of one prompt: a forward of the whole text for each."""
    ids = list(prompt)
    for _ in range(limit):
        row = torch.tensor([ids])
        ids.append(int(model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def text_of(tokens: list[int]) -> str:
    text = "".join(WORDS[token] for token in tokens if token not in (PAD, EOS))
    return text.split("\n")[0].strip()


# ---- where a text ends -------------------------------------------------------------------------------------------------
def test_tokens_that_hold_a_line_break_stop(words):
    assert stop_tokens(words) == STOPS
    assert stop_tokens(word_tokenizer(eos_token=None, bos_token=None)) == STOPS[1:]


def test_bytes_that_hold_a_line_break_stop():
    tokenizer = Tokenizer(
        models.BPE({"<unk>": 0, "a": 1, "Ċ": 2, "Ġ": 3, "ĊĊ": 4, "ĠĊ": 5, "aĊ": 6, "Ģ": 7}, [], unk_token="<unk>")
    )
    tokenizer.decoder = decoders.ByteLevel()
    assert stop_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == [2, 4, 5, 6]


def test_a_real_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "opt-mini")
    assert stop_tokens(tokenizer) == sorted({tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"]})


def test_a_vocabulary_is_decoded_once_for_each_tokenizer(monkeypatch):
    calls = []
    tokenizer = word_tokenizer()
    decode = type(tokenizer).batch_decode
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda self, *a, **k: calls.append(self) or decode(self, *a, **k))
    for limit in (1, 2, 3):
        GreedyDecoder(tokenizer, limit)
    assert calls == [tokenizer]
    calls.clear()
    count = len(decoding._STOPS)
    del tokenizer
    gc.collect()
    assert len(decoding._STOPS) == count - 1, "nothing keeps a tokenizer alive"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([3, 4, 19], "ab"),
        ([3, 4, 20], "abq"),
        ([3, 21, 5], "ar"),
        ([19, 3, 4], ""),
        ([2, 3, 4], ""),
        ([3, 2, 1, 1], "a"),
        ([3, 2, 2, 2], "a"),
        ([3, 1, 4], "ab"),
        ([3, 19, 8, 9], "a"),
        ([], ""),
        ([3, 4], "ab"),
    ],
)
def test_texts(words, tokens, text):
    assert GreedyDecoder(words, 5).texts([tokens, [5]]) == [text, "c"]


def test_white_space_around_a_text_is_removed():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, " ": 1, "a": 2, "\n": 3, "\r": 4}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    decoder = GreedyDecoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), 5)
    assert decoder.stop_ids == [3]
    assert decoder.texts([[1, 2, 1, 2, 4, 3], [1, 3, 2], [1, 1]]) == ["a a", "", ""]


@pytest.mark.parametrize(("end", "stops"), [("c", [2, 5, 19, 20, 21]), ("de", STOPS), ("?", STOPS), (None, STOPS)])
def test_the_end_of_a_turn_stops_too(words, end, stops):
    """A single token stops the model, several only cut the text, and what the vocabulary has not is no token."""
    decoder = GreedyDecoder(words, 5, end)
    assert decoder.stop_ids == stops
    expected = {"c": ["ab", "abde"], "de": ["abc", "ab"]}.get(end, ["abcd", "abdef"])
    assert (
        decoder.texts([[3, 4, 5, 6] if end != "de" else [3, 4, 5, 6, 7], [3, 4, 6, 7, *([8] if end != "c" else [])]])
        == expected
    )


# ---- against a slow loop -----------------------------------------------------------------------------------------------
@EVERY_KIND
def test_a_padded_batch_is_written_as_each_prompt_alone(kind, words, tmp_path):
    """Rows that end early and rows that do not, side by side; BOS, which is EOS, at a prompt's start stops nothing."""
    lengths = []
    for seed in range(2):
        module = module_of(tmp_path, kind, seed=seed)
        expected = [slow(module.model, prompt, STOPS) for prompt in PROMPTS]
        texts = GreedyDecoder(words, NEW_TOKENS)(module.model, **padded(PROMPTS))
        assert texts == [text_of(tokens) for tokens in expected]
        assert any(texts)
        lengths += map(len, expected)
    assert min(lengths) < NEW_TOKENS
    assert max(lengths) == NEW_TOKENS


@EVERY_KIND
def test_without_anything_that_stops_all_tokens_are_written(kind, tmp_path):
    module = module_of(tmp_path, kind)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(24)}, unk_token="w0"))
    decoder = GreedyDecoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer), NEW_TOKENS)
    assert decoder.stop_ids == []
    expected = [" ".join(f"w{token}" for token in slow(module.model, prompt)) for prompt in PROMPTS]
    assert decoder(module.model, **padded(PROMPTS)) == expected


@pytest.mark.parametrize("columns", [0, 3])
def test_padding_with_eos(words, tmp_path, columns):
    module = module_of(tmp_path, "opt")
    expected = GreedyDecoder(words, NEW_TOKENS)(module.model, **padded(PROMPTS))
    decoder = GreedyDecoder(word_tokenizer(pad_token=None), NEW_TOKENS)
    assert decoder(module.model, **padded(PROMPTS, pad=EOS, columns=columns)) == expected


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("name", PEFT)
def test_adapters(kind, name, words, tmp_path):
    module = module_of(tmp_path, kind, PEFT[name])
    module._decoder = GreedyDecoder(words, NEW_TOKENS)
    texts = module(padded(PROMPTS))
    assert texts == [text_of(slow(module.model, prompt, STOPS)) for prompt in PROMPTS]
    with module.model.disable_adapter():
        assert [text_of(slow(module.model, prompt, STOPS)) for prompt in PROMPTS] != texts


@pytest.mark.parametrize("name", [None, "lora", "prompt"])
def test_a_fixed_number_of_forwards_writes_the_same(name, words, tmp_path):
    module = module_of(tmp_path, "llama", PEFT.get(name))
    decoder = GreedyDecoder(words, NEW_TOKENS)
    prompts = padded([prompt for prompt in PROMPTS if len(slow(module.model, prompt, STOPS)) < NEW_TOKENS])
    widths = []
    module.base.register_forward_hook(lambda model, args, output: widths.append(output.logits.shape[1]))
    with module.positions_after_prompt():
        expected = decoder(module.model, **prompts)
        early = len(widths)
        assert decoder(module.model, **prompts, fixed_length=True) == expected
    assert early < NEW_TOKENS
    assert len(widths) == early + NEW_TOKENS


# ---- the model's own settings ------------------------------------------------------------------------------------------
def test_the_models_own_generation_settings_do_not_count(words, tmp_path):
    """No sampling, no penalties, no other limits or ends, and not a word about them."""
    module = module_of(tmp_path, "opt")
    decoder = GreedyDecoder(words, NEW_TOKENS)
    expected = decoder(module.model, **padded(PROMPTS))
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 3.0, "max_length": 12}
    own = GenerationConfig(**settings, eos_token_id=3, pad_token_id=4, forced_eos_token_id=5, min_new_tokens=4)
    module.model.generation_config = own
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        assert decoder(module.model, **padded(PROMPTS)) == expected
    finally:
        logger.removeHandler(handler)
    assert not records
    assert module.model.generation_config is own


def test_the_models_own_generation_settings_come_back_after_an_error(words, tmp_path):
    module = module_of(tmp_path, "opt")
    own = module.model.generation_config
    with pytest.raises(IndexError):
        GreedyDecoder(words, NEW_TOKENS)(module.model, torch.tensor([[2, 10_000]]), torch.tensor([[1, 1]]))
    assert module.model.generation_config is own


def test_greedy_choices_draw_no_random_numbers(words, tmp_path):
    module = module_of(tmp_path, "opt")
    before = torch.get_rng_state()
    GreedyDecoder(words, NEW_TOKENS)(module.model, **padded(PROMPTS))
    assert torch.equal(torch.get_rng_state(), before)


# ---- in the middle of zeroth-order training ----------------------------------------------------------------------------
ANSWERS = [[[3, 4, 19]], [[5, 19]], [[6, 19]], [[7, 8, 9, 19]]] * 2
SETTINGS = {"lr": 0.01, "directions": "low_rank", "rank": 2, "interval": 3, "update": "sgd", "seed": 4}


def generation_batch() -> GenerationBatch:
    scoring = plan(PROMPTS, ANSWERS, [0] * len(PROMPTS))
    return {**padded(PROMPTS), "scoring": scoring, "answers": [["x"]] * len(PROMPTS), "index": torch.arange(len(PROMPTS))}


class Recorder(nn.Module):
    """A module whose loss also notes what it writes."""

    def __init__(self, module: CausalLMGenerationModule) -> None:
        super().__init__()
        self.module = module
        self.batch = generation_batch()
        self.repeated = {1: self.batch}
        self.texts: list[list[str]] = []

    def loss(self, copies: int = 1) -> torch.Tensor:
        if copies not in self.repeated:
            self.repeated[copies] = self.module.repeat_batch(self.batch, copies)
        batch = self.repeated[copies]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        self.texts.append(self.module.decoder(self.module.model, ids, mask, fixed_length=True))
        return self.module.loss(batch)


@EVERY_KIND
def test_probes_write_what_two_displaced_models_write(kind, words, tmp_path):
    """Both probes of a step in one doubled batch, with an update pending from the step before."""
    tau = 0.15
    module = module_of(tmp_path, kind)
    module._decoder = GreedyDecoder(words, NEW_TOKENS)
    recorder = Recorder(module)
    optimizer = ZerothOrder(module.named_parameters(), smoothing=tau, **SETTINGS).attach(module)
    with torch.no_grad():
        optimizer.step(recorder.loss, stacked=recorder.loss)
        assert optimizer.param_groups[0]["stacking"] == "trusted"
        differ = 0
        for step in (1, 2):
            weights = {name: weight.clone() for name, weight in module.state_dict().items()}  # with what is pending
            twin = copy.deepcopy(module)
            recorder.texts.clear()
            optimizer.step(recorder.loss, stacked=recorder.loss)
            (written,) = recorder.texts
            count = len(PROMPTS)
            expected = []
            for sign in (1, -1):
                for name, weight in twin.named_parameters():
                    z = LowRank(2, 3).draw(Address(4, step, name), weight.shape, torch.device("cpu"))
                    z = z.dense().view(weight.shape) if weight.dim() > 1 else z
                    weight.copy_(weights[name] + sign * tau * z.double())
                expected.append([text_of(slow(twin.model, prompt, STOPS)) for prompt in PROMPTS])
            assert written[:count] == expected[0]
            assert written[count:] == expected[1]
            differ += sum(plus != minus for plus, minus in zip(*expected, strict=True))
        assert differ >= 4, "the displacement shows in the texts"


@EVERY_KIND
def test_a_pending_update_is_written_with(kind, words, tmp_path):
    module = module_of(tmp_path, kind)
    module._decoder = GreedyDecoder(words, NEW_TOKENS)
    before = module(padded(PROMPTS))
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    optimizer = ZerothOrder(module.named_parameters(), smoothing=0.01, **{**SETTINGS, "lr": 0.3, "update": "unit"}).attach(
        module
    )
    batch = generation_batch()
    with torch.no_grad():
        optimizer.step(lambda: module.loss(batch))
    assert all(torch.equal(start[name], weight) for name, weight in module.named_parameters()), "nothing is written yet"
    pending = module(padded(PROMPTS))
    alone = module_of(tmp_path / "other", kind)
    alone.load_state_dict(module.state_dict())
    assert pending == [text_of(slow(alone.model, prompt, STOPS)) for prompt in PROMPTS]
    assert pending != before


def _note(seen, module, args, kwargs):
    seen.append(kwargs["position_ids"])


def test_positions_of_long_prompts_in_bfloat16(tmp_path):
    """Virtual tokens in front of a prompt of more tokens than bfloat16 can count."""
    module = module_of(tmp_path, "llama", PEFT["prompt"])
    ids, seen = torch.full((1, 300), 5), []
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for precision="bf16-true"
    try:
        with module.positions_after_prompt(), torch.no_grad():
            note = partial(_note, seen)  # after what counts the positions
            module.base.register_forward_pre_hook(note, with_kwargs=True)
            module.to(torch.bfloat16).model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen[0].tolist() == [list(range(303))]
