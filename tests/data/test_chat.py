"""Chats: the texts and tokens of three families of chat templates, what is cut, what is refused, and scores in them."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.data.conftest import byte_tokenizer, film_rows, opt_like, write_jsonl
from tests.tiny import save_tiny_model, tiny_config
from zo_lightning.data import ChatPrompting, DataError, Demonstration, PromptDataModule, encode_prompts
from zo_lightning.modules import CausalLMClassificationModule, CausalLMGenerationModule

LLAMA3 = (
    "{% for message in messages %}"
    "{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# of the kind of Qwen 3: the last turn of the model begins with a thought, an empty one where there is none
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@cache
def chat(template: str, system_prompt: str | None = None) -> ChatPrompting:
    return ChatPrompting(with_template(byte_tokenizer(), template), system_prompt)


SHOWN = [Demonstration("It was good.\n", " Yes", "train", 0), Demonstration("bad. It was", " No\n", "train", 1)]

# template -> the chat without and with system prompt and demonstrations, a candidate, what ends a turn
GOLDEN = {
    LLAMA3: (
        "</s><|start_header_id|>user<|end_header_id|>\n\na film<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "</s><|start_header_id|>system<|end_header_id|>\n\nSay Yes or No.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIt was good.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nbad. It was<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na film<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yes",
        "<|eot_id|>",
    ),
    CHATML: (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nSay Yes or No.<|im_end|>\n"
        "<|im_start|>user\nIt was good.<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nbad. It was<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n"
        "<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n",
        "Yes",
        "<|im_end|>",
    ),
    MISTRAL: (
        "</s>[INST] a film [/INST]",
        "</s>[INST] Say Yes or No.\n\nIt was good. [/INST] Yes</s>[INST] bad. It was [/INST] No</s>[INST] a film [/INST]",
        " Yes",
        "</s>",
    ),
    THINKING: (
        "<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>system\nSay Yes or No.<|im_end|>\n"
        "<|im_start|>user\nIt was good.<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nbad. It was<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n"
        "<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Yes",
        "<|im_end|>",
    ),
}
NAMES = {LLAMA3: "llama3", CHATML: "chatml", MISTRAL: "mistral", THINKING: "thinking"}
templates = pytest.mark.parametrize("template", GOLDEN, ids=NAMES.get)


@templates
def test_golden_texts(template):
    alone, whole, candidate, end = GOLDEN[template]
    plain, told = chat(template), chat(template, "Say Yes or No.")
    assert plain.prompt(" a film\n").text == alone
    assert told.prompt("a film", SHOWN).text == whole
    assert plain.candidates([" Yes", "No\n"]) == [candidate, candidate.replace("Yes", "No\n")]
    assert plain.candidates([" Yes\n"], ends=True) == [candidate + end]
    assert plain.end_of_turn == end


@templates
def test_tokens_are_those_of_the_whole_text(template):
    """The special tokens are those of the template alone: OPT's tokenizer would put a `</s>` in front."""
    prompting = chat(template, "Say Yes or No.")
    tokenizer = prompting.tokenizer
    candidates = prompting.candidates([" Yes", " No"])
    (encoded,) = encode_prompts(tokenizer, [prompting.prompt("a film", SHOWN)], [candidates], 2048)
    for candidate, ids in zip(candidates, encoded.candidate_ids, strict=True):
        text = GOLDEN[template][1] + candidate
        assert encoded.prompt_ids + ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == candidate
    assert encoded.prompt_ids.count(2) == GOLDEN[template][1].count("</s>")


@templates
@settings(max_examples=30, deadline=None)
@given(content=st.text(st.sampled_from("goodb aIt:\n."), min_size=1, max_size=60), cut=st.integers(0, 80))
def test_property_the_frame_is_never_cut(template, content, cut):
    prompting = chat(template, "Say Yes or No.")
    tokenizer, prompt = prompting.tokenizer, prompting.prompt(content)
    candidates = prompting.candidates([" Yes", " Maybe"])
    (whole,) = encode_prompts(tokenizer, [prompt], [candidates], 2048)
    limit = len(whole.prompt_ids) + max(map(len, whole.candidate_ids)) - cut
    try:
        (encoded,) = encode_prompts(tokenizer, [prompt], [candidates], limit)
    except DataError:
        # the content has at most a token for each byte; where it merges with the frame, one is lost on either side
        assert cut > len(tokenizer(prompt.content, add_special_tokens=False)["input_ids"]) - 2
        return
    assert encoded.dropped == cut
    assert encoded.candidate_ids == whole.candidate_ids
    left = len(encoded.prompt_ids)
    start = next((i for i in range(left) if encoded.prompt_ids[i] != whole.prompt_ids[i]), left)
    assert encoded.prompt_ids[start:] == whole.prompt_ids[start + cut :], "one stretch is cut, and nothing else"
    text = tokenizer.decode(encoded.prompt_ids)
    kept = text.removeprefix(prompt.before.rstrip(" ")).removesuffix(prompt.after.lstrip(" "))
    assert text == prompt.before.rstrip(" ") + kept + prompt.after.lstrip(" ")
    assert f" {prompt.content}".endswith(kept.rstrip(" "))


