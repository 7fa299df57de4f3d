"""The ledger's format, and replays of plain PyTorch runs: bit for bit, without a forward."""

import copy
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from tests.optim.zoo import IDS, Mixed, TiedHead
from zo_lightning.ledger import LedgerError, Record, read, replay, under_ledger_names, weights_hash, write
from zo_lightning.ledger.file import pack, unpack
from zo_lightning.optim import Gaussian, LowRank, ParameterFree, ZerothOrder

KEY = "zo_lightning.ledger"
INTERVAL = 4
WARNING = "the last bits of the weights may differ"
STEPS = 11  # two whole intervals, and one that is broken off


def net(dtype=torch.float32) -> Mixed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed().to(dtype)


class Blind(Mixed):
    def forward(self, ids):
        raise AssertionError("a replay needs no forward")


def blind(module: nn.Module) -> nn.Module:
    """The same weights in a module that cannot be evaluated."""
    module = copy.deepcopy(module)
    module.__class__ = Blind
    return module


def recorded(module, optimizer, steps=STEPS, bad=(), folds=(), parts=1, between=None) -> Record:
    """Train, and keep the ledger.

    Args:
        module: The model.
        optimizer: Its optimizer.
        steps: Number of steps.
        bad: Steps whose loss is NaN.
        folds: Steps after which the update is written.
        parts: Parts of a batch.
        between: Called with the module after each step.
    """
    record = Record.begin(optimizer, module)
    for step in range(steps):
        rows = IDS.roll(step, dims=0).chunk(parts)
        losses = [lambda ids=ids, step=step: module(ids) * (torch.nan if step in bad else 1.0) for ids in rows]
        for part in losses[:-1]:
            optimizer.accumulate(part)
        optimizer.step(losses[-1])
        record.add(optimizer)
        if step in folds:
            optimizer.fold()
        if between is not None:
            between(module)
    optimizer.detach()
    record.final = weights_hash(module, buffers=False)
    return record


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def make(module, **arguments) -> ZerothOrder:
    return ZerothOrder(module.named_parameters(), **{"lr": 0.05, "interval": INTERVAL, "seed": 3, **arguments})


def gradients(module) -> None:
    """What a validation with gradients does: the pending update is written."""
    with torch.enable_grad():
        module(IDS).sum()


