"""zo-lightning convert-finetuner: published pickles become this package's file, and others are refused in one line."""

import os
import pickle
import re

import pytest
import torch
from torch import nn

from zo_lightning.cli import main
from zo_lightning.optim import LearnedScales, ScaleNetworks

NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]


def network(hidden=64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def convert(source, out, *more) -> None:
    main(["convert-finetuner", "--source", str(source), "--out", str(out), *more])


def fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["convert-finetuner", *arguments])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("zo-lightning: error:")
    return line


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_files(dtype, tmp_path, capsys):
    """In the dtypes of the published ones; the networks give the same scales."""
    networks = {name: network().to(dtype) for name in NAMES}
    torch.save(networks, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert "the networks of 3 parameters" in capsys.readouterr().out
    loaded = ScaleNetworks.load(tmp_path / "x.safetensors")
    assert loaded.names == tuple(NAMES)
    assert loaded.w1.dtype == dtype
    s = torch.randn(3, 5, dtype=torch.float64)
    expected = [float(net.double()(row).detach().abs()) for net, row in zip(networks.values(), s, strict=True)]
    torch.testing.assert_close(loaded.double()(s), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    LearnedScales(str(tmp_path / "x.safetensors"))


def test_an_existing_file_stays(tmp_path, capsys):
    torch.save({"a": network()}, tmp_path / "x.pth")
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    arguments = ["--source", str(tmp_path / "x.pth"), "--out", str(out)]
    assert "exists" in fails(arguments, capsys)
    assert out.read_text() == "mine"
    main(["convert-finetuner", *arguments, "--overwrite", "true"])
    assert ScaleNetworks.load(out).names == ("a",)
    assert "must end in .safetensors" in fails([*arguments[:3], str(tmp_path / "x.pth")], capsys)


class Malicious:
    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def in_a_network(thing) -> nn.Sequential:
    net = network()
    net[0].extra = thing
    return net


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", ["value", "inside"])
@pytest.mark.parametrize("call", [(os.system,), (eval,), (__import__,)])
def test_malicious_pickles_are_refused(call, place, kind, tmp_path, capsys):
    """Nothing of them is run, whichever format they are in."""
    mark = tmp_path / "run"
    argument = f"touch {mark}" if call[0] is os.system else f"open({str(mark)!r}, 'w')" if call[0] is eval else "antigravity"
    thing = Malicious(call[0], (argument,))
    content = {"a": thing if place == "value" else in_a_network(thing)}
    path = tmp_path / "x.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    line = fails(["--source", str(path), "--out", str(tmp_path / "x.safetensors")], capsys)
    assert "is refused" in line
    assert "trust" not in line  # torch's own text recommends to
    assert not mark.exists()
    assert not (tmp_path / "x.safetensors").exists()
    assert nn.Linear not in torch.serialization.get_safe_globals()  # the list is for that one file


WRONG = {
    "hidden units": ({"a": network(32)}, r"'a' has a layer 0 with weight \(32, 5\), expected \(64, 5\)"),
    "a tensor": ({"a": torch.zeros(64, 5)}, r"'a' is not Sequential\(Linear\(5, 64\), Tanh\(\), Linear\(64, 1\)\)"),
    "no bias": ({"a": nn.Sequential(nn.Linear(5, 64, bias=False), nn.Tanh(), nn.Linear(64, 1))}, "with bias NoneType"),
    "two layers": ({"a": nn.Sequential(nn.Linear(5, 64), nn.Linear(64, 1))}, "'a' is not Sequential"),
    "another at the end": ({"a": network(), "b": nn.Linear(5, 64)}, "'b' is not Sequential"),
    "a number for a name": ({3: network()}, "3 is no parameter's name"),
    "a list": ([network()], "holds a list"),
    "nothing": ({}, "holds a dict, not networks"),
    "another layer": ({"a": nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1))}, "is refused: .*ReLU"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_contents_are_refused(case, tmp_path, capsys):
    content, message = WRONG[case]
    torch.save(content, tmp_path / "x.pth")
    line = fails(["--source", str(tmp_path / "x.pth"), "--out", str(tmp_path / "x.safetensors")], capsys)
    assert re.search(message, line), line


def test_values_that_are_not_numbers_are_refused(tmp_path, capsys):
    net = network()
    nn.init.constant_(net[2].weight, torch.nan)
    torch.save({"a": net}, tmp_path / "x.pth")
    assert "NaN" in fails(["--source", str(tmp_path / "x.pth"), "--out", str(tmp_path / "x.safetensors")], capsys)


def test_damaged_files_are_refused(tmp_path, capsys):
    torch.save({"a": network()}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no pickle at all", whole[:100]):
        (tmp_path / "x.pth").write_bytes(content)
        line = fails(["--source", str(tmp_path / "x.pth"), "--out", str(tmp_path / "x.safetensors")], capsys)
        assert "cannot be read" in line or "is refused" in line
    assert "there is no such file" in fails(["--source", "none.pth", "--out", "x.safetensors"], capsys)
