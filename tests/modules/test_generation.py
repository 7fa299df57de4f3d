"""The generation module against a slow loop with plain transformers, and its life in a Trainer and on the command line."""

import copy
import json
import re
import string
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_tiny_model, tiny_config, word_tokenizer
from zo_lightning.cli import cli, main
from zo_lightning.data import GenerationCollator, PromptDataModule, ScoringCollator, repeat_generation_batch
from zo_lightning.modules import CausalLMClassificationModule, CausalLMGenerationModule, ModelError

TASK = {"template": "{q} ?", "answer_column": "a", "max_new_tokens": 6, "name": "films"}
QUESTIONS = [
    "was It a film",
    "a film with no plot",
    "It was great",
    "Maybe",
    "was a bad film with a great plot good",
    "No film . a",
]
EVERY_KIND = pytest.mark.parametrize("kind", ["opt", "gpt2", "llama", "qwen2"])


# ---- written down again ------------------------------------------------------------------------------------------------
def normalised(text: str) -> list[str]:
    """Words as SQuAD compares them."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in re.sub(r"\b(a|an|the)\b", " ", text).split() if word]


def exact(text: str, answers: list[str]) -> float:
    return float(any(normalised(text) == normalised(answer) for answer in answers))


def overlap(text: str, answers: list[str]) -> float:
    best = 0.0
    for answer in answers:
        a, b = normalised(text), normalised(answer)
        if not a or not b:
            best = max(best, float(a == b))
            continue
        shared = sum(min(a.count(word), b.count(word)) for word in set(a))
        best = max(best, 2 * shared / (len(a) + len(b)))
    return best


@torch.no_grad()
def write(model, tokenizer, prompt_ids, limit, end=None) -> str:
    """What the model writes, a forward of the whole text for each token; ``end`` ends it too."""
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + limit:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        token = tokenizer.decode([ids[-1]])
        if ids[-1] == tokenizer.eos_token_id or "\n" in token or token == end:
            break
    return tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True).split("\n")[0].split(end or "\n")[0].strip()


@torch.no_grad()
def answer_loss(model, prompt_ids, answer_ids) -> float:
    log_p = model(torch.tensor([prompt_ids + answer_ids]), use_cache=False).logits[0].double().log_softmax(-1)
    return -float(np.mean([float(log_p[len(prompt_ids) - 1 + i, token]) for i, token in enumerate(answer_ids)]))


# ---- a tiny task -------------------------------------------------------------------------------------------------------
def trainer(tmp_path, **arguments) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **arguments})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random model that writes something to every question."""
    return save_tiny_model(tmp_path_factory.mktemp("writer"), tiny_config("opt"), seed=11)


