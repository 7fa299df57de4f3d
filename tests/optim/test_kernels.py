"""Triton kernels: the direction is Philox and Box-Muller as published, the same wherever it is drawn, and rounded without bias.

Whether Triton interprets or compiles is settled when it is first imported, so both ways run in processes of their own, which
leave their results to the tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import struct
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.optim.test_rounding import HALF, VALUES, neighbours
from zo_lightning.optim import kernels

ROOT = Path(__file__).parents[2]
KINDS = ["gaussian", "rademacher"]
DTYPES = [torch.float32, *HALF]
SIZES = [1, 3, 5, 1023, 4097]
SEED = 0x1234_5678_9ABC_DEF1
N = 1 << 16
WIDE = 1 << 14  # a block
TINY = [1e-9, -2.9e-8]  # below half of float16's smallest number
FAR = 2**29 + 5  # a program of 64 elements beyond 2^35: both words of the counter are in use

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not kernels._supported(torch.device("cuda")), reason="no GPU that Triton supports")


def philox(key: int, counter: np.ndarray, purpose: int = 0, more: int = 0) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011, section 3.3), shape (n, 4)."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter & mask, counter >> np.uint64(32), np.full_like(counter, purpose), np.full_like(counter, more)]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [q >> np.uint64(32) ^ c[1] ^ np.uint64(k[0]), q & mask, p >> np.uint64(32) ^ c[3] ^ np.uint64(k[1]), p & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1)


def direction(kind: str, n: int, seed: int = SEED, first: int = 0) -> np.ndarray:
    """Elements ``first`` to ``first + n`` of z in float64; ``first`` is a multiple of 4."""
    x = philox(seed, np.arange(first // 4, first // 4 + -(-n // 4), dtype=np.uint64))
    if kind == "rademacher":
        return np.where(x < 2**31, 1.0, -1.0).reshape(-1)[:n]
    r = np.sqrt(-2 * np.log(np.float32(x[:, ::2]) / 2.0**32 + 2.0**-33))
    angle = 2 * np.pi * x[:, 1::2] / 2.0**32
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=-1).reshape(-1)[:n]


def in_process(function: str, folder: Path, **environment: str) -> Any:
    """What a function of this module saves, in a fresh process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    program = f"from tests.optim.test_kernels import {function}; {function}({str(folder / function)!r})"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / function, weights_only=True)


