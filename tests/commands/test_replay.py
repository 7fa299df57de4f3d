"""``zo-lightning replay``: fresh processes without data and without forwards, real models, file sizes, refusals."""

import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from tests.tiny import film_folder, save_tiny_model, tiny_config
from zo_lightning.callbacks import AdaNAGED, Ledger
from zo_lightning.cli import main
from zo_lightning.data import PromptDataModule
from zo_lightning.ledger import Record, read, write
from zo_lightning.ledger.file import pack
from zo_lightning.modules import CausalLMClassificationModule
from zo_lightning.optim import ZerothOrder

PROGRAM = """
import sys, torch
from transformers import OPTForCausalLM, OPTModel

def refuse(*args, **kwargs):
    raise AssertionError("a replay needs no forward")

for kind in (OPTForCausalLM, OPTModel, torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm):
    kind.forward = refuse
torch.set_num_threads(int(sys.argv[1]))
from zo_lightning.cli import main
main(sys.argv[2:])
"""


def fit(folder, model, steps, precision="32-true", callbacks=()):
    """Fine-tune on data that are gone afterwards; the state of the trained model."""
    data = folder / "data"
    data.mkdir(parents=True)
    module = CausalLMClassificationModule(str(model))
    films = PromptDataModule(task="sst2", data_dir=str(film_folder(data)), batch_size=4)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[AdaNAGED(), Ledger(str(folder / "ledger.safetensors")), *callbacks],
        accelerator="cpu",
        precision=precision,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, films)
    for path in data.iterdir():
        path.unlink()
    data.rmdir()
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def fresh(*arguments, threads=1) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, str(threads), "replay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def assert_same(folder, expected):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=next(iter(expected.values())).dtype)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def trained(tiny_opt, tmp_path_factory):
    """Folder of the ledger, and the weights of 60 steps of the defaults: more than one interval."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, fit(folder, tiny_opt, 60)


def arguments(trained, base, out, *more):
    return ["replay", "--base", str(base), "--ledger", str(trained[0] / "ledger.safetensors"), "--out", str(out), *more]


def test_a_fresh_process_without_data_and_forwards(trained, tiny_opt, tmp_path):
    """Under another number of threads, too: the ledger knows the run's."""
    folder, weights = trained
    done = fresh(*arguments(trained, tiny_opt, tmp_path / "out")[1:], threads=2)
    assert done.returncode == 0, done.stderr
    final = read(folder / "ledger.safetensors").final
    assert f"60 steps replayed, sha256 {final}: that of the run's weights" in done.stdout
    assert "warning" not in done.stderr
    assert_same(tmp_path / "out", weights)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a film").input_ids == [2, 3, 4]
    assert not all(
        torch.equal(x, load_file(tiny_opt / "model.safetensors")[n]) for n, x in weights.items() if n != "lm_head.weight"
    )


