"""Templates for ``python -m trainer new``: a working plugin of each kind; NAME and CLASS are placeholders."""

from __future__ import annotations

ENCODER = '''\
"""NAME: describe what it is and cite its source."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.files.weights import load_strict, read_state
from components.registry import File, encoders

PATCH = 8  # pixels per token side


@encoders.register("NAME")
class CLASS(nn.Module):
    """Single-layer patch encoder. Replace the network and this line, which listings show.

    For a timm model, derive from components.nn.timm_encoder.TimmEncoder instead.

    Args:
        width: features per token.
        checkpoint: weights file; none: random weights.
    """

    def __init__(self, resolution: int, grid: int, *, width: int = 64, checkpoint: File | None = None) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"encoders.NAME: width = {width}; expected at least 1")
        self.grid = grid
        self.embed_dim = width
        self.checkpoint = checkpoint
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)
        self.requires_grad_(False).eval()

    def load_weights(self) -> None:
        """Load ``checkpoint``, if set. Raises WeightsError if the file is missing or does not fit."""
        if self.checkpoint:
            what = "encoder NAME"
            load_strict(self, read_state(self.checkpoint, what), what, self.checkpoint)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, grid * grid, width) patch tokens in row-major order."""
        side = PATCH * self.grid
        x = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return self.norm(self.patches(x).flatten(2).transpose(1, 2))
'''

TOKENIZER = '''\
"""NAME: describe what it is and cite its source."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from components.contracts import Posterior
from components.files.weights import load_strict, read_state
from components.nn.precision import at_least_fp32
from components.registry import File, tokenizers


@tokenizers.register("NAME")
class CLASS(nn.Module):
    """Convolutional autoencoder with factor 4. Replace the network and this line, which listings show.

    Args:
        latent_channels: latent channels C.
        width: channels of the hidden layers.
        checkpoint: file of initial weights; none: random weights.
        trainable: false freezes the tokenizer; recipes that train it then raise an error.
    """

    factor = 4

    def __init__(
        self, *, latent_channels: int = 4, width: int = 32, checkpoint: File | None = None, trainable: bool = True
    ) -> None:
        super().__init__()
        if min(latent_channels, width) < 1:
            raise ValueError(
                f"tokenizer.latent_channels = {latent_channels}, tokenizer.width = {width}: expected at least 1"
            )
        self.channels = latent_channels
        self.checkpoint = checkpoint
        self.trainable = trainable
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * latent_channels, 4, stride=2, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent_channels, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1),
        )
        self.requires_grad_(trainable)

    def init_weights(self) -> None:
        """Fill every parameter and buffer: training constructs the module on the meta device first."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.reset_parameters()

    def encode(self, x: Tensor) -> Posterior:
        """(B, 3, R, R) in [-1, 1] -> posterior over (B, C, R / 4, R / 4)."""
        mean, logvar = at_least_fp32(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, 4 h, 4 w), nominally in [-1, 1]."""
        return self.decoder(z)

    def load_weights(self) -> None:
        """Load ``checkpoint``, if set. Raises WeightsError if the file is missing or does not fit."""
        if self.checkpoint:
            what = "tokenizer NAME"
            load_strict(self, read_state(self.checkpoint, what), what, self.checkpoint)

    def units(self) -> Sequence[nn.Module]:
        """Return the sub-modules to compile, checkpoint and shard one by one; use each only through its forward."""
        return [self.encoder, self.decoder]
'''

