"""The replay ledger: a run of zeroth-order steps as a few bytes for each, from which its weights are rebuilt bit for bit.

A step moves the weights along directions that are a function of (seed, step, parameter name, shape), so that its coefficients
and step sizes are all that has to be kept. The callback :class:`~zo_lightning.callbacks.Ledger` writes the file. In plain
PyTorch::

    record = Record.begin(optimizer, net)  # before the first step
    for batch in batches:
        optimizer.step(lambda: loss(net, batch))
        record.add(optimizer)
    optimizer.detach()
    record.final = weights_hash(net, buffers=False)
    write(record, "ledger.safetensors")

    replay(base, read("ledger.safetensors"))  # needs neither the data nor a forward
"""

from zo_lightning.ledger.file import read, write
from zo_lightning.ledger.hashing import weights_hash
from zo_lightning.ledger.record import LedgerError, Record
from zo_lightning.ledger.replaying import replay, under_ledger_names

__all__ = ["LedgerError", "Record", "read", "replay", "under_ledger_names", "weights_hash", "write"]