def test_half_precision(tiny_opt, tmp_path):
    weights = fit(tmp_path, tiny_opt, 55, "bf16-true")
    done = fresh("--base", tiny_opt, "--ledger", tmp_path / "ledger.safetensors", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", weights)
    assert next(iter(weights.values())).dtype is torch.bfloat16


def test_a_real_model(shared, tmp_path):
    """OPT of 5 million parameters."""
    model = shared / "models" / "opt-mini"
    if not model.is_dir():
        pytest.skip(f"no folder {model}")
    weights = fit(tmp_path, model, 60)
    done = fresh("--base", model, "--ledger", tmp_path / "ledger.safetensors", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", weights)
    record = read(tmp_path / "ledger.safetensors")
    assert size_of(record, 2000, tmp_path) < 64 << 10


def size_of(record: Record, steps: int, folder) -> int:
    """Bytes of a ledger of as many steps as ``record`` would have after more of them."""
    record.rates, record.slopes, record.flags = (
        (column * (steps // len(column) + 1))[:steps] for column in (record.rates, record.slopes, record.flags)
    )
    write(record, folder / "long.safetensors")
    return (folder / "long.safetensors").stat().st_size


def test_size_of_a_fine_tune_of_opt_1_3b(tmp_path, monkeypatch):
    """20,000 steps over 388 parameters, whose names are those of OPT-1.3B."""
    config = OPTConfig(hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32)
    with torch.device("meta"):
        model = torch.nn.Module()
        model.add_module("model", OPTForCausalLM(config))
    named = list(model.named_parameters())
    assert len(named) == 388
    assert sum(p.numel() for _, p in named) > 1.3e9
    optimizer = ZerothOrder(ZerothOrder(named).geometry.split(named, model))
    monkeypatch.setattr("zo_lightning.ledger.record.weights_hash", lambda *args, **options: "0" * 64)  # there are no weights
    record = Record.begin(optimizer.attach(model), model)
    record.final, record.rates, record.slopes, record.flags = "0" * 64, [[0.1] * len(record.groups)], [[1.0]], [7]
    assert (size := size_of(record, 20_000, tmp_path)) < 1 << 18
    assert size - size_of(record, 10_000, tmp_path) == pytest.approx(10 * 10_000, abs=16)  # 10 bytes for a step


# ---- options ------------------------------------------------------------------------------------------------------------
def test_first_steps_and_an_interrupted_run(trained, tiny_opt, tmp_path, capsys):
    main(arguments(trained, tiny_opt, tmp_path / "out", "--steps", "0"))
    assert "0 steps replayed" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tiny_opt).state_dict()
    assert_same(tmp_path / "out", base)
    record = read(trained[0] / "ledger.safetensors")
    record.final = None
    write(record, tmp_path / "x")
    main(["replay", "--base", str(tiny_opt), "--ledger", str(tmp_path / "x"), "--out", str(tmp_path / "again")])
    assert "not compared, since the run was broken off" in capsys.readouterr().out
    assert_same(tmp_path / "again", trained[1])


def test_other_software_and_a_mismatch(trained, tiny_opt, tmp_path, capsys):
    record = read(trained[0] / "ledger.safetensors")
    record.environment["torch"], record.final = "1.13", "0" * 64
    write(record, tmp_path / "x")
    command = ["replay", "--base", str(tiny_opt), "--ledger", str(tmp_path / "x"), "--out", str(tmp_path / "out")]
    assert "the rebuilt weights have the sha256" in refused(command, capsys)
    assert not (tmp_path / "out").exists()
    main([*command, "--allow_mismatch", "true"])
    shown = capsys.readouterr()
    assert "zo-lightning: warning: torch 1.13 in the run" in shown.err
    assert f"NOT that of the run's weights, {record.final}" in shown.out
    assert_same(tmp_path / "out", trained[1])


def test_leftovers_of_another_model_go(trained, tiny_opt, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    assert "exists and is not an empty folder" in refused(arguments(trained, tiny_opt, out), capsys)
    main(arguments(trained, tiny_opt, out, "--overwrite", "true"))
    assert_same(out, trained[1])
    assert {"notes.txt", "model.safetensors"} < {path.name for path in out.iterdir()}
    assert not list(out.glob("model-*"))


# ---- refusals -----------------------------------------------------------------------------------------------------------
def refused(command, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in command])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    lines = [line for line in shown.splitlines() if line.startswith("zo-lightning: error: ")]
    assert len(lines) == 1
    return lines[0]


def other_base(tiny_opt, folder):
    """One weight by one bit."""
    model = AutoModelForCausalLM.from_pretrained(tiny_opt)
    with torch.no_grad():
        weight = model.model.decoder.final_layer_norm.weight
        weight[3] = torch.nextafter(weight[3], torch.tensor(2.0))
    model.save_pretrained(folder)
    return folder


def test_one_other_weight_in_the_base(trained, tiny_opt, tmp_path, capsys):
    base = other_base(tiny_opt, tmp_path / "base")
    message = refused(arguments(trained, base, tmp_path / "out"), capsys)
    assert "the base model is another one: its weights have the sha256" in message
    assert not (tmp_path / "out").exists()


def test_another_architecture(trained, tmp_path, capsys):
    base = save_tiny_model(tmp_path / "base", tiny_config("gpt2"))
    assert "the ledger is of another architecture" in refused(arguments(trained, base, tmp_path / "out"), capsys)
    base = save_tiny_model(tmp_path / "wide", tiny_config("opt", vocab_size=32))
    message = refused(arguments(trained, base, tmp_path / "out"), capsys)
    assert "of shape [32, 16], in the ledger float32 of shape [24, 16]" in message


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda content: b"", "is empty"),
        (lambda content: content[:-1], "cut short"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
        (lambda content: b"{}", "is not a safetensors file"),
    ],
    ids=["empty", "short", "flipped", "foreign"],
)
def test_damaged_ledgers(corrupt, message, trained, tiny_opt, tmp_path, capsys):
    path = tmp_path / "x"
    path.write_bytes(corrupt((trained[0] / "ledger.safetensors").read_bytes()))
    command = ["replay", "--base", tiny_opt, "--ledger", path, "--out", tmp_path / "out"]
    assert message in refused(command, capsys)


def test_a_model_in_place_of_the_ledger(trained, tiny_opt, tmp_path, capsys):
    command = ["replay", "--base", tiny_opt, "--ledger", tiny_opt / "model.safetensors", "--out", tmp_path / "out"]
    assert "is a safetensors file of something else" in refused(command, capsys)


def test_other_mistakes(trained, tiny_opt, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--out" in refused(arguments(trained, tiny_opt, tiny_opt, "--overwrite", "true"), capsys)
    assert "cannot load" in refused(arguments(trained, tmp_path / "no", out), capsys)
    assert "steps must be between 0 and the 60 steps" in refused(arguments(trained, tiny_opt, out, "--steps", "61"), capsys)
    command = ["replay", "--base", tiny_opt, "--ledger", tmp_path / "no", "--out", out]
    assert "does not exist" in refused(command, capsys)


def test_the_file_holds_what_the_documentation_says(trained):
    path = trained[0] / "ledger.safetensors"
    with safe_open(path, "pt") as file:
        (text,) = file.metadata().values()
    kinds = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert kinds == {"flags": torch.uint8, "rates": torch.float64, "signs": torch.int8}
    content = json.loads(text)
    assert (content["version"], content["steps"], content["directions"]) == (1, 60, "low_rank(rank=1, interval=50)")
    assert pack(read(path))[1] == text
