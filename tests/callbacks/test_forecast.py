"""The line before the first step."""

import re
from itertools import count

import pytest
import torch

from tests.quadratic import Quadratic, StopAt, Validated, loader, trainer, weights
from zo_lightning.callbacks import AdaNAGED, Forecast, forecast
from zo_lightning.optim import ZerothOrder

LINE = (
    r"0\.0 M parameters in 0\.0 MiB, peak memory [\d.]+ [MG]iB; "
    r"[\de.-]+ s per step; 6 steps end at about [\d :-]+ \(in \d+ s\)"
)


def fit(tmp_path, module, callbacks, **arguments):
    run = trainer(tmp_path, max_steps=6, callbacks=callbacks, **arguments)
    validation = loader(2) if isinstance(module, Validated) else None
    run.fit(module, loader(), validation)
    return run


@pytest.mark.parametrize("kind", [Quadratic, Validated])
def test_one_line(kind, tmp_path, caplog):
    fit(tmp_path, kind(), [AdaNAGED(), Forecast()], num_sanity_val_steps=-1)
    lines = [record.getMessage() for record in caplog.records if "per step" in record.getMessage()]
    assert len(lines) == 1
    assert re.fullmatch(LINE, lines[0]), lines


def test_says_so_where_the_end_is_not_known(tmp_path, caplog):
    run = trainer(tmp_path, max_epochs=-1, callbacks=[AdaNAGED(), Forecast(), StopAt(2)])
    run.fit(Quadratic(), loader())
    assert "the number of steps is not known" in caplog.text


@pytest.mark.parametrize(("pace", "accumulate"), [(100.0, 1), (100.0, 2), (0.0, 1)])
def test_says_so_where_steps_take_longer_than_their_forwards(pace, accumulate, tmp_path, caplog, monkeypatch):
    """Updates that orthogonalise matrices take several times as long as their forwards on a CPU."""
    clock = count(0.0, pace)
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(ZerothOrder, "rehearse", lambda *_, **__: 0.5)
    run = trainer(tmp_path, max_steps=20, callbacks=[Forecast()])
    run.fit(Quadratic(accumulate_grad_batches=accumulate), loader())
    lines = [record.getMessage() for record in caplog.records if "per step" in record.getMessage()]
    assert f"{0.5 * accumulate:.2g} s per step; 20 steps" in lines[0]
    assert len(lines) == (2 if pace else 1)
    if pace:  # the clock is read at the start of each step alone
        assert re.fullmatch(r"with their updates, 1e\+02 s per step; 14 steps end at about .* \(in 23 min\)", lines[1]), lines


class Noisy(Quadratic):
    """Dropout and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def loss(self, batch):
        self.calls += 1
        x, y = batch
        return super().loss((self.dropout(x), y))


def test_leaves_no_trace(tmp_path):
    """Same trajectory, bit for bit, with the forecast and without it, in spite of dropout and buffers."""
    results = []
    for callbacks in ([AdaNAGED()], [AdaNAGED(), Forecast()]):
        torch.manual_seed(3)
        module = Noisy()
        run = fit(tmp_path, module, callbacks)
        results.append((weights(module), module.calls.clone(), run.optimizers[0].forwards))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    assert results[0][2] == results[1][2]