CASES = {
    "default": {},
    "rank 2, sgd": {"rank": 2, "update": "sgd"},
    "momentum": {"momentum": 0.9},
    "several directions": {"num_directions": 3},
    "one-sided": {"sides": 1, "num_directions": 2},
    "weight decay": {"weight_decay": 0.1},
    "everything": {"momentum": 0.5, "weight_decay": 0.1, "num_directions": 2, "rank": 2, "update": "sgd"},
    "units": {"scaling": "output"},
    "row": {"geometry": {"matrix": "row", "vector": {"name": "spectral", "radius": 0.3}}},
    "euclidean": {"geometry": {"matrix": "euclidean"}, "momentum": 0.5},
    "gaussian sgd": {"directions": "gaussian", "update": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    "sphere": {"directions": "sphere", "update": "sgd"},
    "rademacher lmo": {"directions": "rademacher", "num_directions": 2},
}


@pytest.mark.filterwarnings("ignore:.*the update is skipped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attach", [True, False], ids=["attached", "in place"])
@pytest.mark.parametrize("case", CASES, ids=[name.replace(" ", "-") for name in CASES])
def test_a_replay_is_the_run_bit_for_bit(case, attach, dtype, tmp_path):
    """With skipped steps in the middle and at the end of an interval, and the update written at odd moments."""
    module = net(dtype)
    base = blind(module)
    optimizer = make(module, **CASES[case])
    record = recorded(module, optimizer.attach(module) if attach else optimizer, bad=(1, 3, 5), folds=(2, 4, 8))
    write(record, tmp_path / "x")
    assert replay(base, read(tmp_path / "x")) == record.final
    assert same(base, module)
    assert not same(base, net(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_schedules_parts_and_gradients_in_between(dtype, tmp_path):
    module = net(dtype)
    base = blind(module)
    optimizer = make(module, step_rule=ParameterFree(STEPS, schedule="constant")).attach(module)
    halves = [1.0 / (1 + index) for index in range(len(optimizer.param_groups))]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step, h=h: h**step for h in halves])
    record = recorded(module, optimizer, parts=2, between=lambda m: (gradients(m), scheduler.step()))
    write(record, tmp_path / "x")
    read_again = read(tmp_path / "x")
    assert len({tuple(rates) for rates in read_again.rates}) == STEPS
    assert len(set(read_again.rates[5])) == len(halves)  # a rate for each group
    replay(base, read_again)
    assert same(base, module)


def test_tied_weights_and_groups_of_ones_own():
    torch.manual_seed(0)
    module = TiedHead()
    base = copy.deepcopy(module)
    groups = [{"params": [pair], "weight_decay": 0.1 * i} for i, pair in enumerate(module.named_parameters())]
    optimizer = ZerothOrder(groups, lr=0.1, interval=INTERVAL, seed=0).attach(module)
    record = Record.begin(optimizer, module)
    for _ in range(6):
        optimizer.step(lambda: module(IDS).square().mean(dim=(1, 2)))
        record.add(optimizer)
    optimizer.detach()
    replay(base, record)
    assert same(base, module)
    assert base.head.weight is base.emb.weight


def test_the_first_steps_alone(tmp_path):
    """They are the weights of a checkpoint made then, rounding included, though the run itself wrote nothing at that moment."""
    module = net(torch.bfloat16)
    base = blind(module)
    kept = []
    snapshot = lambda m: kept.append({name: value.clone() for name, value in m.state_dict().items()})  # noqa: E731
    record = recorded(module, make(module).attach(module), between=snapshot)
    for steps in (0, 1, 6):
        part = copy.deepcopy(base)
        replay(part, record, steps=steps)
        expected = kept[steps - 1] if steps else net(torch.bfloat16).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in part.state_dict().items())
    with pytest.raises(LedgerError, match="between 0 and the 11 steps of the ledger, got 12"):
        replay(base, record, steps=12)


def test_progress_is_told_and_threads_are_put_back():
    module = net()
    base = blind(module)
    record = recorded(module, make(module).attach(module))
    record.environment["threads"] = "2"
    seen = []
    replay(base, record, progress=lambda step: seen.append((step, torch.get_num_threads())))
    assert seen == [(step + 1, 2) for step in range(STEPS)]
    assert torch.get_num_threads() == 1


def test_other_software_is_warned_of_and_its_result_compared():
    module = net()
    base = blind(module)
    record = recorded(module, make(module).attach(module))
    record.environment["torch"] = "1.13"
    with pytest.warns(UserWarning, match=r"torch 1\.13 in the run, .* here: the last bits of the weights may differ"):
        replay(copy.deepcopy(base), record)
    record.final = "0" * 64
    with (
        pytest.warns(UserWarning, match=WARNING),
        pytest.raises(LedgerError, match=r"the rebuilt weights have the sha256 .*torch 1\.13"),
    ):
        replay(copy.deepcopy(base), record)
    with pytest.warns(UserWarning, match=WARNING):
        replay(base, record, check=False)
    assert same(base, module)


def test_dense_directions_of_another_device_are_refused():
    module = net()
    base = blind(module)
    record = recorded(module, make(module, directions="gaussian").attach(module), steps=1)
    record.environment["device"] = "cuda"
    with pytest.raises(LedgerError, match="dense directions are drawn in another way here than in the run: device cuda in"):
        replay(base, record)


def test_weights_written_by_others_are_found_out():
    module = net()
    base = blind(module)
    record = recorded(module, make(module).attach(module), between=lambda m: m.head.bias.data.mul_(0.5))
    with pytest.raises(LedgerError, match="written by something other than the optimizer's steps"):
        replay(base, record)


