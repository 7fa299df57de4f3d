"""The callback on a module that knows nothing of this package, with another method's optimizer."""

from functools import partial

import pytest

from tests.callbacks.foreign import Classifier, loader, make_trainer, mean_loss, seeded
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.optim.methods import FZOO, LDSD, LOZO, JaguarSignSGD, ZOMuon

METHODS = {
    "fzoo": FZOO,
    "jaguar": partial(JaguarSignSGD, fraction=0.5),
    "ldsd": partial(LDSD, normalised=True),
    "lozo": partial(LOZO, normalised=True),
    "zo_muon": partial(ZOMuon, normalised=True, rank=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_with_the_method(name, tmp_path):
    module = seeded(Classifier, dropout=0.0)
    before = mean_loss(module)
    callback = AdaNAGED(optimizer=METHODS[name])
    make_trainer(tmp_path, max_steps=60, limit_val_batches=0, callbacks=[callback]).fit(module, loader(), loader())
    assert mean_loss(module) < before
