# %% [markdown]
# # A fine-tuning run from beginning to end
#
# A tiny OPT that ships with the package learns to tell good reviews from bad ones, with forward passes only. Every cell runs
# offline on a CPU, all of them in about a minute. For a real run put `facebook/opt-1.3b` in place of `quickstart` and leave
# `data_dir` out.

# %%
import csv
from pathlib import Path
from tempfile import mkdtemp

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo_lightning import AdaNAGED, CausalLMClassificationModule, PromptDataModule
from zo_lightning.callbacks import Ledger, ResumeCheckpoint
from zo_lightning.commands.export import export
from zo_lightning.commands.replay import replay
from zo_lightning.loggers import ResumableCSVLogger

folder = Path(mkdtemp())
STEPS = 300


def begin(name: str, *callbacks: Callback) -> tuple[Trainer, CausalLMClassificationModule, PromptDataModule]:
    """A Trainer, a module and its data, from the same seed each time."""
    seed_everything(0)
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[ResumeCheckpoint(), *callbacks, AdaNAGED(), Ledger()],
        logger=ResumableCSVLogger(folder, name=name, version=0),
        log_every_n_steps=10,
        check_val_every_n_epoch=None,
        val_check_interval=100,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    return trainer, CausalLMClassificationModule("quickstart"), PromptDataModule("sst2", data_dir="quickstart")


# %% [markdown]
# ## Before
#
# A classification task is a prompt and a word per class; the model's likelihoods of the words are its scores. Without training:

# %%
trainer, module, data = begin("before")
trainer.validate(module, data)

# %% [markdown]
# ## Training
#
# There is no learning rate and no smoothing radius to choose. The first step finds how far a probe must go for the loss to rise
# by one per cent, and with that how curved the loss is; from then on step size and smoothing follow from what the run itself
# measures.

# %%
trainer, module, data = begin("whole")
trainer.fit(module, data)

with (folder / "whole" / "version_0" / "metrics.csv").open() as file:
    rows = list(csv.DictReader(file))
for row in rows:
    if row["val/acc"]:
        print(f"step {row['step']:>4}: validation loss {float(row['val/loss']):.4f}, accuracy {float(row['val/acc']):.3f}")
steps = [row for row in rows if row["zo/lr"]]
for row in steps[:: len(steps) // 5]:
    gamma, tau, forwards = (float(row[name]) for name in ("zo/lr", "zo/smoothing", "zo/forwards"))
    print(f"step {row['step']:>4}: gamma {gamma:.2e}, tau {tau:.2e}, {forwards:.0f} forwards so far")

# %% [markdown]
# ## A crash, and going on
#
# `ResumeCheckpoint` keeps a file from which a stopped run goes on as if nothing had happened: here the second run fails in its
# 150th step. Weights and log come out the same, bit for bit.


# %%
class PowerCut(Callback):
    """Fails once."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 150:
            raise RuntimeError("the power is gone")


trainer, stopped, data = begin("stopped", PowerCut())
try:
    trainer.fit(stopped, data)
except RuntimeError as error:
    print(error)

trainer, resumed, data = begin("stopped")
trainer.fit(resumed, data, ckpt_path=folder / "stopped" / "version_0" / "checkpoints" / "last.ckpt")

same = all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))
logs = [(folder / name / "version_0" / "metrics.csv").read_bytes() for name in ("whole", "stopped")]
print(f"weights are the same: {same}; metrics.csv is the same: {logs[0] == logs[1]}")

# %% [markdown]
# ## The run in a few kilobytes
#
# A direction is a function of the seed, the step and the parameter's name. So a sign and a step size for each step are the
# whole run: with the base model, the ledger gives the fine-tuned weights again, without the data and without a forward pass.

# %%
ledger = folder / "whole" / "version_0" / "ledger.safetensors"
print(f"{ledger.stat().st_size / 1024:.1f} KB for {STEPS} steps")
replay(base="quickstart", ledger=str(ledger), out=str(folder / "replayed"))

# %% [markdown]
# ## Export
#
# A folder that transformers loads like any model of the hub.

# %%
export(checkpoint=str(folder / "whole" / "version_0" / "checkpoints" / "last.ckpt"), out=str(folder / "exported"))

tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
inputs = tokenizer("a film with no plot It was", return_tensors="pt")
with torch.no_grad():
    logits = [AutoModelForCausalLM.from_pretrained(folder / name)(**inputs).logits for name in ("exported", "replayed")]
print(f"the exported and the replayed model give the same logits: {torch.equal(*logits)}")