# ---- another model ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run() -> Record:
    module = net()
    return recorded(module, make(module).attach(module))


def test_one_other_weight_is_refused(run):
    base = blind(net())
    with torch.no_grad():
        base.norm.bias[1] = -0.0  # equal to 0.0, and not the same bits
    with pytest.raises(LedgerError, match=f"the base model is another one: .*, those that the run began with {run.base}"):
        replay(base, run)
    assert torch.equal(base.emb.weight, net().emb.weight)


def test_another_architecture_is_refused(run):
    with pytest.raises(LedgerError, match=r"another architecture: the model has no parameter 'emb\.weight'"):
        replay(nn.Linear(2, 2), run)
    with pytest.raises(LedgerError, match=r"'emb\.weight' is bfloat16 of shape \[5, 4\], in the ledger float32"):
        replay(net(torch.bfloat16), run)
    wider = blind(net())
    wider.head = nn.Linear(5, 3)
    with pytest.raises(
        LedgerError, match=r"'head\.weight' is float32 of shape \[3, 5\], in the ledger float32 of shape \[3, 4\]"
    ):
        replay(wider, run)


@pytest.mark.parametrize("prefix", ["", "model", "model.inner"])
def test_a_bare_model_under_the_runs_names(prefix):
    whole = nn.Module()
    inner = whole
    for part in filter(None, prefix.split(".")):
        inner.add_module(part, nn.Module())
        inner = getattr(inner, part)
    inner.add_module("net", net())
    bare = nn.Module()
    bare.add_module("net", blind(net()))
    record = Record.begin(make(whole), whole)
    assert weights_hash(under_ledger_names(bare, record)) == record.base
    with pytest.raises(
        LedgerError, match=r"another architecture: it has a parameter '.*net\.emb\.weight', the model has 'bias'"
    ):
        under_ledger_names(nn.Linear(2, 2), record)


def test_the_hash_is_of_names_dtypes_shapes_bits_and_persistent_buffers():
    a, b, c = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3)
    for module in (a, b, c):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    c.weight.requires_grad_(False)
    assert weights_hash(a) == weights_hash(c) != weights_hash(b)
    assert weights_hash(a) != weights_hash(copy.deepcopy(a).bfloat16())
    a.register_buffer("count", torch.zeros(()))
    a.register_buffer("passing", torch.zeros(()), persistent=False)
    assert weights_hash(a) != weights_hash(c) == weights_hash(a, buffers=False)
    before = weights_hash(a)
    a.passing.add_(1)
    assert weights_hash(a) == before
    a.count.add_(1)
    assert weights_hash(a) != before


# ---- what no ledger can hold --------------------------------------------------------------------------------------------
def test_runs_that_cannot_be_replayed_are_refused():
    class Mine(Gaussian):
        """Directions of one's own by a name that exists."""

    module = net()
    optimizer = make(module)
    optimizer.step(lambda: module(IDS))
    with pytest.raises(LedgerError, match="has taken 1 steps that are in no ledger"):
        Record.begin(optimizer, module)
    with pytest.raises(LedgerError, match="cannot make the directions 'gaussian'"):
        Record.begin(make(module, directions=Mine()), module)
    with pytest.raises(LedgerError, match=r"knows a parameter as 'parameter\.0' that the module has as 'emb\.weight'"):
        Record.begin(ZerothOrder(module.parameters()), module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.param_groups[0].update(seed=4), "seed changed from 3 to 4 at step 2"),
        (
            lambda o: o.param_groups[1].update(momentum=0.5),
            r"momentum of parameter group 1 changed from 0\.0 to 0\.5 at step 2",
        ),
        (lambda o: o.param_groups[0].update(radius=2.0), "radius of parameter group 0"),
        (lambda o: o.param_groups[0].update(num_directions=2), "step 2 has 2 directions, the ones before had 1"),
    ],
)
def test_settings_that_change_are_refused(change, message):
    module = net()
    optimizer = make(module)
    record = recorded(module, optimizer, steps=2)
    change(optimizer)
    optimizer.step(lambda: module(IDS))
    with pytest.raises(LedgerError, match=message):
        record.add(optimizer)


