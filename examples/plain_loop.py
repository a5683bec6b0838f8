"""AMP in a loop of one's own, at any layer of a transformers model or of any other network.

    python examples/plain_loop.py

Trains a small BERT on the questions that fastamp carries, with word embeddings mixed, and prints its test error.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import fastamp
from fastamp.data import Corpus, Split, Vocabulary, load
from fastamp.hf import split


def encode(vocabulary: Vocabulary, part: Split) -> tuple[Tensor, Tensor]:
    """Ids (N, T), zero where padded, behind the token that the classifier reads; labels (N,)."""
    ids = vocabulary.encode(part.sentences)
    first = torch.full((len(ids), 1), len(vocabulary))
    return torch.cat([first, ids], 1), torch.tensor(part.labels)


def train(corpus: Corpus, *, steps: int, batch_size: int, at: str | int, seed: int = 0) -> float:
    """Train, and return the test error in percent."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary.build(corpus.train.sentences)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary) + 1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=corpus.num_classes,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = fastamp.AMPLoss()
    try:
        g, f = split(model, at=at)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--at") from error

    ids, labels = encode(vocabulary, corpus.train)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(ids), (batch_size,))
        inputs = {"input_ids": ids[rows], "attention_mask": (ids[rows] != 0).long()}
        mix = criterion.sample(batch_size, device=ids.device)
        loss = criterion.step(f, g(**inputs), labels[rows], mix=mix, context=f.context(inputs, mix))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    ids, labels = encode(vocabulary, corpus.test)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    return 100.0 * (logits.argmax(1) != labels).double().mean().item()


@click.command()
@click.option("--steps", type=int, default=200, show_default=True)
@click.option("--batch-size", type=int, default=50, show_default=True)
@click.option("--at", default="embeddings", show_default=True, help="Where to mix; see fastamp.hf.split.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(steps: int, batch_size: int, at: str, seed: int) -> None:
    """Train with AMP, and print the test error."""
    place: str | int = int(at) if at.removeprefix("-").isdigit() else at
    error = train(load("questions"), steps=steps, batch_size=batch_size, at=place, seed=seed)
    click.echo(f"mixed at {at}: test error {error:.1f}%")


if __name__ == "__main__":
    main()
