"""What an evaluation finds is what the first one found."""

import pytest
import torch
from torch import nn

from zo_lightning.optim.world import BufferChanges, World

BUFFERS = {
    "float": lambda: torch.randn(3, 2),
    "bool": lambda: torch.tensor([True, False]),
    "scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 4),
    "transposed": lambda: torch.randn(2, 3).T,
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "expanded scalar": lambda: torch.tensor(2.0).expand(2, 5),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.parametrize("make", BUFFERS.values(), ids=BUFFERS)
def test_buffers_come_back_in_the_same_object(make):
    module = nn.Module()
    module.register_buffer("state", make())
    module.register_buffer("nothing", None)
    buffer = module.state
    before = buffer.clone()
    world = World(module, [])
    if buffer.layout is torch.strided and buffer.numel() and not buffer.is_meta:
        part = buffer[tuple(slice(None) if stride else 0 for stride in buffer.stride())]
        part.copy_(~part if part.dtype is torch.bool else part + 1)
        assert not torch.equal(buffer, before)
    module.state = torch.zeros(1)  # a forward may put another in its place
    world.restore_buffers()
    assert module.state is buffer
    if not buffer.is_meta:
        assert torch.equal(buffer.to_dense(), before.to_dense())


def test_random_numbers_come_back():
    world = World(None, [])
    assert not world.moved()
    first = torch.rand(3)
    assert world.moved()
    world.rewind()
    assert torch.equal(torch.rand(3), first)
    world.rewind()
    with world.kept():
        torch.rand(5)
    assert torch.equal(torch.rand(3), first)


class Counting(nn.Module):
    """Buffers that a forward writes, replaces, and leaves alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("written", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("made", None)
        self.norm = nn.BatchNorm1d(2)
        self.instance = nn.InstanceNorm1d(2, track_running_stats=True)
        self.frozen = nn.BatchNorm1d(2).eval()

    def forward(self, x):
        self.written += 1
        self.replaced = self.replaced + 2
        self.made = torch.ones(1)
        self.instance(x.unsqueeze(2).expand(-1, -1, 3) * torch.arange(3))
        return self.norm(self.frozen(x))


def test_the_changes_of_one_evaluation_are_made_after_all():
    torch.manual_seed(0)
    module, once = Counting(), Counting()
    x = torch.randn(8, 2)
    once(x)
    world = World(module, [])
    changes = BufferChanges(module)
    module(x)
    changes.take()
    world.restore_buffers()
    module(x + 1)
    world.restore_buffers()
    changes.make(torch.tensor(torch.nan))
    assert torch.equal(module.written, torch.zeros(2))
    changes.make(torch.tensor(1.0))
    assert dict(module.named_buffers()).keys() == dict(once.named_buffers()).keys()
    for (name, ours), theirs in zip(module.named_buffers(), once.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