DENOISER = '''\
"""NAME: describe what it is and cite its source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.contracts import DenoiserOutput, LatentShape
from components.nn.precision import at_least_fp32
from components.registry import denoisers


@denoisers.register("NAME")
class CLASS(nn.Module):
    """Residual token mixer with one token per latent position. Replace the network and this line, which listings show.

    Args:
        width: features per token.
        depth: number of blocks.
        align_depth: block whose tokens are aligned, counted from 1.
        label_dropout: probability of replacing a label with the null label in training.
    """

    def __init__(
        self,
        latent: LatentShape,
        num_classes: int,
        *,
        width: int = 64,
        depth: int = 4,
        align_depth: int = 2,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"denoiser.width = {width}: expected at least 1")
        if not 1 <= align_depth <= depth:
            raise ValueError(f"denoiser.align_depth = {align_depth}: expected 1 to {depth} (denoiser.depth)")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"denoiser.label_dropout = {label_dropout}: expected a probability in [0, 1)")
        self.width = width
        self.grid = latent.height
        self.align_depth = align_depth
        self.label_dropout = label_dropout
        self.null_label = num_classes
        self.embed = nn.Linear(latent.channels, width)
        self.positions = nn.Parameter(torch.empty(self.grid**2, width))
        self.time = nn.Linear(1, width)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, self.grid**2) for _ in range(depth))
        self.out = nn.Linear(width, latent.channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter and buffer: training constructs the module on the meta device first."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> DenoiserOutput:
        """Predict the velocity from x_t (B, C, h, w), t (B,) in [0, 1] and labels (B,) in [0, null_label]."""
        tokens = self.tokens(x_t, t, labels)
        x = tokens
        for block in self.blocks[self.align_depth :]:
            x = block(x)
        velocity = self.out(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return DenoiserOutput(velocity, tokens)

    def tokens(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return hidden tokens (B, h * w, width) after block ``align_depth``; later blocks do not run."""
        x = self.embed(x_t.flatten(2).transpose(1, 2)) + self.positions
        x = x + self.time(t.to(x.dtype)[:, None])[:, None] + self.labels(labels)[:, None]
        for block in self.blocks[: self.align_depth]:
            x = block(x)
        return x

    def units(self) -> Sequence[nn.Module]:
        """Return the sub-modules to compile, checkpoint and shard one by one; use each only through its forward."""
        return list(self.blocks)


class Block(nn.Module):
    """Mixes tokens, then features: (B, N, width) -> (B, N, width)."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(tokens, tokens)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(at_least_fp32(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(at_least_fp32(x)))
'''

LOSS = '''\
"""NAME: describe what it is and cite its source."""

from __future__ import annotations

from torch import Tensor

from components.contracts import Posterior
from components.nn.precision import at_least_fp32
from components.registry import losses


@losses.register("NAME")
class CLASS:
    """Mean absolute error of the image gradients. Replace the loss and this line, which listings show.

    Args:
        weight: weight in the tokenizer's loss.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, x_hat: Tensor, posterior: Posterior) -> Tensor:
        """Image and reconstruction (B, 3, R, R) and posterior -> scalar in at least fp32."""
        error = at_least_fp32(x_hat) - at_least_fp32(x)
        return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
'''

DATASET = '''\
"""NAME: describe what it is and cite its source."""

from __future__ import annotations

import torch

from components.contracts import DatasetItem
from components.registry import datasets


@datasets.register("NAME")
class CLASS:
    """Color gradients in two directions. Replace the dataset and this line, which listings show.

    Args:
        size: number of images.
    """

    class_names = ("left to right", "top to bottom")
    num_classes = 2
    flip = False  # horizontal flips would preserve the class, but are not needed

    def __init__(self, resolution: int, *, size: int = 1000) -> None:
        if size < 1:
            raise ValueError(f"dataset.size = {size}: expected at least 1 image")
        self.resolution = resolution
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the image (uint8, (3, R, R)) and its class, a function of the index only."""
        if not 0 <= index < self.size:
            raise IndexError(f"dataset NAME: index {index} is outside its {self.size} images")
        colors = torch.rand(2, 3, generator=torch.Generator().manual_seed(index))
        ramp = torch.linspace(0, 1, self.resolution)
        line = colors[0, :, None] * (1 - ramp) + colors[1, :, None] * ramp  # (3, R)
        image = (line[:, None] * 255).round().to(torch.uint8).expand(3, self.resolution, self.resolution)
        label = index % 2
        return DatasetItem((image if label == 0 else image.mT).contiguous(), label)
'''

RECIPE = '''\
"""NAME: describe what it is and cite its source."""

from __future__ import annotations

from components.contracts import Batch, Draws, Modules, Update
from components.diffusion.losses import denoising, drop_labels, frozen_posterior
from components.registry import recipes


@recipes.register("NAME")
class CLASS:
    """Train only the denoiser, on a frozen tokenizer. Replace the step and this line, which listings show."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})  # parts to build
    trains = {"denoiser": ("denoiser",)}  # group (one optimizer each) -> parts that it updates
    cached_latents = True  # a step needs no images

    def step(self, m: Modules, batch: Batch, draws: Draws, update: Update, step: int) -> None:
        """Compute the losses and pass them to ``update``; weights change after the step, all or none."""
        t = m.flow.times(draws.time)
        z = frozen_posterior(m, batch).sample(draws.posterior)
        path = m.flow.at(m.latent_norm(z), t, draws.noise)
        update("denoiser", denoising(m, path, t, drop_labels(m, batch.labels, draws.label)))
'''