def draw(path: str) -> None:
    """Run the kernels; Triton's interpreter is on."""
    cpu = torch.device("cpu")
    drawn: dict[Any, Any] = {"available": kernels.available(cpu)}

    def filled(n: int, kind: str, seed: int = SEED, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return kernels.fill(torch.full((n,), 7.0, dtype=dtype), seed, kind)

    def updated(weight: torch.Tensor, factor: float, decay: float, kind: str, rounding_seed: int = 5, seed: int = SEED) -> Any:
        weight = weight.clone()
        assert kernels.update_(weight, seed, factor, decay, kind, rounding_seed) is None
        return weight

    for block in (64, kernels._BLOCK, WIDE):
        kernels._BLOCK = block
        drawn["block", block] = [
            filled(4097, "gaussian"),
            updated(torch.linspace(-3, 3, 4097).half(), -0.37, 0.99, "gaussian"),
        ]
        for kind, n in product(KINDS, SIZES if block != 64 else ()):
            around = torch.full((n + 8,), 7.0)
            kernels.fill(around[4 : n + 4], SEED, kind)
            kernels.update_(around[4 : n + 4], SEED, 1.0, 1.0, kind, 0)
            drawn["size", block, kind, n] = around
    # wide from here on: the interpreter's time goes by programs, not by elements
    for kind in KINDS:
        drawn["fill", kind] = filled(N, kind)
        drawn["again", kind] = filled(N, kind)
        drawn["next seed", kind] = filled(N, kind, SEED + 1)
        drawn["high bits", kind] = filled(N, kind, SEED ^ (1 << 62))
        for seed in (0, 2**31, 2**63 - 1):
            drawn["seed", kind, seed] = filled(64, kind, seed)
        for dtype in DTYPES:
            zeros = torch.zeros(17, 241, dtype=dtype)  # 4097 elements
            drawn["same", kind, dtype] = [
                filled(4097, kind, dtype=dtype).view(17, 241),
                kernels.displace(zeros, SEED, 1.0, kind),
                updated(zeros, 1.0, 1.0, kind),
            ]
            weight = torch.linspace(-3, 3, 4097).to(dtype)
            drawn["displaced", kind, dtype] = kernels.displace(weight, SEED, 1e-2, kind)
            drawn["updated", kind, dtype] = updated(weight, -0.37, 0.99, kind)
            drawn["value", kind, dtype] = updated(weight.float(), -0.37, 0.99, kind)

    for dtype in HALF:
        for value in VALUES + TINY:
            drawn["rounded", dtype, value] = updated(torch.zeros(N // 4, dtype=dtype), value, 1.0, "rademacher", SEED)
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)  # each of the 65,536 patterns
        drawn["every", dtype] = [every, updated(every, 0.0, 1.0, "gaussian")]
        weight = torch.full((4096,), 0.3, dtype=dtype)
        drawn["rounding seeds", dtype] = [updated(weight, 1e-4, 1.0, "gaussian", seed) for seed in (1, 1, 2)]
        # a GPU's NaN is 0x7FFFFFFF, which random bits would carry over into -0
        drawn["nan", dtype] = updated(weight, struct.unpack("<d", b"\xff" * 7 + b"\x7f")[0], 1.0, "gaussian")
    for dtype in DTYPES:
        special = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=dtype)
        drawn["special", dtype] = [
            kernels.displace(special, SEED, 1.0, "rademacher"),
            updated(special, 1.0, 0.5, "rademacher"),
        ]

    parameter = torch.nn.Parameter(torch.zeros(8))
    version = parameter._version
    moved = kernels.displace(parameter, SEED, 1.0, "gaussian")
    kernels.update_(parameter, SEED, 1.0, 1.0, "gaussian", 0)
    drawn["autograd"] = [moved.requires_grad, parameter.requires_grad, parameter._version > version]
    drawn["empty"] = [filled(0, "gaussian"), kernels.displace(torch.zeros(0, 3), SEED, 1.0, "gaussian")]
    out = torch.zeros(4)
    drawn["out"] = kernels.fill(out, SEED, "gaussian") is out

    global tl  # where _far looks for it
    import triton
    import triton.language as tl

    drawn["far"] = torch.zeros(64)
    triton.jit(_far)[(1,)](drawn["far"], SEED, FAR, BLOCK=64)
    torch.save(drawn, path)


def _far(out, seed, program, BLOCK: tl.constexpr):
    z = kernels._draw(seed, program.to(tl.int64), True, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), z)


