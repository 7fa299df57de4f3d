"""ZO Fine-tuner's networks against torch's own modules, their files, and what they are fed with."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.optim.reference import bits, same_bits
from zo_lightning.optim import LearnedScales, ScaleNetworks
from zo_lightning.optim.randomness import stable_seed
from zo_lightning.optim.sampling import scale_recursion
from zo_lightning.optim.sampling.scale_networks import plain_name
from zo_lightning.optim.sampling.scale_recursion import moments, normaliser, weights_of


def sequential(networks: ScaleNetworks, index: int) -> nn.Sequential:
    """One network as the released code has it."""
    net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    with torch.no_grad():
        for parameter, key in zip(net.parameters(), ("w1", "b1", "w2", "b2"), strict=True):
            parameter.copy_(getattr(networks, key)[index].double().reshape(parameter.shape))
    return net


def names_of(net) -> list[str]:
    return [name for name, _ in net.named_parameters()]


# ---- the networks --------------------------------------------------------------------------------------------------------
def test_networks_begin_as_torchs_do():
    networks = ScaleNetworks(["model.a.weight", "b"], seed=7)
    for index, plain in enumerate(["a.weight", "b"]):
        torch.manual_seed(stable_seed(7, plain, "scale networks"))
        expected = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
        for ours, theirs in zip(sequential(networks, index).parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.float(), theirs.detach(), rtol=1e-6, atol=0)


def test_networks_are_functions_of_seed_and_plain_name():
    one, two = ScaleNetworks(["a", "b"], seed=1), ScaleNetworks(["base_model.model.model.b", "c"], seed=1)
    assert torch.equal(one.w1[1], two.w1[0])
    assert not torch.equal(one.w1[0], one.w1[1])
    assert not torch.equal(one.w1, ScaleNetworks(["a", "b"], seed=2).w1)
    state = torch.get_rng_state()
    ScaleNetworks(["a"])
    assert torch.equal(torch.get_rng_state(), state)


def test_all_networks_at_once():
    networks = ScaleNetworks([f"p{i}" for i in range(7)]).double()
    s = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.cat([sequential(networks, i)(s[i]).abs() for i in range(7)])
    torch.testing.assert_close(networks(s), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_files(dtype, tmp_path):
    networks = ScaleNetworks(["a.weight", "β"], seed=3).to(dtype)
    path = tmp_path / "folder" / "x.safetensors"
    networks.save(path)
    loaded = ScaleNetworks.load(path)
    assert loaded.names == networks.names
    assert same_bits(bits(loaded), bits(networks))
    assert loaded.fingerprint() == networks.fingerprint() != ScaleNetworks(["a.weight", "β"], seed=4).to(dtype).fingerprint()
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first  # equal networks are equal files
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]


def tensors(count=1, **changes) -> dict[str, torch.Tensor]:
    shapes = {"w1": (count, 64, 5), "b1": (count, 64), "w2": (count, 64), "b2": (count,)}
    return {**{key: torch.zeros(shape) for key, shape in shapes.items()}, **changes}


def head(version=1, names=("a",)) -> dict[str, str]:
    return {"zo_lightning.scale_networks": json.dumps({"version": version, "names": names})}


FOREIGN = {
    "another file": (tensors(), None, "but not of scale networks"),
    "another kind": (tensors(), {"format": "pt"}, "but not of scale networks"),
    "newer": (tensors(), head(version=2), "of format version 2, and this release reads version 1"),
    "no names": (tensors(), {"zo_lightning.scale_networks": '{"version": 1}'}, "damaged: 'names'"),
    "no json": (tensors(), {"zo_lightning.scale_networks": "{"}, "damaged"),
    "odd names": (tensors(), head(names=[1]), "no list of texts"),
    "equal names": (tensors(2), head(names=["a", "a"]), "two scale networks have the name 'a'"),
    "more names": (tensors(), head(names=["a", "b"]), r"w1 of shape \(2, 64, 5\), found \(1, 64, 5\)"),
    "other shape": (tensors(b2=torch.zeros(1, 1)), head(), r"b2 of shape \(1,\), found \(1, 1\)"),
    "missing": ({"w1": torch.zeros(1, 64, 5)}, head(), "b1 of shape .*, found nothing"),
    "integers": (tensors(b2=torch.zeros(1, dtype=torch.int64)), head(), "one floating-point dtype"),
    "nan": (tensors(w2=torch.full((1, 64), torch.nan)), head(), "w2 hold NaN"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_refused(case, tmp_path):
    content, metadata, message = FOREIGN[case]
    save_file(content, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        ScaleNetworks.load(tmp_path / "x.safetensors")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    ScaleNetworks(["a"]).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    for case in (path, tmp_path / "x.pth"):
        torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"damaged one .* zo-lightning convert-finetuner"):
            LearnedScales(case)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        LearnedScales(str(tmp_path / "none.safetensors"))


# ---- inputs and normaliser -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments(dtype, monkeypatch):
    monkeypatch.setattr(scale_recursion, "_CHUNK", 100)
    source = torch.Generator().manual_seed(0)
    shapes = [(30, 7), (256,), (), (1,), (4, 5, 6), (0, 3)]
    xs = [(3 + 0.01 * torch.randn(shape, generator=source)).to(dtype) for shape in shapes]
    xs.append(torch.randn(10, 50, generator=source).to(dtype).T)  # not contiguous
    found = moments(xs)
    for x, (mean, variance) in zip(xs, found, strict=True):
        reference = x.double().numpy()
        assert mean == pytest.approx(reference.mean() if reference.size else 0, rel=3e-7, abs=1e-9)
        # near a mean of 3 float32 holds 1e-4 of variance to about 1e-7 · 3 · 0.01
        assert variance == pytest.approx(reference.var(ddof=1) if reference.size > 1 else 0, rel=1e-3, abs=1e-12)
    assert moments([torch.ones(999)]) == [(1.0, 0.0)]


def test_moments_synchronise_once(monkeypatch):
    calls = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: calls.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a synchronisation for one tensor"))
    moments([torch.randn(5, 5) for _ in range(20)])
    assert len(calls) == 1


def test_normaliser():
    weights, sigma = [10.0, 2.0, 300.0], [0.5, 2.0, 0.01]
    n = normaliser(weights, sigma)
    assert n**2 * sum(w * s**2 for w, s in zip(weights, sigma, strict=True)) == pytest.approx(sum(weights), rel=1e-14)
    assert normaliser(weights, [1.0] * 3) == 1.0
    for odd in ([0.0] * 3, [math.nan, 1, 1], [math.inf, 1, 1]):
        with pytest.raises(ValueError, match="cannot be normalised"):
            normaliser(weights, odd)


def test_weights():
    table, vector = torch.zeros(100, 8), torch.zeros(8)
    names = ["model.embed_tokens.weight", "transformer.wte.weight", "layers.0.fc1.weight", "embed_norm.bias"]
    xs = [table, table, table, vector]
    assert weights_of(names, xs) == [800, 800, 800, 8]
    assert weights_of(names, xs, 15) == [120, 120, 800, 8]
    assert weights_of(names, xs, 240) == [800, 800, 800, 8]  # no more than there are


# ---- names ---------------------------------------------------------------------------------------------------------------
def test_names_inside_wrappers(tiny_opt):
    from peft import get_peft_model
    from peft.mapping import get_peft_config
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_opt)
    published = names_of(base)  # the keys of the published files
    assert "model.decoder.embed_tokens.weight" in published
    assert "lm_head.weight" not in published  # tied
    networks = ScaleNetworks(published)
    expected = list(range(len(published)))
    assert networks.matching(published) == expected
    assert networks.matching([f"model.{name}" for name in published]) == expected  # of this package's module
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj", "fc1"],
        "modules_to_save": ["fc2"],
        "task_type": "CAUSAL_LM",
    }
    wrapped = get_peft_model(base, get_peft_config(config))
    found = dict(zip(names_of(wrapped), networks.matching(names_of(wrapped)), strict=True))
    adapters = {name for name in found if "lora_" in name}
    assert adapters
    assert all(found[name] is None for name in adapters)
    # fc2 is there twice, as it was and as it is trained
    assert {index for index in found.values() if index is not None} == set(expected)
    assert len({plain_name(name) for name in adapters}) == len(adapters)


def test_two_that_differ_in_their_wrappers_only():
    networks = ScaleNetworks(["a", "model.a", "b"])
    assert networks.matching(["a", "model.a", "module.a", "model.b"]) == [0, 1, None, 2]
