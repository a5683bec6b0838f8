"""AMP for image models, in place of timm's Mixup and its BinaryCrossEntropy: at pixels, a middle layer or logits.

    python examples/timm_images.py --at pixels

Trains a small ResNet of timm's on generated images of striped patterns, one of four to an image, as the recipes of
ImageNet train theirs: every class is a question of its own. What changes in a recipe: no Mixup among the data's
transforms, its alpha and its label_smoothing are the criterion's, and the criterion is called where the loss was.
"""

from __future__ import annotations

from collections.abc import Callable

import click
import timm
import torch
from torch import Tensor, nn

import fastamp

CLASSES, SIZE = 4, 32


def images(count: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes (N, 3, SIZE, SIZE), the class being their direction, and labels (N,)."""
    labels = torch.randint(CLASSES, (count,))
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    angles = labels * torch.pi / CLASSES
    across = angles.cos()[:, None, None] * rows + angles.sin()[:, None, None] * columns
    stripes = (across + SIZE * torch.rand(count, 1, 1)).sin()
    return stripes[:, None] + torch.randn(count, 3, SIZE, SIZE), labels


def cut(model: nn.Module, at: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The model as g and f, with f(g(x)) its logits: what is mixed is what g returns."""
    if at == "pixels":
        return nn.Identity(), model
    stages = dict(model.named_children())
    names = list(stages)
    if "layer3" not in names:
        raise click.BadParameter(f"a ResNet has layer3, this model has {', '.join(names)}", param_hint="--model")
    middle = names.index("layer3")
    g, f = (nn.Sequential(*(stages[name] for name in part)) for part in (names[:middle], names[middle:]))
    return g, f


def train(model: nn.Module, criterion: fastamp.AMPLoss, *, at: str, steps: int, batch_size: int) -> None:
    """Train with rows mixed at a place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    g, f = cut(model, at) if at != "logits" else (model, nn.Identity())
    model.train()
    for _ in range(steps):
        x, y = images(batch_size)
        # BatchNorm lets rows depend on each other: a step at the pixels or at layer3 then keeps both of its passes.
        loss = criterion(model(x), y) if at == "logits" else criterion.step(f, g(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@click.command()
@click.option("--model", "name", default="resnet10t", show_default=True, help="One of timm's ResNets.")
@click.option("--at", type=click.Choice(["pixels", "middle", "logits"]), default="pixels", show_default=True)
@click.option("--steps", type=int, default=100, show_default=True)
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--alpha", type=float, default=0.2, show_default=True, help="Of λ ~ Beta(alpha, alpha).")
@click.option("--smoothing", type=float, default=0.1, show_default=True)
def main(name: str, at: str, steps: int, batch_size: int, alpha: float, smoothing: float) -> None:
    """Train with AMP, and print the test error."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    criterion = fastamp.AMPLoss(loss="binary_cross_entropy", alpha=alpha, label_smoothing=smoothing)
    train(model, criterion, at=at, steps=steps, batch_size=batch_size)
    model.eval()
    criterion.eval()
    x, y = images(400)
    with torch.no_grad():
        logits = model(x)
    error = 100 * (logits.argmax(1) != y).double().mean().item()
    click.echo(f"mixed at {at}: test loss {criterion(logits, y).item():.3f}, test error {error:.1f}%")


if __name__ == "__main__":
    main()