def test_a_missed_step_is_refused():
    module = net()
    optimizer = make(module)
    record = recorded(module, optimizer, steps=2)
    for _ in range(2):
        optimizer.step(lambda: module(IDS))
    with pytest.raises(LedgerError, match="ends after 2 steps and the optimizer has taken 4: one was missed"):
        record.add(optimizer)


# ---- the format ---------------------------------------------------------------------------------------------------------
SIZES = st.floats(width=64, allow_nan=False, allow_infinity=False)


@st.composite
def records(draw) -> Record:
    groups, directions, steps = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 9))
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=groups, max_size=groups, unique=True))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    return Record(
        base="0" * 64,
        buffers="1" * 64,
        seed=draw(st.integers(-(2**63), 2**64)),
        directions="gaussian",
        update=draw(st.sampled_from(["lmo", "sgd"])),
        attached=draw(st.booleans()),
        groups=[
            {
                "geometry": "sign",
                "radius": 0.1,
                "transposed": False,
                "momentum": momentum,
                "weight_decay": 0.0,
                "units": draw(st.none() | st.lists(SIZES, min_size=1, max_size=1)),
                "parameters": [[name, "float32", draw(st.lists(st.integers(0, 5), max_size=3))]],
            }
            for name in names
        ],
        environment={"torch": "2.6", "threads": "1"},
        final=draw(st.none() | st.just("2" * 64)),
        rates=draw(st.lists(st.lists(SIZES, min_size=groups, max_size=groups), min_size=steps, max_size=steps)),
        slopes=draw(st.lists(st.lists(SIZES, min_size=directions, max_size=directions), min_size=steps, max_size=steps)),
        flags=draw(st.lists(st.integers(0, 7), min_size=steps, max_size=steps)),
    )


@given(records())
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_what_is_read(record):
    tensors, text = pack(record)
    again = unpack(load(save(tensors)), text)
    if record.signs_suffice:
        record.slopes = [[float((slope > 0) - (slope < 0))] for (slope,) in record.slopes]
    assert again == record
    assert repr(again.rates) == repr(record.rates)  # -0.0 too
    assert pack(again)[1] == text


