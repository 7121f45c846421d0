"""Train or evaluate the two networks that ship with dataset ``shapes``.

python -m plugins.datasets.train_shapes_nets judge     # train the classifier that scores generated images
python -m plugins.datasets.train_shapes_nets tiny_vit  # train the encoder tiny_vit
python -m plugins.datasets.train_shapes_nets accuracy  # evaluate both, as shipped, on split "heldout"
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components import registry
from components.data.pixels import to_float

PLUGINS = Path(__file__).parents[1]
SHIPPED = {
    "judge": PLUGINS / "datasets" / "shapes_judge.safetensors",
    "tiny_vit": PLUGINS / "encoders" / "tiny_vit.safetensors",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m plugins.datasets.train_shapes_nets",
        description="Train or evaluate the networks that ship with dataset shapes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("what", choices=(*SHIPPED, "accuracy"), help="train one network, or evaluate both")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--batch", type=int, default=64, help="batch size; each image is used once")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (AdamW)")
    parser.add_argument("--seed", type=int, default=0, help="seed for initial weights and augmentation")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; runs repeat with equal seed and threads")
    parser.add_argument("--heldout", type=int, default=5000, help="evaluation images of split heldout")
    parser.add_argument("--out", type=Path, help="weights file to write; default: the shipped one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    registry.discover("plugins")
    if args.what == "accuracy":
        measure("judge", shapes().judge, args.heldout)
        encoder = tiny_vit()
        encoder.load_weights()
        measure("tiny_vit", lambda images: encoder.classify(images).argmax(1), args.heldout)
        return
    torch.manual_seed(args.seed)
    train = {"judge": train_judge, "tiny_vit": train_tiny_vit}[args.what]
    module, predict = train(args.steps, args.batch, args.lr)
    out = args.out or SHIPPED[args.what]
    save(module, out)
    print(f"wrote {out} ({out.stat().st_size / 1024:.0f} KiB)")
    measure(args.what, predict, args.heldout)


def shapes(resolution: int = 32, **options):
    """Create dataset ``shapes`` through the registry: plugins do not import each other."""
    return registry.datasets.get("shapes").cls(resolution, **options)


def tiny_vit():
    return registry.encoders.get("tiny_vit").cls(32, 8)


def train_judge(steps: int, batch: int, lr: float):
    """Train the judge on flipped, blurred and noisy images of split "judge"; return it and its predictor."""
    module = shapes().untrained_judge()
    data = shapes(split="judge", size=steps * batch)

    def loss(step: int) -> Tensor:
        images, labels = load(data, step * batch, batch)
        return F.cross_entropy(module(degrade(images)), labels, label_smoothing=0.05)

    fit(module, loss, steps, lr)
    return module, lambda images: module(images).argmax(1)


def train_tiny_vit(steps: int, batch: int, lr: float):
    """Train the encoder on split "train" with cross-entropy on the image's class and on each token's content.

    A token's content is a distribution over background and the ten classes: the fraction of its 4 x 4 pixels that the
    shape covers is assigned to the shape's class. Every fourth step uses a quarter of the batch at 64 pixels (16 x 16
    tokens, same cost); without it, tokens of grids finer than 8 x 8 would carry little information.
    """
    encoder = tiny_vit().requires_grad_(True)
    coarse, fine = (shapes(resolution, split="train", size=steps * batch) for resolution in (32, 64))

    def loss(step: int) -> Tensor:
        data, encoder.grid, count = (fine, 16, max(batch // 4, 1)) if step % 4 == 3 else (coarse, 8, batch)
        first = step * batch
        images, labels = load(data, first, count)
        masks = torch.stack([data.mask(index) for index in range(first, first + count)])
        covered = F.avg_pool2d(masks[:, None], 4).flatten(1)[..., None]
        content = torch.cat([1 - covered, covered * F.one_hot(labels, 10)[:, None]], dim=-1)
        logits = encoder.head(encoder.features(images))
        per_token = F.cross_entropy(logits.flatten(0, 1), content.flatten(0, 1))
        return F.cross_entropy(logits.mean(1)[:, 1:], labels) + per_token

    fit(encoder, loss, steps, lr)
    encoder.grid = 8
    return encoder, lambda images: encoder.classify(images).argmax(1)


def fit(module: nn.Module, loss, steps: int, lr: float) -> None:
    """Minimize ``loss(step)``, a scalar, with AdamW and a one-cycle schedule; leave the module in eval mode."""
    optimizer = torch.optim.AdamW(module.parameters(), lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    module.train()
    start = time.perf_counter()
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {value.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    module.eval()


def load(data, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return images ``first`` to ``first + count - 1`` as float in [-1, 1], and their labels."""
    samples = [data[index] for index in range(first, first + count)]
    images = to_float(torch.stack([sample.image for sample in samples]))
    return images, torch.tensor([sample.label for sample in samples])


def degrade(images: Tensor) -> Tensor:
    """Imitate generator errors: random blur, noise and contrast per image; flip half of the images."""
    count = len(images)
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
    sigma = 0.05 + 1.2 * torch.rand(count, 1)
    kernel = torch.exp(-0.5 * (torch.arange(-3.0, 4.0) / sigma).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None]
    planes = F.pad(images, (3, 3, 3, 3), mode="replicate").reshape(1, 3 * count, 38, 38)
    planes = F.conv2d(F.conv2d(planes, kernel[..., None], groups=3 * count), kernel[:, :, None], groups=3 * count)
    contrast = 0.6 + 0.4 * torch.rand(count, 1, 1, 1)
    noise = 0.15 * torch.rand(count, 1, 1, 1) * torch.randn(count, 3, 32, 32)
    return planes.reshape(count, 3, 32, 32) * contrast + noise


@torch.no_grad()
def measure(name: str, predict, count: int) -> None:
    """Print the accuracy of ``predict`` on split "heldout", for clean and for degraded images."""
    data = shapes(split="heldout", size=count)
    torch.manual_seed(0)
    right = torch.zeros(2)
    for first in range(0, count, 250):
        images, labels = load(data, first, min(250, count - first))
        right += torch.stack([(predict(x) == labels).sum() for x in (images, degrade(images))])
    clean, degraded = (100 * right / count).tolist()
    print(f"{name}: accuracy {clean:.2f} % on {count} held-out images; blurred and noisy: {degraded:.2f} %")


def save(module: nn.Module, path: Path) -> None:
    """Save the weights as fp16, half the size; they are loaded as fp32."""
    from safetensors.torch import save_file

    save_file({k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}, path)


if __name__ == "__main__":
    main()
