"""AMP in Lightning: a module whose training step is `AMPLoss.step`, for any number of processes.

    python examples/lightning_recipe.py

The whole of g and f runs inside training_step, which Lightning runs as the forward pass of its DDP wrapper.
Everything else is Lightning as usual: accumulate_grad_batches, precision="bf16-mixed", checkpoints (which hold the
criterion, with its generator, since it is a part of the module).
"""

from __future__ import annotations

from typing import Any

import click
import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastamp
from fastamp.data import Split, Vocabulary, load
from fastamp.models import TextCNN


class AMPClassifier(lightning.LightningModule):
    """A TextCNN that is trained with its words or its sentences mixed.

    Args:
        vocab_size: number of ids.
        num_classes: number of classes.
        at: "word" or "sentence".
        lr: of Adam.
    """

    def __init__(self, vocab_size: int, num_classes: int, *, at: str = "word", lr: float = 1e-3) -> None:
        super().__init__()
        self.model = TextCNN(vocab_size, num_classes, embedding_dim=50, maps=20)
        self.criterion = fastamp.AMPLoss()
        self.at, self.lr = at, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a mixed batch of ids (B, T) and labels (B,)."""
        ids, labels = batch
        g, f = self.model.split(self.at)
        mix = self.criterion.sample(len(labels), device=self.device)
        loss, stats = self.criterion.step(f, g(ids), labels, mix=mix, context=f.context(ids, mix), return_stats=True)
        # Lightning keeps these on the device and reads them when it logs.
        self.log("mix/lam_shift", (stats.lam_adv - stats.lam).abs().mean())
        self.log("mix/mask_rate", stats.mask.float().mean())
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Plain cross-entropy: Lightning has put the criterion into eval mode as well."""
        ids, labels = batch
        logits = self.model(ids)
        self.log("val_loss", self.criterion(logits, labels), sync_dist=True)
        self.log("val_error", 100 * (logits.argmax(1) != labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.model.parameters(), lr=self.lr)


def loader(vocabulary: Vocabulary, part: Split, batch_size: int, *, shuffle: bool = False) -> Any:
    """Batches of ids and labels."""
    rows = TensorDataset(vocabulary.encode(part.sentences), torch.tensor(part.labels))
    return DataLoader(rows, batch_size, shuffle=shuffle)


@click.command()
@click.option("--steps", type=int, default=200, show_default=True)
@click.option("--at", type=click.Choice(["word", "sentence"]), default="word", show_default=True)
@click.option("--precision", default="32-true", show_default=True, help="As Lightning names it, e.g. bf16-mixed.")
@click.option("--devices", type=int, default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(steps: int, at: str, precision: str, devices: int, seed: int) -> None:
    """Train on the questions that fastamp carries, and print the validation error."""
    lightning.seed_everything(seed, verbose=False)
    corpus = load("questions")
    vocabulary = Vocabulary.build(corpus.train.sentences)
    module = AMPClassifier(len(vocabulary), corpus.num_classes, at=at)
    trainer = lightning.Trainer(
        max_steps=steps,
        precision=precision,
        devices=devices,
        accelerator="auto",
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(vocabulary, corpus.train, 50, shuffle=True))
    (metrics,) = trainer.validate(module, loader(vocabulary, corpus.dev, 200), verbose=False)
    click.echo(f"mixed at {at}: validation error {metrics['val_error']:.1f}%")


if __name__ == "__main__":
    main()