PLUGINS = {
    "encoder": ENCODER,
    "tokenizer": TOKENIZER,
    "denoiser": DENOISER,
    "loss": LOSS,
    "dataset": DATASET,
    "recipe": RECIPE,
}

TEST = '''\
"""NAME satisfies the contract of its kind, trains, and does what it claims."""

from pathlib import Path

import pytest

from components.conformance import check, checks, resolve
from trainer.__main__ import main

HERE = Path(__file__).resolve().parent
SUBJECT = resolve("plugins", f"{HERE / 'NAME.py'}:NAME")
CHECKS = checks(SUBJECT)


@pytest.mark.parametrize("name", CHECKS)
def test_keeps_its_contract(name):
    check(SUBJECT, CHECKS[name])


def test_trains(tmp_path):
    options = [f"--run.dir={tmp_path / 'run'}", "--training.steps=2", "--sampling.images=2", "--sampling.steps=2"]
    assert main(["train", str(HERE / "NAME.toml"), *options]) == 0


def test_does_what_it_says():
    """Replace this with a test of what the plugin is for."""
'''

SPECIAL = {
    "encoder": """\
    import torch

    encoder = SUBJECT.make(32, 4)
    black, white = encoder(torch.stack([-torch.ones(3, 32, 32), torch.ones(3, 32, 32)]))
    assert not torch.equal(black, white)
""",
    "tokenizer": """\
    tokenizer = SUBJECT.make()
    assert tokenizer.factor == 4 and tokenizer.channels == 4
""",
    "denoiser": """\
    import torch

    from components.contracts import LatentShape

    denoiser, labels = SUBJECT.make(LatentShape(4, 8, 8), 10), torch.arange(2)
    late, early = (denoiser(torch.ones(2, 4, 8, 8), torch.full((2,), t), labels).velocity for t in (1.0, 0.0))
    assert not torch.equal(late, early)
""",
    "loss": """\
    import torch

    loss, x = SUBJECT.make(), torch.rand(2, 3, 32, 32)
    assert loss(x, x, None) == 0
    assert loss(x, x + 0.5, None) < 1e-6  # the gradients of a constant are zero
""",
    "dataset": """\
    data = SUBJECT.make(32)
    across, down = data[0].image, data[1].image
    assert (across == across[:, :1]).all() and (down == down[:, :, :1]).all()
""",
    "recipe": """\
    assert SUBJECT.make().trains == {"denoiser": ("denoiser",)}
""",
}

TABLES = {
    "recipe": '[recipe]\nname = "repae"\n',
    "tokenizer": '[tokenizer]\nname = "autoencoder_kl"\nlatent_channels = 4\nchannels = 16\nmultipliers = [1, 2, 2]\n'
    "norm_groups = 4\nres_blocks = 1\n",
    "denoiser": '[denoiser]\nname = "sit"\nwidth = 64\ndepth = 4\nheads = 4\nalign_depth = 2\n',
    "encoder": "[encoders.tiny_vit]\n",
    "loss": "[losses.l1]\n\n[losses.kl]\n\n[losses.cosine]\nhead_width = 128\n",
    "dataset": '[dataset]\nname = "shapes"\nsize = 1000\n',
}
OWN = {
    "encoder": "[encoders.NAME]\n",
    "loss": "[losses.NAME]\nweight = 1.0\n\n[losses.l1]\n\n[losses.kl]\n\n[losses.cosine]\nhead_width = 128\n",
}
TOML = """\
# Trains with NAME; small enough for a laptop. Override any key on the command line: --training.steps=1000
plugins = ["NAME.py"]

[run]
dir = "outputs/NAME"
log_every = 5

[training]
steps = 20
batch_size = 8
resolution = 32

TABLES
[loader]
workers = 0

[latent_norm]
images = 32

[sampling]
images = 10
steps = 10
"""


def files(kind: str, name: str) -> dict[str, str]:
    """Return the files of a new plugin: file name -> text.

    Args:
        kind: kind of plugin, a key of ``registry.KINDS``.
        name: name to register the plugin under, a lower-case Python identifier.
    """
    title = "".join(part.capitalize() for part in name.split("_"))
    own = OWN.get(kind, f'[{kind}]\nname = "NAME"\n')
    tables = "\n".join({**TABLES, kind: own}.values())
    texts = {
        f"{name}.py": PLUGINS[kind],
        f"test_{name}.py": TEST + SPECIAL[kind],
        f"{name}.toml": TOML.replace("TABLES", tables),
    }
    return {file: text.replace("NAME", name).replace("CLASS", title) for file, text in texts.items()}