@pytest.fixture(scope="module")
def content(run, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("ledger") / "x"
    write(run, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["x"]
    return path.read_bytes()


def forged(content: bytes, tensors=None, text=None, **fields) -> bytes:
    """A file with other tensors or another text, which safetensors finds in order."""
    told = json.loads(json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"][KEY])
    text = json.dumps({**told, **fields}, separators=(",", ":")) if text is None else text
    return save(load(content) if tensors is None else tensors(load(content)), metadata={KEY: text})


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def header(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


CORRUPTIONS = {
    "empty": (lambda c: b"", "is empty"),
    "cut short in the tensors": (lambda c: c[:-5], "damaged, or cut short"),
    "cut short in the header": (lambda c: c[:100], "damaged, or cut short"),
    "longer": (lambda c: c + b"\0", "damaged, or cut short"),
    "not safetensors": (lambda c: b"PK\x03\x04" + c, "is not a safetensors file"),
    "a flipped bit in the tensors": (lambda c: flipped(c, header(c) + 3), "is damaged: its content has the sha256"),
    "a flipped bit in the last byte": (lambda c: flipped(c, len(c) - 1), "is damaged: its content has the sha256"),
    "a flipped bit in a name": (lambda c: flipped(c, c.index(b"emb.weight")), "is damaged: its content has the sha256"),
    "a flipped bit in the header's length": (lambda c: flipped(c, 1), "damaged, or cut short"),
    "a safetensors file of something else": (
        lambda c: save({"weight": torch.zeros(2)}),
        "of something else: its header has no",
    ),
    "another format": (lambda c: forged(c, format="list"), "is no ledger of zo-lightning: its format is 'list'"),
    "a newer version": (lambda c: forged(c, version=2), "has version 2 of the format, this zo-lightning reads 1"),
    "a text that is no JSON": (lambda c: forged(c, text="{"), "is damaged"),
    "a text with spaces": (lambda c: forged(c, text='{"format": "zo-lightning ledger", "version": 1}'), "its text is not as"),
    "another seed": (lambda c: forged(c, seed=4), "is damaged: its content has the sha256"),
    "another base": (lambda c: forged(c, base="0" * 64), "is damaged: its content has the sha256"),
    "other final weights": (lambda c: forged(c, final=None), "is damaged: its content has the sha256"),
    "no rates": (lambda c: forged(c, lambda t: {k: v for k, v in t.items() if k != "rates"}), "lacks the tensor 'rates'"),
    "no signs": (lambda c: forged(c, lambda t: {k: v for k, v in t.items() if k != "signs"}), "lacks the tensor 'signs'"),
    "a tensor too many": (lambda c: forged(c, lambda t: {**t, "x": t["flags"].clone()}), "has a tensor 'x' that no ledger has"),
    "a step missing": (lambda c: forged(c, lambda t: {k: v[1:] for k, v in t.items()}), "is of 11 steps, and its"),
    "a step missing, counted": (
        lambda c: forged(c, lambda t: {k: torch.cat([v[:4], v[5:]]) for k, v in t.items()}, steps=STEPS - 1),
        "is damaged: its content has the sha256",
    ),
    "steps in another order": (
        lambda c: forged(c, lambda t: {k: v.flip(0) for k, v in t.items()}),
        "is damaged: its content has the sha256",
    ),
    "another dtype": (lambda c: forged(c, lambda t: {**t, "rates": t["rates"].float()}), r"'rates' is torch\.float32"),
}


def test_the_untouched_file_is_read(content, run, tmp_path):
    (tmp_path / "x").write_bytes(forged(content))
    assert pack(read(tmp_path / "x"))[1] == pack(run)[1]


@pytest.mark.parametrize("name", CORRUPTIONS, ids=[name.replace(" ", "-") for name in CORRUPTIONS])
def test_a_damaged_or_foreign_file_is_refused(name, content, tmp_path):
    corrupt, message = CORRUPTIONS[name]
    path = tmp_path / "x"
    path.write_bytes(corrupt(content))
    with pytest.raises(LedgerError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no' does not exist"):
        read(tmp_path / "no")


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_no_flipped_bit_makes_another_ledger(content, run, tmp_path_factory, data):
    """It is refused, or (white space) means nothing."""
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
    try:
        record = read(path)
    except LedgerError:
        return
    assert pack(record)[1] == pack(run)[1]


def test_a_crash_while_writing_leaves_the_old_file(content, run, tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(content)
    monkeypatch.setattr("zo_lightning.ledger.file.os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write(run, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_directions_are_known_by_their_signature():
    from zo_lightning.ledger.record import directions_of

    made = directions_of(LowRank(3, 7).signature())
    assert (made.rank, made.interval) == (3, 7)
    for odd in ("low_rank(rank=1)", "low_rank(rank=1, depth=2)", "gaussian(rank=1)", "jaguar", "low_rank(rank=1, interval=9) "):
        with pytest.raises(LedgerError, match="cannot make the directions"):
            directions_of(odd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_written_between_two_parts_of_a_batch_is_replayed(dtype):
    """The moments at which it is written decide the last bits."""
    module = net(dtype)
    base, optimizer = copy.deepcopy(module), make(module).attach(module)
    record = Record.begin(optimizer, module)
    for step in range(3):
        first, second = IDS.roll(step, dims=0).chunk(2)
        optimizer.accumulate(lambda ids=first: module(ids))
        if step == 2:
            optimizer.fold()
        optimizer.step(lambda ids=second: module(ids))
        record.add(optimizer)
    optimizer.detach()
    replayed = blind(base)
    replay(replayed, record)
    assert same(module, replayed)