def compile_for_sm_90(path: str) -> None:
    """Compile the kernels for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    scalars = {"seed": "i64", "rounding_seed": "i64", "tau": "fp32", "factor": "fp32", "decay": "fp32", "n": "i32"}
    compiled: dict[Any, Any] = {}
    for name in ("fill", "displace", "update"):
        kernel = getattr(kernels._load(), name)
        for dtype in DTYPES:
            types = scalars | {"weight": f"*{names[dtype]}", "out": f"*{names[dtype]}"}
            signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in ("weight", "out", "n")}
            for kind in KINDS if dtype is torch.bfloat16 else KINDS[:1]:
                constants = {"GAUSSIAN": kind == "gaussian", "BLOCK": kernels._BLOCK}
                try:
                    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
                except TypeError as error:
                    torch.save({"reason": f"Triton {triton.__version__} has another ASTSource: {error}"}, path)
                    return
                result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels._OPTIONS)
                compiled[name, dtype, kind] = [result.asm["ptx"], len(result.asm.get("cubin", b""))]
    torch.save(compiled, path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return in_process("draw", tmp_path_factory.mktemp("kernels"), TRITON_INTERPRET="1")


# the reference


def test_reference_has_the_published_answers():
    """The vectors that Random123 ships with (tests/kat_vectors)."""
    zero = philox(0, np.zeros(1, np.uint64))
    ones = philox(2**64 - 1, np.full(1, 2**64 - 1, np.uint64), 2**32 - 1, 2**32 - 1)
    assert [f"{x:08x}" for x in zero[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{x:08x}" for x in ones[0]] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


# the direction


@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_that_of_the_reference(drawn, kind):
    np.testing.assert_allclose(drawn["fill", kind], direction(kind, N), rtol=0, atol=3e-6)
    for seed in (0, 2**31, 2**63 - 1):
        np.testing.assert_allclose(drawn["seed", kind, seed], direction(kind, 64, seed), rtol=0, atol=3e-6)


def test_direction_is_right_beyond_32_bits(drawn):
    np.testing.assert_allclose(drawn["far"], direction("gaussian", 64, first=FAR * 64), rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_same_again_and_another_with_another_seed(drawn, kind):
    z = drawn["fill", kind].double()
    assert torch.equal(drawn["again", kind].double(), z)
    for other in ("next seed", "high bits"):
        assert abs(torch.corrcoef(torch.stack([z, drawn[other, kind].double()]))[0, 1]) < 4 / math.sqrt(N)
    for lag in range(1, 9):  # past the four words of one counter
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / math.sqrt(N)
        assert abs((z[lag:] ** 2 * z[:-lag] ** 2).mean() - 1) < 4 * 3 / math.sqrt(N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_three_draw_the_same(drawn, kind, dtype):
    filled, displaced, updated = drawn["same", kind, dtype]
    assert filled.dtype is displaced.dtype is updated.dtype is dtype
    assert filled.shape == displaced.shape == updated.shape == (17, 241)
    assert torch.equal(filled, displaced)
    z = drawn["fill", kind][:4097].view(17, 241)
    spacing = torch.finfo(dtype).eps * z.abs().clamp(min=2.0**-14)
    assert ((updated.float() - z).abs() <= spacing).all()  # stochastic: either neighbour
    if dtype is torch.bfloat16:  # Triton 3.9's interpreter truncates; test_compiles_for_sm_90 looks at the GPU's instruction
        assert ((filled.float() - z).abs() <= spacing).all()
    else:
        assert torch.equal(filled, z.to(dtype))
    if dtype is torch.float32:
        assert torch.equal(updated, z)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [kernels._BLOCK, WIDE])
def test_any_size_and_nothing_beyond(drawn, block, kind, n):
    around = drawn["size", block, kind, n]
    assert torch.equal(around[4 : n + 4], 2 * drawn["fill", kind][:n])
    assert (around[:4] == 7).all()
    assert (around[n + 4 :] == 7).all()


def test_block_size_changes_nothing(drawn):
    for block in (64, kernels._BLOCK, WIDE):
        filled, updated = drawn["block", block]
        assert torch.equal(filled, drawn["fill", "gaussian"][:4097])
        assert torch.equal(updated, drawn["updated", "gaussian", torch.float16])


def test_gaussian_is_standard_normal(drawn):
    z = drawn["fill", "gaussian"].double().numpy()
    assert abs(z.mean()) < 4 / math.sqrt(N)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / N)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / N)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert stats.kstest(z, torch.randn(N, generator=torch.Generator().manual_seed(0)).double().numpy()).pvalue > 1e-3
    for lane in range(4):
        assert stats.kstest(z[lane::4], "norm").pvalue > 1e-3


def test_rademacher_is_balanced(drawn):
    z = drawn["fill", "rademacher"]
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) < 4 / math.sqrt(N)
    for lane in range(4):
        assert abs(z[lane::4].mean()) < 4 / math.sqrt(N / 4)


# the sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_displaces_and_updates_by_the_formula(drawn, kind, dtype):
    weight, z = torch.linspace(-3, 3, 4097).to(dtype).double().numpy(), direction(kind, 4097)
    displaced = drawn["displaced", kind, dtype]
    spacing = torch.finfo(dtype).eps * np.maximum(np.abs(weight + 1e-2 * z), 2.0**-14)
    half = 0.5 if dtype is torch.float16 else 1.0  # of the spacing: the interpreter truncates to bfloat16
    np.testing.assert_array_less(np.abs(displaced.double().numpy() - (weight + 1e-2 * z)), half * spacing + 1e-6)
    value, updated = drawn["value", kind, dtype], drawn["updated", kind, dtype]
    np.testing.assert_allclose(value, 0.99 * weight - 0.37 * z, rtol=0, atol=3e-6)
    if dtype is torch.float32:
        assert torch.equal(updated, value)
    else:
        below, above = neighbours(value.double().numpy(), dtype)
        rounded = updated.double().numpy()
        assert ((rounded == below) | (rounded == above)).all()
        assert (rounded == below).any()
        assert (rounded == above).any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value", VALUES + TINY)
def test_rounding_is_right_on_average(drawn, dtype, value):
    """The weight is 0, so the value is ± ``value``; one seed serves for signs and rounding, which must not be tied by it."""
    z = direction("rademacher", N // 4)
    rounded = drawn["rounded", dtype, value].double().numpy() * z
    exact = np.float64(np.float32(value))
    below, above = neighbours(exact, dtype)
    assert set(np.unique(rounded)) <= {below, above}
    p = (exact - below) / (above - below) if above > below else 0.0
    for sign in (-1, 1):
        part = rounded[z == sign]
        standard_error = (above - below) * np.sqrt(p * (1 - p) / part.size)
        assert abs(part.mean() - exact) <= 4 * standard_error + 1e-12 * abs(exact)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_representable_stays(drawn, dtype):
    every, after = drawn["every", dtype]
    if dtype is torch.bfloat16:  # Triton 3.9's interpreter reads numbers below 2^-126 as 0
        after = torch.where(every.abs() < 2.0**-126, every, after)
    assert torch.equal(torch.nan_to_num(after.float(), 7.0), torch.nan_to_num(every.float(), 7.0))
    assert torch.equal(torch.isnan(after), torch.isnan(every))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_stay(drawn, dtype):
    for result in drawn["special", dtype]:
        assert result[:2].tolist() == [math.inf, -math.inf]
        assert result[2].isnan()
        assert result[3].isfinite()
    assert dtype is torch.float32 or drawn["nan", dtype].isnan().all()


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_depends_on_its_seed_alone(drawn, dtype):
    first, again, other = drawn["rounding seeds", dtype]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# torch's side


def test_autograd_sees_a_write_and_records_nothing(drawn):
    moved_requires_grad, parameter_requires_grad, version_rose = drawn["autograd"]
    assert not moved_requires_grad
    assert parameter_requires_grad
    assert version_rose


def test_returns_what_it_wrote_also_if_empty(drawn):
    assert drawn["out"]
    assert [tensor.shape for tensor in drawn["empty"]] == [(0,), (0, 3)]


# errors: found before Triton is needed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 6).T}, r"weight is not contiguous \(shape \(6, 4\)"),
        ({"weight": torch.zeros(1).expand(8)}, "weight is not contiguous"),
        ({"weight": torch.zeros(4, dtype=torch.float64)}, "weight must be float32, bfloat16 or float16, not torch.float64"),
        ({"weight": torch.empty(2**42, dtype=torch.half, device="meta")}, "more than the .* pass it in parts"),
        ({"weight": torch.zeros(4, device="meta")}, "weight is on meta, where the kernels do not run"),
        ({"seed": -1}, r"^seed must be in \[0, 2\*\*63\), not -1"),
        ({"seed": 2**63}, r"^seed must be in"),
        ({"rounding_seed": 2**63}, "rounding_seed must be in"),
        ({"kind": "sphere"}, "kind must be 'gaussian' or 'rademacher', not 'sphere'"),
    ],
)
def test_wrong_arguments(change, message):
    good = {"weight": torch.zeros(4), "seed": 0, "factor": 1.0, "decay": 1.0, "kind": "gaussian", "rounding_seed": 0}
    with pytest.raises(ValueError, match=message):
        kernels.update_(**good | change)
    good = {"weight": torch.zeros(4), "seed": 0, "tau": 1.0, "kind": "gaussian"}
    if set(change) <= set(good):
        with pytest.raises(ValueError, match=message):
            kernels.displace(**good | change)


def test_fill_names_its_own_argument():
    with pytest.raises(ValueError, match=r"^out is not contiguous"):
        kernels.fill(torch.zeros(4, 6).T, 0, "gaussian")


def test_cpu_without_the_interpreter_is_not_available(drawn, monkeypatch):
    assert drawn["available"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.available(torch.device("cpu"))
    assert not kernels.available(torch.device("meta"))
    with pytest.raises(ValueError, match="out is on cpu, where the kernels do not run: they need Triton and a GPU"):
        kernels.fill(torch.zeros(4), 0, "gaussian")


def test_without_triton_nothing_is_available(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)  # what Python takes for: not to be imported
    monkeypatch.setattr(kernels, "_load", kernels._load.__wrapped__)
    assert not kernels.available(torch.device("cpu"))


# the compiler


@needs_triton
def test_compiles_for_sm_90(tmp_path):
    compiled = in_process("compile_for_sm_90", tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    if "reason" in compiled:
        pytest.skip(compiled["reason"])
    assert len(compiled) == 3 * (len(DTYPES) + 1)
    for (name, dtype, kind), (ptx, cubin) in compiled.items():
        assert ".target sm_90" in ptx
        assert cubin > 0
        assert "st.global.v4" in ptx
        assert not re.search(r"^\s*\.local\b", ptx, re.MULTILINE)  # z is in registers
        assert ("ld.global" in ptx) == (name != "fill")
        if dtype is not torch.float32 and (name, kind) != ("fill", "rademacher"):  # ±1 needs no rounding
            assert f"cvt.rn.{'bf16' if dtype is torch.bfloat16 else 'f16'}x2.f32" in ptx  # to nearest


# a GPU


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_draws_the_reference(kind, dtype):
    n = 4097
    z, zeros = torch.from_numpy(direction(kind, n)), torch.zeros(n, dtype=dtype, device="cuda")
    filled = kernels.fill(torch.empty_like(zeros), SEED, kind)
    atol, eps = 1e-5, torch.finfo(dtype).eps
    torch.testing.assert_close(filled.cpu().double(), z, rtol=eps / 2, atol=atol)
    assert torch.equal(kernels.displace(zeros, SEED, 1.0, kind), filled)
    kernels.update_(zeros, SEED, 1.0, 1.0, kind, 0)
    torch.testing.assert_close(zeros.cpu().double(), z, rtol=eps, atol=atol)


@needs_triton
@needs_gpu
def test_gpu_reaches_beyond_2_to_31_elements():
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("not enough GPU memory")
    out = kernels.fill(torch.zeros(n, dtype=torch.half, device="cuda"), SEED, "gaussian")
    for first in (0, 2**31 - 64, 2**31 + 4032):
        expected = direction("gaussian", 64, first=first)
        np.testing.assert_allclose(out[first : first + 64].cpu().double().numpy(), expected, rtol=1e-3, atol=1e-5)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
def test_gpu_rounding_is_right_on_average(dtype):
    n = 1 << 20
    signs = torch.from_numpy(direction("rademacher", n)).cuda()
    for value in VALUES + TINY:
        weight = torch.zeros(n, dtype=dtype, device="cuda")
        kernels.update_(weight, SEED, value, 1.0, "rademacher", SEED)
        exact = np.float64(np.float32(value))
        below, above = neighbours(exact, dtype)
        p = (exact - below) / (above - below) if above > below else 0.0
        error = abs((weight.double() * signs).mean().item() - exact)
        assert error <= 4 * (above - below) * np.sqrt(p * (1 - p) / n) + 1e-12 * abs(exact)
