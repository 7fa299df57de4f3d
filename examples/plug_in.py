"""A LightningModule written for backpropagation, trained with forward passes only: one callback more."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from zo_lightning import AdaNAGED


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
        self.accuracy = BinaryAccuracy()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x).squeeze(1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        self.log("accuracy", self.accuracy(logits, y), on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)  # says what is trained; it is never stepped


if __name__ == "__main__":
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).float()), batch_size=32, shuffle=True)
    trainer = Trainer(max_epochs=25, callbacks=[AdaNAGED()], accelerator="cpu")
    trainer.fit(Classifier(), loader)
    print(f"accuracy in the last epoch: {trainer.callback_metrics['accuracy']:.3f}")