def test_no_room_for_the_frame():
    prompting = chat(CHATML)
    frame = prompting.prompt("")
    needed = len(prompting.tokenizer(frame.text, add_special_tokens=False)["input_ids"]) + len(
        prompting.tokenizer("Maybe", add_special_tokens=False)["input_ids"]
    )
    prompt = prompting.prompt("one two " * 20)
    (encoded,) = encode_prompts(prompting.tokenizer, [prompt], [["Yes", "Maybe"]], needed)
    assert prompting.tokenizer.decode(encoded.prompt_ids) == frame.text
    with pytest.raises(DataError, match=r"row 7: nothing is left before the candidates .*raise --data\.max_length"):
        encode_prompts(prompting.tokenizer, [prompt], [["Yes", "Maybe"]], needed - 1, lambda position: "row 7")


def test_the_date_is_always_the_same():
    dated = "{{ '<|im_start|>system\nToday is ' + (date_string if date_string is defined else strftime_now('%d')) }}" + CHATML
    assert chat(dated).prompt("a film").text.startswith("<|im_start|>system\nToday is 26 Jul 2024<|im_start|>")


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
FORGETS = "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}{% endfor %}"
TWICE = "{% for message in messages %}{{ message['content'] + message['content'] }}{% endfor %}"
CHANGES = (
    "{% for message in messages %}{{ '<|im_start|>' if 'film' in message['content'] else '<|im_end|>' }}"
    "{{ message['content'] }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "system_prompt", "message"),
    [
        (None, None, "has no chat template: leave chat_template out, or take the tokenizer of an instruction-tuned model"),
        (REFUSES, "Help.", r"refuses the chat \(System role not supported\).* needs system_prompt left out"),
        (FORGETS, "Help.", "has no place for a system prompt, leave system_prompt out"),
        (TWICE, None, "does not write each turn once as it is"),
    ],
)
def test_unusable_templates(template, system_prompt, message):
    with pytest.raises(DataError, match=message):
        chat(template, system_prompt)


def test_a_template_whose_frame_depends_on_the_turn():
    with pytest.raises(DataError, match="writes something else around this prompt than around others"):
        chat(CHANGES).prompt("a film")


# ---- the datamodule, and models ----------------------------------------------------------------------------------------
ROLES = ["user", "assistant", "system", "Judge", "the", "film", "a", "bad", "good", "with", "no", "plot", "It", "was"]
MORE = ["terrible", "great", "You", "help", ".", "\n", "neither", "nor"]


