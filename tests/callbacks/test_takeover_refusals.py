"""What a take-over cannot serve is refused at the start, in one line that says what to do."""

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.callbacks.foreign import Classifier, anatomy, loader, make_trainer, seeded
from tests.quadratic import Quadratic
from tests.quadratic import loader as quadratic_loader
from zo_lightning.callbacks import AdaNAGED
from zo_lightning.optim import ZerothOrder


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OwnStep(Classifier):
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)


class OwnBackward(Classifier):
    def backward(self, loss, *args, **kwargs):
        loss.backward()


class OwnClipping(Classifier):
    def configure_gradient_clipping(self, *args, **kwargs):
        pass


class Iterating(Classifier):
    def training_step(self, dataloader_iter):
        return super().training_step(*next(dataloader_iter)[:2])


class Several(Classifier):
    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.1) for p in self.body[0].parameters()], []


class Frozen(Classifier):
    def configure_optimizers(self):
        self.body[0].requires_grad_(False)
        return torch.optim.SGD(self.body[0].parameters(), lr=0.1)


def refused(folder, message, module=None, *callbacks, zo=None, ckpt_path=None, data=None, **arguments):
    module = module or Classifier()
    blank = anatomy(module)
    callbacks = [zo or AdaNAGED(), *callbacks]
    trainer = make_trainer(folder, callbacks=callbacks, limit_val_batches=0, **{"max_steps": 1, **arguments})
    with pytest.raises(MisconfigurationException, match=message) as found:
        trainer.fit(module, data or loader(), loader(), ckpt_path=ckpt_path)
    assert "\n" not in str(found.value)
    assert trainer.global_step == 0
    left = anatomy(module)
    for name in ("", "body.0"):
        assert not {"training_step", "backward", "optimizer_step", "lr_scheduler_step", "forward"} & set(left[name][0])
        assert left[name][1] == blank[name][1]


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "Manual uses manual optimization, whose steps only it knows; subclass zo_lightning.modules.ZOModule"),
        (OwnStep, "OwnStep.optimizer_step would be ignored, .*; remove it"),
        (OwnBackward, "OwnBackward.backward would be ignored, .*; remove it"),
        (OwnClipping, "OwnClipping.configure_gradient_clipping would be ignored, .*; remove it"),
        (Iterating, "Iterating.training_step takes a dataloader_iter, .*; let it take a batch"),
        (Frozen, "no parameter that requires a gradient: nothing to train"),
    ],
)
def test_modules(module, message, tmp_path):
    refused(tmp_path, message, module())


def test_several_optimizers(tmp_path):
    """Lightning itself refuses several under automatic optimization, or the take-over does."""
    module = Several()
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[AdaNAGED()], limit_val_batches=0)
    with pytest.raises(
        (MisconfigurationException, RuntimeError), match=r"multiple optimizers|takes the place of one optimizer"
    ):
        trainer.fit(module, loader(), loader())
    assert "training_step" not in vars(module)


def test_gradient_clipping(tmp_path):
    refused(tmp_path, r"gradient_clip_val=0\.5 would be ignored, .*; leave it out", gradient_clip_val=0.5)


@pytest.mark.parametrize("other", [lambda: StochasticWeightAveraging(swa_lrs=0.1), EMAWeightAveraging])
def test_averaging_after_it(other, tmp_path):
    refused(tmp_path, "copies the module in its setup; put it before AdaNAGED in the list of callbacks", None, other())


def test_the_learning_rate_finder(tmp_path):
    refused(tmp_path, "LearningRateFinder has nothing to find, .*; remove it", None, LearningRateFinder())


@pytest.mark.parametrize("kind", [ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("module", [Classifier, Quadratic])
def test_sharding_strategies(kind, module, tmp_path):
    """Asked for early, before processes or devices are there: in the setup, with such a strategy put in."""
    module, zo = module(), AdaNAGED()
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[zo])
    trainer.strategy.connect(module)
    module.trainer = trainer
    strategy = object.__new__(kind)
    strategy._precision_plugin = strategy.cluster_environment = None
    trainer._accelerator_connector.strategy = strategy

    def set_up():
        zo.setup(trainer, module, "fit")
        module.setup("fit")

    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__} is not supported.*use strategy='zo_ddp'"):
        set_up()
    assert "training_step" not in vars(module)


def test_two_of_them(tmp_path):
    class Mine(AdaNAGED):
        """Another class: Lightning itself refuses two of the same."""

    refused(tmp_path, "two AdaNAGED callbacks; keep one", None, Mine())


@pytest.mark.filterwarnings("ignore:.*max_epochs.* was not set")
def test_unknown_length(tmp_path):
    refused(tmp_path, r"number of steps is not known: set max_steps .*total_steps=", max_steps=-1)


def test_an_optimizer_for_a_module_that_makes_its_own(tmp_path):
    zo = AdaNAGED(optimizer=lambda params: ZerothOrder(params, rank=2))
    with pytest.raises(MisconfigurationException, match="Quadratic makes its own: give it the argument"):
        make_trainer(tmp_path, max_steps=1, callbacks=[zo]).fit(Quadratic(), quadratic_loader())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: torch.optim.SGD([p for _, p in params], lr=1.0), r"must make a ZerothOrder, got SGD"),
        (lambda params: ZerothOrder(params, update="sgd"), r"needs steps of unit norm, which update='sgd' does not take"),
        (lambda params: ZerothOrder(params, step_rule=AdaNAGED().rule), r"a step_rule of its own"),
    ],
)
def test_other_optimizers(make, message, tmp_path):
    refused(tmp_path, message, zo=AdaNAGED(optimizer=make))


# ---- checkpoints that a run cannot go on from -------------------------------------------------------------------------
def kept(folder, callbacks, **arguments):
    keep = ModelCheckpoint(folder, "half", every_n_train_steps=2, **arguments)
    trainer = make_trainer(folder, max_steps=2, callbacks=[*callbacks, keep], limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(Classifier(), loader(), loader())
    return folder / "half.ckpt"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_a_checkpoint_of_an_ordinary_run(tmp_path):
    path = kept(tmp_path, [])
    refused(tmp_path, "holds no state of AdaNAGED.*load its weights instead: Trainer.fit without", ckpt_path=path, max_steps=3)
    module = Classifier.load_from_checkpoint(path)  # the way that the message names
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[AdaNAGED()], limit_val_batches=0)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 2


def test_a_checkpoint_of_weights_alone(tmp_path):
    path = kept(tmp_path, [AdaNAGED()], save_weights_only=True)
    module = seeded(Classifier)
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[AdaNAGED()], limit_val_batches=0)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        trainer.fit(module, loader(), loader(), ckpt_path=path)
    assert "training_step" not in vars(module)