@pytest.fixture(scope="module")
def opt(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def written_by(model) -> list[str]:
    tokenizer = word_tokenizer()
    return [write(model, tokenizer, tokenizer(f"{question} ?")["input_ids"], 6) for question in QUESTIONS]


@pytest.fixture
def folder(opt, tmp_path):
    """Answers made of what the model writes: wholly right, by the second answer, in part, not at all."""
    texts = written_by(opt)
    assert all(texts)
    answers = [
        [texts[0]],
        ["plot", f"The {texts[1]}."],
        [f"{texts[2].split()[0]} Maybe Maybe Maybe Maybe"],
        ["zero"],
        ["zero", f"{texts[4]} Yes", f"{texts[4]} Yes Yes Yes"],
        [texts[5].upper()],
    ]
    rows = "".join(f"{json.dumps({'q': q, 'a': a})}\n" for q, a in zip(QUESTIONS, answers, strict=True))
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(rows)
    return tmp_path / "data"


def datamodule(folder, task=TASK, **arguments) -> PromptDataModule:
    return PromptDataModule(task, str(folder), batch_size=2, num_train=1, num_dev=5, pin_memory=False, **arguments)


def collated(folder):
    data = datamodule(folder, tokenizer=word_tokenizer())
    data.setup()
    return GenerationCollator(ScoringCollator(1))(data.dataset("eval").examples)


@EVERY_KIND
def test_the_loss_is_that_of_the_first_answer(kind, folder, tmp_path):
    model_folder = save_tiny_model(tmp_path / "model", tiny_config(kind), torch.float64)
    batch = collated(folder)
    module = CausalLMGenerationModule(str(model_folder))
    module.configure_model()
    module.double().eval()
    with torch.no_grad():
        losses = module.loss(batch)
    tokenizer = word_tokenizer()
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    expected = []
    for index in batch["index"].tolist():
        prompt = tokenizer(f"{rows[index]['q']} ?")["input_ids"]
        answer = tokenizer(rows[index]["a"][0], add_special_tokens=False)["input_ids"]
        expected.append(answer_loss(module.model, prompt, answer))
    torch.testing.assert_close(losses, torch.tensor(expected).to(losses.dtype), rtol=0, atol=1e-6)
    assert losses.shape == (len(QUESTIONS),)


@pytest.mark.parametrize("copies", [2, 3])
def test_a_repeated_batch_gives_the_losses_of_each_copy(copies, folder, tiny):
    batch = collated(folder)
    module = CausalLMGenerationModule(str(tiny))
    module.configure_model()
    module.eval()
    repeated = module.repeat_batch(batch, copies)
    with torch.no_grad():
        torch.testing.assert_close(module.loss(repeated), module.loss(batch).repeat(copies), rtol=0, atol=1e-6)
        assert module(repeated) == module(batch) * copies
    assert repeated["answers"] == repeat_generation_batch(batch, copies)["answers"]


def test_adapters_with_one_prompt_for_all_are_probed_one_after_the_other(folder, tiny):
    module = CausalLMGenerationModule(str(tiny), peft={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2})
    module.configure_model()
    assert module.repeat_batch(collated(folder), 2) is None


def test_evaluation(opt, folder, tiny, tmp_path):
    """Losses, exact matches and overlaps of batches of 2, as fractions, against single prompts."""
    module, data = CausalLMGenerationModule(str(tiny)), datamodule(folder, eval_batch_size=2)
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    texts, tokenizer = written_by(opt), word_tokenizer()
    prompts = [tokenizer(f"{question} ?")["input_ids"] for question in QUESTIONS]
    firsts = [tokenizer(line["a"][0], add_special_tokens=False)["input_ids"] for line in lines]
    losses = [answer_loss(opt, prompt, first) for prompt, first in zip(prompts, firsts, strict=True)]
    em = [exact(text, line["a"]) for text, line in zip(texts, lines, strict=True)]
    f1 = [overlap(text, line["a"]) for text, line in zip(texts, lines, strict=True)]
    assert em == [1, 1, 0, 0, 0, 1]
    assert 0 < f1[2] < 1
    assert f1[3] == 0
    assert 0 < f1[4] < 1

    run = trainer(tmp_path)
    (tested,) = run.test(module, data, verbose=False)
    assert tested["test/loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert tested["test/em"] == pytest.approx(np.mean(em), abs=1e-7)
    assert tested["test/f1"] == pytest.approx(np.mean(f1), abs=1e-6)

    (validated,) = run.validate(module, data, verbose=False)
    dev = [example["index"] for example in data.dataset("dev").examples]
    assert len(dev) == 5
    for name, values in {"val/loss": losses, "val/em": em, "val/f1": f1}.items():
        assert validated[name] == pytest.approx(np.mean([values[index] for index in dev]), abs=1e-6)

    rows = sorted((row for batch in run.predict(module, data) for row in batch), key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(6))
    assert [row["prediction"] for row in rows] == texts
    assert [row["answers"] for row in rows] == [line["a"] for line in lines]
    assert [row["em"] for row in rows] == em
    assert [row["f1"] for row in rows] == pytest.approx(f1, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("The cat.", ["cat"]),
        ("a cat and the dog", ["Dog, cat"]),
        ("cat cat cat", ["cat cat dog"]),
        ("cat", ["dog", "cat mouse", "CAT!"]),
        ("in the year 1914", ["1914", "the year of 1914"]),
        ("", ["cat"]),
        ("the", ["an"]),
        ("the", ["cat"]),
        ("$1,000", ["1000", "1,000 dollars"]),
        ("Theatre", ["atre"]),
        ("well-known man", ["wellknown man"]),
        ("  x  y ", ["x y"]),
        ("Été", ["été"]),
    ],
)
def test_comparisons_with_answers(text, answers, folder, tiny, monkeypatch):
    module = CausalLMGenerationModule(str(tiny))
    monkeypatch.setattr(module, "forward", lambda batch: [text, "cat"])
    rows = module.predict_step({"index": torch.tensor([4, 2]), "answers": [answers, ["cat"]]}, 0)
    assert rows[0] == {
        "index": 4,
        "prediction": text,
        "answers": answers,
        "em": exact(text, answers),
        "f1": pytest.approx(overlap(text, answers), abs=1e-6),
    }
    assert rows[1] == {"index": 2, "prediction": "cat", "answers": ["cat"], "em": 1.0, "f1": 1.0}


def test_validation_by_the_loss_writes_nothing(folder, tiny, tmp_path, monkeypatch):
    module, data = CausalLMGenerationModule(str(tiny), validate_by="loss"), datamodule(folder)
    both = CausalLMGenerationModule(str(tiny))
    (expected,) = trainer(tmp_path).validate(both, data, verbose=False)
    monkeypatch.setattr(module, "forward", lambda batch: pytest.fail("it writes"))
    (metrics,) = trainer(tmp_path).validate(module, data, verbose=False)
    assert metrics == {"val/loss": expected["val/loss"]}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_no_precision_blurs_the_comparisons(precision, folder, tiny, tmp_path, monkeypatch):
    """Of more examples than bfloat16 can count, and of a value that it has no more than three digits of."""
    lines = (folder / "validation.jsonl").read_text()
    (folder / "validation.jsonl").write_text(lines * 60)
    module, data = CausalLMGenerationModule(str(tiny), max_new_tokens=1), datamodule(folder, eval_batch_size=12)
    texts = [["zero", "zero one", "one"][index % 3] for index in range(360)]
    monkeypatch.setattr(module, "forward", lambda batch: [texts[index] for index in batch["index"].tolist()])
    monkeypatch.setattr(data.task, "answers", lambda row: ["zero"])
    (tested,) = trainer(tmp_path, precision=precision).test(module, data, verbose=False)
    assert tested["test/em"] == pytest.approx(1 / 3, abs=1e-6)
    assert tested["test/f1"] == pytest.approx((1 + 2 / 3 + 0) / 3, abs=1e-6)
    (rows, *_) = trainer(tmp_path, precision=precision).predict(module, data)
    assert [row["f1"] for row in rows] == [overlap(texts[row["index"]], ["zero"]) for row in rows]


@pytest.mark.parametrize("limit", [1, 3, None])
def test_the_number_of_new_tokens(limit, opt, folder, tiny, tmp_path):
    module = CausalLMGenerationModule(str(tiny), max_new_tokens=limit)
    rows = [row for batch in trainer(tmp_path).predict(module, datamodule(folder)) for row in batch]
    tokenizer = word_tokenizer()
    for row in rows:
        prompt = tokenizer(f"{QUESTIONS[row['index']]} ?")["input_ids"]
        assert row["prediction"] == write(opt, tokenizer, prompt, limit or 6)


def test_a_task_of_another_length_later(folder, tiny, tmp_path):
    module = CausalLMGenerationModule(str(tiny))
    counts = {}
    for limit in (1, 6):
        rows = trainer(tmp_path).predict(module, datamodule(folder, {**TASK, "max_new_tokens": limit}))
        counts[limit] = max(len(row["prediction"].split()) for batch in rows for row in batch)
    assert counts[1] == 1
    assert counts[6] > 1


def test_the_end_of_a_turn_in_a_chat(opt, folder, tiny, tmp_path):
    tokenizer = word_tokenizer()
    turn = "{% if m['role'] == 'user' %}</s>{{ m['content'] }} .{% else %} {{ m['content'] }} no{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    data = datamodule(folder, tokenizer=tokenizer, chat_template=True)
    rows = [row for batch in trainer(tmp_path).predict(CausalLMGenerationModule(str(tiny)), data) for row in batch]
    plain, texts = [], []
    for row in rows:
        prompt = tokenizer(f"</s>{QUESTIONS[row['index']]} ? .", add_special_tokens=False)["input_ids"]
        texts.append(write(opt, tokenizer, prompt, 6, end="no"))
        plain.append(write(opt, tokenizer, prompt, 6))
    assert [row["prediction"] for row in rows] == texts
    assert plain != texts


def test_without_a_datamodule_the_tokenizer_is_the_models(opt, folder, tiny, tmp_path):
    module = CausalLMGenerationModule(str(tiny), max_new_tokens=6)
    batch = collated(folder)
    (rows,) = trainer(tmp_path).predict(module, DataLoader([batch], batch_size=None))
    assert [row["prediction"] for row in rows] == [written_by(opt)[row["index"]] for row in rows]
    alone = CausalLMGenerationModule(str(tiny))
    alone.configure_model()
    assert alone.decoder.max_new_tokens == 50
    assert alone.decoder is alone.decoder


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match=f"cannot load the tokenizer of '{tmp_path / 'nowhere'}'"):
        CausalLMGenerationModule(str(tmp_path / "nowhere")).decoder  # noqa: B018


