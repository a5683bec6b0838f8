"""Tiny random models of every architecture that fastamp.hf can cut, and batches for them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastamp

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": 3}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 40, "max_position_embeddings": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# DistilBERT and DeBERTa have names of their own.
DISTIL: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 24, "num_labels": 3, "seq_classif_dropout": 0.0}
DISTIL |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}
DEBERTA = {"conv_kernel_size": 3, "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "embedding_size": 12, "pooler_dropout": 0.0}
LOCAL = {"num_hidden_layers": 3, "local_attention": 4, "global_attn_every_n_layers": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**TEXT, **NO_DROPOUT}),
    "roberta": ("Roberta", {**TEXT, **NO_DROPOUT, "pad_token_id": 1}),
    "distilbert": ("DistilBert", DISTIL),
    "deberta": ("DebertaV2", {**TEXT, **NO_DROPOUT, **DEBERTA}),
    "deberta-plain": ("DebertaV2", {**TEXT, **NO_DROPOUT}),
    "electra": ("Electra", {**TEXT, **NO_DROPOUT, "embedding_size": 8}),
    "electra-plain": ("Electra", {**TEXT, **NO_DROPOUT, "embedding_size": 16}),
    "modernbert": ("ModernBert", {**TEXT, **LOCAL, "pad_token_id": 0}),
    "modernbert-mean": ("ModernBert", {**TEXT, "pad_token_id": 0, "classifier_pooling": "mean"}),
    "vit": ("ViT", {**SIZES, **NO_DROPOUT, "image_size": (8, 12), "patch_size": 4}),
}


def build(name: str, **overrides: Any) -> nn.Module:
    """A model in float64, in train mode, all of whose outputs depend visibly on their inputs."""
    kind, options = CONFIGS[name]
    config = getattr(transformers, kind + "Config")(**{**options, **overrides})
    head = "ForImageClassification" if kind == "ViT" else "ForSequenceClassification"
    torch.manual_seed(0)
    model = getattr(transformers, kind + head)(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@functools.cache
def _rows(seed: int) -> Tensor:
    return torch.randint(5, 40, (6, 9), generator=torch.Generator().manual_seed(seed))


def batch(model: nn.Module, *, padding_side: str = "right") -> dict[str, Tensor]:
    """Six rows of different lengths, token types of pairs where the model has them, and labels."""
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    config: Any = model.config
    if config.model_type == "vit":
        generator = torch.Generator().manual_seed(3)
        return {
            "pixel_values": torch.randn(6, 3, *config.image_size, generator=generator, dtype=torch.float64),
            "labels": labels,
        }
    mask = (torch.arange(9) < torch.tensor([9, 4, 7, 2, 9, 5])[:, None]).long()
    if padding_side == "left":
        mask = mask.flip(1)
    inputs = {"input_ids": torch.where(mask.bool(), _rows(1), config.pad_token_id), "attention_mask": mask}
    if config.model_type in ("bert", "electra", "deberta-v2") and config.type_vocab_size > 1:
        inputs["token_type_ids"] = (torch.arange(9) >= 3).long() * mask
    return {**inputs, "labels": labels}


class Questions(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of token ids with a label that the first token gives away, the same for every process."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(5, 40, (count, 9), generator=torch.Generator().manual_seed(0))
        self.labels = self.ids[:, 0] % 3

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row as the Trainer's collator takes it."""
        mask = torch.ones(9, dtype=torch.long)
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": self.labels[index]}


def arguments(folder: Any, **options: Any) -> Any:
    """TrainingArguments for a few steps of plain SGD on a CPU, without shuffling."""
    defaults = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def fixed_mixes(criterion: Any, lam: float = 0.3) -> Any:
    """Make the criterion mix row 2i with row 2i+1: the same mixes however rows are spread over batches."""

    def sample(batch_size: int, *, device: Any) -> fastamp.Mix:
        partner = torch.arange(batch_size, device=device).view(-1, 2).flip(1).reshape(-1)
        return fastamp.Mix(torch.full((batch_size,), lam, device=device), partner)

    criterion.sample = sample
    return criterion


def weights(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