def small_chat(template: str) -> PreTrainedTokenizerFast:
    """A token for each word, and OPT's `</s>` in front of every text."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, **{word: 3 + i for i, word in enumerate(ROLES + MORE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    return with_template(opt_like(tokenizer), template)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    write_jsonl(folder / "train.jsonl", film_rows(20))
    write_jsonl(folder / "validation.jsonl", film_rows(6))
    return folder


def module_of(data, words, **arguments):
    return PromptDataModule(data_dir=str(data), tokenizer=words, batch_size=3, pin_memory=False, **arguments)


def test_the_datamodule(films):
    data = module_of(films, small_chat(LLAMA3), chat_template=True, system_prompt="Judge the film.", num_eval=6)
    data.setup("test")
    item = data.dataset("eval").by_index(1)
    assert item["prompt"] == (
        "</s><|start_header_id|>system<|end_header_id|>\n\nJudge the film.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na good film with no plot It was<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert item["candidates"] == ["terrible", "great"]
    ids = data.tokenizer.get_vocab()
    header = [ids["<|start_header_id|>"], ids["user"], ids["<|end_header_id|>"], ids["\n"], ids["\n"]]
    film = [ids[word] for word in ("a", "good", "film", "with", "no", "plot", "It", "was")]
    assert item["prompt_ids"][0] == 2
    assert item["prompt_ids"].count(2) == 1
    assert item["prompt_ids"][11 : 11 + len(header) + len(film) + 1] == [*header, *film, ids["<|eot_id|>"]]
    assert item["candidate_ids"] == [[ids["terrible"]], [ids["great"]]]
    assert data.end_of_turn == "<|eot_id|>"
    assert module_of(films, small_chat(LLAMA3)).end_of_turn is None


def test_the_answer_of_a_generation_task_ends_the_turn(tmp_path):
    rows = [{"question": "a film", "answers": ["good", "great"]}, {"question": "no plot", "answers": ["bad"]}]
    write_jsonl(tmp_path / "validation.jsonl", rows)
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = {"template": "{question}\n", "answer_column": "answers", "max_new_tokens": 4}
    options = {"chat_template": True, "num_demonstrations": 1, "num_dev": 1}
    data = module_of(tmp_path, small_chat(CHATML), task=task, **options)
    data.setup("test")
    (shown,) = data._demonstrations(*data._training_split()[:2]).rows
    item = data.dataset("eval").by_index(0)
    frame = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    earlier = frame.format(rows[shown.index]["question"], rows[shown.index]["answers"][0])
    assert item["prompt"] == earlier + "<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n"
    assert item["candidates"] == ["good<|im_end|>"]
    ids = data.tokenizer.get_vocab()
    assert item["candidate_ids"] == [[ids["good"], ids["<|im_end|>"]]]
    assert item["generation_ids"] == data.tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_what_is_written_ends_with_the_turn(tmp_path):
    """Against a slow loop. The EOS, `</s>`, is another token than the end of the turn."""
    rows = [{"question": question, "answers": ["good"]} for question in ("a film", "no plot", "It was", "the film with a plot")]
    for name in ("train", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    words = small_chat(CHATML)
    end = words.get_vocab()["<|im_end|>"]
    folder = save_tiny_model(tmp_path / "model", tiny_config("llama", vocab_size=len(words)), seed=5)
    task = {"template": "{question}", "answer_column": "answers", "max_new_tokens": 12}
    data = module_of(tmp_path, words, task=task, chat_template=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    batches = Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet).predict(
        CausalLMGenerationModule(str(folder)), data
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ended = 0
    for row in (row for batch in batches for row in batch):
        ids = words(data.dataset("eval").by_index(row["index"])["prompt"], add_special_tokens=False)["input_ids"]
        start = len(ids)
        while len(ids) < start + 12:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (2, end, words.get_vocab()["\n"]):
                break
        ended += ids[-1] == end
        assert row["prediction"] == words.decode(ids[start:], skip_special_tokens=True).strip()
    assert ended, "the fixture does not show the case"


def slow_scores(model, tokenizer, template, rows, shown):
    """The scores of one row and candidate at a time, from the text that the template makes of it."""
    scores = []
    for row in rows:
        messages = []
        for other in shown:
            messages.append({"role": "user", "content": f"{other['sentence']} It was"})
            messages.append({"role": "assistant", "content": ("terrible", "great")[other["label"]]})
        messages.append({"role": "user", "content": f"{row['sentence']} It was"})
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        scores.append([])
        for word in ("terrible", "great"):
            text = prompt + (" " if template is MISTRAL else "") + word
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                scores[-1].append(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item())
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("template", [LLAMA3, CHATML, MISTRAL], ids=NAMES.get)
def test_validation_is_that_of_a_slow_loop(kind, template, films, tmp_path):
    words = small_chat(template)
    folder = save_tiny_model(tmp_path / "model", tiny_config(kind, vocab_size=len(words)))
    data = module_of(films, words, chat_template=True, num_demonstrations=1, num_train=10, num_dev=7)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
    (metrics,) = trainer.validate(CausalLMClassificationModule(str(folder)), data, verbose=False)

    order = torch.tensor([item["index"] for item in data.dataset("dev").examples])
    rows = film_rows(20)
    shown = [rows[data._training_split()[1][0]]]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = slow_scores(model, words, template, [rows[i] for i in order], shown)
    label = order % 2
    loss = torch.nn.functional.cross_entropy(scores, label)
    assert metrics["val/loss"] == pytest.approx(loss.item(), abs=2e-6)
    assert metrics["val/acc"] == pytest.approx((scores.argmax(1) == label).double().mean().item(), abs=1e-6)