# ---- refusals ----------------------------------------------------------------------------------------------------------
def test_other_tasks_are_refused(films, folder, tiny, tmp_path):
    data = PromptDataModule("sst2", str(films), pin_memory=False)
    with pytest.raises(MisconfigurationException, match="'sst2' is one of the kind 'classification': use CausalLMClassif"):
        trainer(tmp_path).validate(CausalLMGenerationModule(str(tiny)), data)
    with pytest.raises(MisconfigurationException, match="use CausalLMGenerationModule"):
        trainer(tmp_path).validate(CausalLMClassificationModule(str(tiny), num_classes=2), datamodule(folder))


def test_more_tokens_than_there_is_room_for_are_refused(folder, tiny, tmp_path):
    module = CausalLMGenerationModule(str(tiny), max_new_tokens=7)
    message = "max_new_tokens=7 exceeds the 6 tokens that the prompts of task 'films' leave room for; give the task a larger"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path).validate(module, datamodule(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"validate_by": "f1"}, "validate_by must be 'loss' or 'generation', got 'f1'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalLMGenerationModule("nowhere", **arguments)


# ---- training ----------------------------------------------------------------------------------------------------------
def test_a_checkpoint_is_loaded_with_its_arguments(folder, tiny, tmp_path):
    module = CausalLMGenerationModule(str(tiny), max_new_tokens=4, validate_by="loss")
    fit = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    fit.fit(module, datamodule(folder))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = CausalLMGenerationModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert (again.max_new_tokens, again.validate_by) == (4, "loss")
    trained, loaded = module.state_dict(), again.state_dict()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    assert trained.keys() == loaded.keys()
    batch = collated(folder)
    assert again.eval()(batch) == module.eval()(batch)


def test_validation_in_training_sees_each_step(folder, tiny, tmp_path):
    """Texts and losses between the steps are those of the weights that a checkpoint would hold."""
    module, data = CausalLMGenerationModule(str(tiny)), datamodule(folder)
    found = []

    class Spy(CausalLMGenerationModule):
        def on_validation_epoch_end(self):
            super().on_validation_epoch_end()
            metrics = {name: float(self.trainer.callback_metrics[name]) for name in ("val/loss", "val/em", "val/f1")}
            found.append((copy.deepcopy(self.state_dict()), metrics))

    options = {"max_steps": 3, "val_check_interval": 1, "num_sanity_val_steps": 0, "max_epochs": 3, "limit_train_batches": 1}
    trainer(tmp_path, **options).fit(Spy(str(tiny)), data)
    assert len(found) == 3
    for weights, metrics in found:
        module.configure_model()
        module.load_state_dict(weights)
        (expected,) = trainer(tmp_path).validate(module, data, verbose=False)
        assert metrics == pytest.approx(expected, abs=1e-6)


# ---- real rows and a pretrained model ----------------------------------------------------------------------------------
@pytest.fixture
def real(shared):
    """Folders of SQuAD and of a pretrained model."""
    folder, model = shared / "data" / "squad", shared / "models" / "opt-mini"
    if not folder.is_dir() or not model.is_dir():
        pytest.skip(f"no real rows in {folder}, or no model in {model}")
    return folder, model


def options(folder, model, tmp_path) -> list[str]:
    return [
        *("--model", "CausalLMGenerationModule", "--model.model_name_or_path", str(model)),
        *("--data", "PromptDataModule", "--data.task", "squad", "--data.data_dir", str(folder), "--data.batch_size", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"),
        *("--trainer.enable_progress_bar", "false"),
    ]


class ByHand:
    """SQuAD rows one at a time."""

    def __init__(self, folder, limit) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.limit = limit

    def prompt(self, row, room) -> list[int]:
        title, question = row["title"].replace("_", " "), row["question"].strip()
        text = f"Title: {title}\nContext: {row['context']}\nQuestion: {question}\nAnswer:"
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        return [ids[0], *ids[1:][-(512 - room - 1) :]]

    def text(self, row) -> str:
        return write(self.model, self.tokenizer, self.prompt(row, 50), self.limit)

    def loss(self, row) -> float:
        answer = self.tokenizer(f" {row['answers']['text'][0]}\n", add_special_tokens=False)["input_ids"]
        return answer_loss(self.model, self.prompt(row, len(answer)), answer)


def ending_lines(folder, target):
    """A copy of the model that writes a line break where it would write a full stop."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    stop, end = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (".", "\n"))
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = 1.1 * model.get_input_embeddings().weight[stop]
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("ends", [False, True])
def test_squad_on_the_command_line(ends, real, tmp_path):
    """Real rows, of which some have what the model writes among their answers: the pretrained model hardly knows any."""
    source, model = real
    if ends:
        model = ending_lines(model, tmp_path / "model")
    hand, limit = ByHand(model, 16), ("--model.max_new_tokens", "16")
    (tmp_path / "data").mkdir()
    looked_at = {"train": np.random.RandomState(0).permutation(10)[6:].tolist(), "validation": [0, 1, 2]}
    rows, texts = {}, {}
    for split, count in (("train", 10), ("validation", 3)):
        lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows[split] = [json.loads(line) for line in lines]
        texts[split] = {number: hand.text(rows[split][number]) for number in looked_at[split]}
        for place, number in enumerate(looked_at[split]):
            answers, text = rows[split][number]["answers"], texts[split][number]
            answers["text"] = [[f"The {text}!"], [*answers["text"], f"Well, {text}"], answers["text"]][place % 3]
        lines = (f"{json.dumps(row)}\n" for row in rows[split])
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    line = options(tmp_path / "data", model, tmp_path)

    run = cli(["validate", *line, *limit, "--data.num_train", "6", "--data.num_dev", "4"])
    metrics = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    dev = [(rows["train"][number], text) for number, text in texts["train"].items()]
    assert metrics["val/loss"] == pytest.approx(np.mean([hand.loss(row) for row, _ in dev]), abs=1e-5)
    assert metrics["val/em"] == np.mean([exact(text, row["answers"]["text"]) for row, text in dev]) == 0.5
    f1 = np.mean([overlap(text, row["answers"]["text"]) for row, text in dev])
    assert metrics["val/f1"] == pytest.approx(f1, abs=1e-6)
    assert 0.5 < f1 < 1

    main(["predict", *line, *limit])
    told = [json.loads(text) for text in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, found in enumerate(told):
        text, answers = texts["validation"][number], rows["validation"][number]["answers"]["text"]
        assert (found["index"], found["prediction"]) == (number, text)
        assert found["answers"] == list(dict.fromkeys(answers))
        assert found["em"] == exact(text, answers)
        assert found["f1"] == pytest.approx(overlap(text, answers), abs=1e-6)
    lengths = [len(hand.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts["train"].values()]
    assert all(length < 15 for length in lengths) == ends


def test_squad_is_learned_on_the_command_line(real, tmp_path):
    """Thirty steps on four rows, by the likelihood of their answers."""
    folder, model = real
    line = ["fit", *options(folder, model, tmp_path), "--model.validate_by", "loss", "--data.batch_size", "4"]
    line += ["--data.num_train", "4", "--data.num_dev", "2", "--data.max_length", "96"]
    line += ["--trainer.max_steps", "30", "--trainer.callbacks+=AdaNAGED", "--trainer.enable_checkpointing", "false"]
    run = cli(line)
    before = CausalLMGenerationModule(str(model))
    before.configure_model()
    (batch,) = list(run.datamodule.train_dataloader())
    assert Counter(len(answers) for answers in batch["answers"]) == {1: 4}
    with torch.no_grad():
        start, end = float(before.eval().loss(batch).mean()), float(run.model.eval().loss(batch).mean())
    assert end < 0.95 * start
