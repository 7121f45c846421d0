"""Plugins that each violate one requirement of their kind, with the message the conformance kit must report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from components.contracts import (
    AdversarialLoss,
    AlignmentLoss,
    Dataset,
    DatasetItem,
    DenoiserOutput,
    Distribution,
    LossTerm,
    Optimizer,
    Posterior,
    Recipe,
    ReconstructionLoss,
    trained_parameters,
)
from components.distributed.parallel import local
from components.registry import KINDS, Plugin, Registry
from tests.support import toy_plugins as toys

CASES: list[tuple[Plugin, str, str]] = []
"""(plugin, name of the check that fails, part of its message)."""


def broken(kind: str, check: str, says: str) -> Callable[[type], type]:
    def add(cls: type) -> type:
        registry = Registry(kind, *KINDS[kind].bases)  # separate: no config can name these
        registry.register(cls.__name__)(cls)
        CASES.append((registry.get(cls.__name__), check, says))
        return cls

    return add


# Options


@broken("loss", "is_documented", "has no line for: power")
class Undocumented(toys.ToyL1):
    """Has an undocumented option."""

    def __init__(self, *, power: int = 1) -> None:
        pass


@broken("loss", "refuses_bad_options", "option power accepts values of any type")
class Untyped(toys.ToyL1):
    """Has an option without a type.

    Args:
        power: exponent.
    """

    def __init__(self, *, power=1) -> None:
        pass


@broken("loss", "refuses_bad_options", "its default 'one' is not of its type int")
class DefaultOfAnotherType(toys.ToyL1):
    """Has an option whose default does not match its type.

    Args:
        power: exponent.
    """

    def __init__(self, *, power: int = "one") -> None:
        pass


@broken("loss", "refuses_bad_options", "a type that TOML cannot express")
class TensorOption(toys.ToyL1):
    """Has an option of type tensor, which TOML cannot express.

    Args:
        matrix: of colors.
    """

    def __init__(self, *, matrix: torch.Tensor = None) -> None:
        pass


@broken("loss", "can_be_constructed", "raises ZeroDivisionError")
class CannotBeMade(toys.ToyL1):
    """Raises in its constructor."""

    def __init__(self) -> None:
        self.weight = 1 / 0


# Encoders


@broken("encoder", "returns_tokens", "expected (1, 16, 12): drop class and register tokens")
class ClassToken(toys.ToyEncoder):
    """Keeps the class token."""

    def forward(self, images):
        tokens = super().forward(images)
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


@broken("encoder", "returns_tokens", "for 2 images of 64 px and a grid of 4; expected (2, 16, 12)")
class OneResolution(toys.ToyEncoder):
    """Returns one token per image patch, whatever the grid."""

    def forward(self, images):
        return F.unfold(images, 8, stride=8).transpose(1, 2)[..., :12] @ self.matrix[:12].to(images.dtype)


@broken("encoder", "tokens_are_row_major", "column-major")
class ColumnsFirst(toys.ToyEncoder):
    """Transposes the grid."""

    def forward(self, images):
        return super().forward(images.mT)


@broken("encoder", "is_frozen", "layer.weight, layer.bias: trainable")
class Trainable(toys.ToyEncoder):
    """Has trainable weights."""

    def __init__(self, resolution: int, grid: int) -> None:
        super().__init__(resolution, grid)
        self.layer = nn.Linear(12, 12)

    def forward(self, images):
        return self.layer(super().forward(images))


@broken("encoder", "is_deterministic", "draws random numbers (dropout?)")
class Noisy(toys.ToyEncoder):
    """Adds random noise."""

    def forward(self, images):
        tokens = super().forward(images)
        return tokens + 0.01 * torch.randn_like(tokens)


@broken("encoder", "images_are_independent", "depends on the other images of the batch")
class BatchNormed(toys.ToyEncoder):
    """Subtracts the batch mean."""

    def forward(self, images):
        tokens = super().forward(images)
        return tokens - tokens.mean(0)


@broken("encoder", "keeps_fp64", "tokens is float32 in an fp64 run")
class AlwaysFloat(toys.ToyEncoder):
    """Always casts to fp32."""

    def forward(self, images):
        return super().forward(images).float()


@broken("encoder", "works_in_bf16", "tokens is float16 under bf16 autocast")
class HalfUnderAutocast(toys.ToyEncoder):
    """Confuses fp16 with bf16."""

    def forward(self, images):
        tokens = super().forward(images)
        return tokens.half() if torch.is_autocast_enabled("cpu") else tokens


@broken("encoder", "saves_and_loads", "neither a parameter nor a persistent buffer")
class HiddenWeights(toys.ToyEncoder):
    """Draws a matrix that no checkpoint contains."""

    def __init__(self, resolution: int, grid: int) -> None:
        super().__init__(resolution, grid)
        self.hidden = torch.randn(12, 12)

    def forward(self, images):
        tokens = super().forward(images)
        return tokens @ self.hidden.to(tokens.dtype)


@broken("encoder", "builds_on_the_meta_device", "cannot be made on torch.device('meta')")
class LooksAtValues(toys.ToyEncoder):
    """Reads its weights in the constructor."""

    def __init__(self, resolution: int, grid: int) -> None:
        super().__init__(resolution, grid)
        self.positive = bool(torch.randn(3).sum() > 0)


@broken("encoder", "compiles_in_one_graph", "cannot be compiled in one graph")
class GraphBreak(toys.ToyEncoder):
    """Branches on a tensor's value."""

    def __init__(self, resolution: int, grid: int) -> None:
        super().__init__(resolution, grid)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, images):
        tokens = super().forward(images) * self.scale
        return tokens if tokens.mean().item() < 3 else tokens / 2


# Denoisers


@broken("denoiser", "keeps_shapes", "velocity has shape (1, 8, 8, 8)")
class PredictsSigma(toys.ToyDenoiser):
    """Returns twice the velocity's channels, as for a learned variance."""

    def forward(self, x_t, t, condition):
        out = super().forward(x_t, t, condition)
        return DenoiserOutput(torch.cat([out.velocity] * 2, 1), out.tokens)


@broken("denoiser", "sets_every_attribute", "has no attribute null_label: expected int")
class NoNullLabel(toys.ToyDenoiser):
    """Does not declare its null label."""

    def __init__(self, latent, num_classes) -> None:
        super().__init__(latent, num_classes)
        del self.null_label


@broken("denoiser", "has_valid_attributes", "null_label = 0 is one of the 10 classes")
class NullIsAClass(toys.ToyDenoiser):
    """Uses a class as its null label."""

    def __init__(self, latent, num_classes) -> None:
        super().__init__(latent, num_classes)
        self.null_label = 0


@broken(
    "denoiser", "keeps_the_conditions_shapes", "null_condition returns label with shape (1,) and torch.int64; expected"
)
class OneNullLabel(toys.ToyDenoiser):
    """Returns one null label for a whole batch."""

    def null_condition(self, condition):
        return condition._replace(label=torch.tensor([self.null_label]))


@broken("denoiser", "tokens_match_the_forward_pass", "tokens() differs from the tokens of a full forward pass")
class OtherTokens(toys.ToyDenoiser):
    """Returns other tokens from ``forward`` than from ``tokens``."""

    def forward(self, x_t, t, condition):
        out = super().forward(x_t, t, condition)
        return DenoiserOutput(out.velocity, self.blocks[1](out.tokens))


@broken("denoiser", "depends_on_all_inputs", "does not depend on t")
class Timeless(toys.ToyDenoiser):
    """Ignores the time."""

    def tokens(self, x_t, t, condition):
        return super().tokens(x_t, 0 * t, condition)


@broken("denoiser", "tokens_pass_gradients", "no gradient reaches the latents through tokens()")
class DetachedTokens(toys.ToyDenoiser):
    """Detaches the tokens from the alignment loss."""

    def tokens(self, x_t, t, condition):
        return super().tokens(x_t, t, condition).detach()


@broken("denoiser", "every_weight_gets_a_gradient", "no output depends on: idle.weight, idle.bias")
class IdleWeights(toys.ToyDenoiser):
    """Has a layer that is never called."""

    def __init__(self, latent, num_classes) -> None:
        super().__init__(latent, num_classes)
        self.idle = nn.Linear(3, 3)


@broken("denoiser", "is_deterministic", "draws random numbers (dropout?)")
class Dropout(toys.ToyDenoiser):
    """Drops tokens in training."""

    def tokens(self, x_t, t, condition):
        return F.dropout(super().tokens(x_t, t, condition), 0.1, self.training)


class _Initialized(toys.ToyDenoiser):
    """Initializes itself correctly; base of the broken ones."""

    def __init__(self, latent, num_classes) -> None:
        super().__init__(latent, num_classes)
        self.register_buffer("positions", torch.empty(self.grid**2))
        self.register_buffer("order", torch.empty(self.grid**2, dtype=torch.int64))
        _Initialized.init_weights(self)

    def init_weights(self):
        for module in (self.embed, self.labels, self.out, *self.blocks):
            module.reset_parameters()
        self.positions.copy_(torch.linspace(-1, 1, self.grid**2))
        self.order.copy_(torch.arange(self.grid**2))

    def tokens(self, x_t, t, condition):
        tokens = super().tokens(x_t, t, condition)
        return tokens[:, self.order] + self.positions.to(tokens.dtype)[:, None]


@broken("denoiser", "builds_on_the_meta_device", "leaves uninitialized: positions")
class ForgetsABuffer(_Initialized):
    """Initializes its parameters but not its buffers."""

    def init_weights(self):
        kept = self.positions.clone()
        super().init_weights()
        self.positions.copy_(kept)


@broken("denoiser", "builds_on_the_meta_device", "init_weights() sets order to other values than __init__")
class ForgetsIndices(_Initialized):
    """Leaves an integer buffer uninitialized."""

    def init_weights(self):
        super().init_weights()
        self.order.zero_()


@broken("denoiser", "shards_with_fsdp2", "fails under FSDP2 (weights used outside the forward of a unit")
class LyingUnits(toys.ToyDenoiser):
    """Uses a unit's weights without calling the unit."""

    def tokens(self, x_t, t, condition):
        block, self.blocks[0] = self.blocks[0], nn.Identity()
        try:
            tokens = super().tokens(x_t, t, condition)
        finally:
            self.blocks[0] = block
        return F.linear(tokens, block.weight, block.bias)


@broken("denoiser", "has_valid_units", "units()[0] (Linear) is not a sub-module")
class ForeignUnits(toys.ToyDenoiser):
    """Lists a unit that is not its submodule."""

    def units(self):
        return [nn.Linear(2, 2)]


@broken("denoiser", "has_valid_units", "or also contains one of its sub-modules")
class NestedUnits(toys.ToyDenoiser):
    """Lists a module list together with its items."""

    def units(self):
        return [self.blocks, *self.blocks]


@broken("denoiser", "shards_with_fsdp2", "fails under FSDP2")
class WeightsBesideForward(toys.ToyDenoiser):
    """Uses a unit's weight before calling the unit, while the weight is still sharded."""

    def tokens(self, x_t, t, condition):
        return super().tokens(x_t * self.blocks[0].bias.mean(), t, condition)


# Tokenizers


@broken(
    "tokenizer", "keeps_shapes", "the posterior's mean has shape (1, 4, 4, 4) for 1 images of 16 px; expected (1, 4"
)
class WrongFactor(toys.ToyTokenizer):
    """Declares a factor of 8 but downsamples by 4."""

    factor = 8


@broken("tokenizer", "clamps_logvar", "end with .clamp(-30.0, 20.0)")
class Unbounded(toys.ToyTokenizer):
    """Does not clamp the log-variance."""

    def encode(self, x):
        return Posterior(*self.encoder(x).chunk(2, dim=1))


@broken("tokenizer", "passes_gradients", "decode passes no finite, nonzero gradient to the latents")
class NoGradientThroughDecode(toys.ToyTokenizer):
    """Decodes without gradients."""

    @torch.no_grad()
    def decode(self, z):
        return super().decode(z)


@broken("tokenizer", "declares_frozen_weights", "set trainable = False")
class SecretlyFrozen(toys.ToyTokenizer):
    """Is frozen without declaring it."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


@broken("tokenizer", "works_in_bf16", "mean is bfloat16 under bf16 autocast")
class RoundedPosterior(toys.ToyTokenizer):
    """Sums its KL in bf16."""


# Losses


@broken("loss", "is_a_scalar", "must be a scalar tensor, but is (1, 3, 32, 32)")
class PerPixel(toys.ToyL1):
    """Returns a value per pixel instead of a mean."""

    def forward(self, x, x_hat, posterior):
        return (x - x_hat).abs()


@broken("loss", "sets_every_attribute", "has no attribute weight: expected float")
class Weightless(ReconstructionLoss):
    """Has no weight."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x, x_hat, posterior):
        return (x - x_hat).abs().mean()


@broken("loss", "works_in_bf16", "loss is bfloat16 under bf16 autocast")
class RoundedLoss(toys.ToyL1):
    """Averages in bf16."""

    def forward(self, x, x_hat, posterior):
        return (x.to(x_hat.dtype) - x_hat).abs().mean()


@broken("loss", "has_a_gradient", "not finite if image and reconstruction are equal")
class RootOfZero(toys.ToyL1):
    """Takes the square root of a sum of squares that can be zero."""

    def forward(self, x, x_hat, posterior):
        return (x - x_hat.to(x.dtype)).square().sum().sqrt()


@broken("loss", "is_frozen", "network.weight, network.bias: trainable, but has no optimizer")
class LearnedLoss(ReconstructionLoss):
    """Has weights."""

    weight = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 4, 3)

    def forward(self, x, x_hat, posterior):
        return (self.network(x) - self.network(x_hat)).abs().float().mean()


@broken("loss", "shards_with_fsdp2", "fails under FSDP2 (weights used outside the forward of a unit")
class NoUnits(toys.ToyAdversary):
    """Does not list its network as a unit."""

    def units(self):
        return []


@broken("loss", "sets_every_attribute", "weight = '0.1' is a str; expected float")
class WordForAWeight(toys.ToyAdversary):
    """Has a string as its weight."""

    weight = "0.1"


@broken("loss", "overrides_every_method", "does not define discriminator; see components.contracts.AdversarialLoss")
class OneSided(AdversarialLoss):
    """Has only the generator's loss."""

    weight = 1.0

    def __init__(self) -> None:
        super().__init__()

    def generator(self, x_hat, step):
        return x_hat.mean()


@broken("loss", "has_both_losses", "no gradient reaches the reconstruction")
class DetachedGenerator(toys.ToyAdversary):
    """Detaches the generator's loss from the reconstruction."""

    def generator(self, x_hat, step):
        return super().generator(x_hat.detach(), step)


@broken("loss", "is_deterministic", "keeps state between calls outside of buffers")
class Remembers(toys.ToyAdversary):
    """Keeps a number outside of its buffers."""

    calls = 0

    def generator(self, x_hat, step):
        self.calls += 1
        return self.calls * super().generator(x_hat, step)


@broken("loss", "makes_heads", "expected (2, 16, 24)")
class HeadsOfOneSize(toys.ToyAlignment):
    """Ignores the encoders' dimensions."""

    def make_heads(self, width, embed_dims, grid):
        return nn.ModuleList(nn.Linear(width, 7) for _ in embed_dims)


@broken("loss", "sets_every_attribute", "has no attribute denoiser_weight")
class OneWeight(AlignmentLoss):
    """Has a weight for only one of its two losses."""

    tokenizer_weight = 1.0
    make_heads, align = toys.ToyAlignment.make_heads, toys.ToyAlignment.align


@broken("loss", "prefers_the_target", "is not below that of random tokens")
class Repels(toys.ToyAlignment):
    """Has the wrong sign."""

    def align(self, projected, targets):
        return -super().align(projected, targets)


# Datasets


class _Gray(Dataset):
    """Gray images of two classes; a correct dataset."""

    num_classes, class_names = 2, ("dark", "light")

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> DatasetItem:
        if not 0 <= index < 100:
            raise IndexError(index)
        side = self.resolution
        return DatasetItem(torch.full((3, side, side), index % 2 * 255, dtype=torch.uint8), index % 2)


@broken("dataset", "labels_are_in_range", "is 2, outside [0, num_classes = 2)")
class LabelsFromOne(_Gray):
    """Counts classes from 1."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return DatasetItem(item.image, item.label + 1)


@broken("dataset", "returns_images_at_every_resolution", "expected torch.uint8")
class FloatImages(_Gray):
    """Returns images that are already scaled to float."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return DatasetItem(item.image / 255, item.label)


@broken("dataset", "returns_images_at_every_resolution", "has shape (48, 48, 3) at resolution 48")
class ChannelsLast(_Gray):
    """Returns channels last, except at one resolution."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item if self.resolution == 32 else DatasetItem(item.image.permute(1, 2, 0), item.label)


@broken("dataset", "items_depend_on_the_index_only", "item 0 differs between two reads")
class RandomCrops(_Gray):
    """Draws from the global generator."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return DatasetItem(torch.randint(256, item.image.shape, dtype=torch.uint8), item.label)


@broken("dataset", "raises_index_error_at_the_end", "item 100 of 100 does not raise IndexError")
class Endless(_Gray):
    """Wraps around at its end."""

    def __getitem__(self, index):
        return super().__getitem__(index % 100)


@broken("dataset", "can_be_pickled", "cannot be pickled")
class OpenFile(_Gray):
    """Holds an open file, which cannot be sent to another process."""

    def __init__(self, resolution: int) -> None:
        super().__init__(resolution)
        self.read = lambda index: index


@broken("dataset", "names_its_classes", "one name for each of its 2 classes")
class Nameless(_Gray):
    """Does not name its classes."""

    class_names = ()


@broken("dataset", "returns_its_conditions", "conditions = (), but an item's condition has ['brightness']")
class UndeclaredCondition(_Gray):
    """Returns a condition that it does not declare."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item._replace(condition={"brightness": item.image.float().mean()})


@broken("dataset", "judges_images", "judge() returns torch.float32 (3, 2); expected int64 (3,)")
class LogitsForLabels(_Gray):
    """Its judge returns logits."""

    has_judge = True

    def judge(self, images):
        return torch.zeros(len(images), 2)


@broken("dataset", "judges_images", "judge_features() returns (3, 4); expected (3, 8), finite")
class OtherFeatures(_Gray):
    """Declares another number of features than its judge returns."""

    judge_dim = 8

    def judge_features(self, images):
        return torch.zeros(len(images), 4)


# Recipes


class _Sound(Recipe):
    """Trains the tokenizer's reconstruction and the denoiser's velocity; a correct recipe."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm", "reconstruction"})
    trains = {"tokenizer": ("tokenizer",), "denoiser": ("denoiser",)}

    def step(self, m, batch, random, update, step):
        posterior = m.tokenizer.encode(batch.images)
        z = posterior.sample(random["posterior"])
        loss = m.reconstruction["l1"](batch.images, m.tokenizer.decode(z), posterior)
        update("tokenizer", {"l1": LossTerm(1.0, loss)})
        update("denoiser", {"velocity": LossTerm(1.0, self.velocity(m, z.detach(), batch, random))})

    def velocity(self, m, z, batch, random):
        t = m.flow.times(random["time"])
        path = m.flow.sample(m.latent_norm.batch(z), t, random["noise"])
        return (m.denoiser(path.x_t, t, batch.condition).velocity.to(z.dtype) - path.velocity).square().mean()


@broken("recipe", "declares_its_parts", "not fields: ['vae']")
class UnknownPart(_Sound):
    """Refers to the tokenizer by another name."""

    uses = frozenset({"vae"})


@broken("recipe", "declares_its_parts", "copies['teacher'] = 'student': expected the name of a module in uses")
class CopiesNothing(_Sound):
    """Copies a module that no recipe has."""

    copies = {"teacher": "student"}


@broken("recipe", "sets_every_attribute", "trains = ('denoiser',) is a tuple; expected dict[str, tuple[str")
class NoGroups(_Sound):
    """Lists modules without groups."""

    trains = ("denoiser",)


@broken(
    "recipe", "declares_its_random_numbers", "random_numbers()['time'] is a str; expected components.contracts.Dist"
)
class NamesADistribution(_Sound):
    """Declares a distribution by its name alone."""

    def random_numbers(self, m, latent):
        return super().random_numbers(m, latent) | {"time": "uniform"}


@broken("recipe", "takes_a_step", "step uses random['time'], which random_numbers() does not declare: posterior, noise")
class Undeclared(_Sound):
    """Does not declare all of its random numbers."""

    def random_numbers(self, m, latent):
        return {name: Distribution("normal", latent) for name in ("posterior", "noise")}


@broken("recipe", "takes_a_step", "step updates the groups ['denoiser', 'tokenizer'], but trains lists ['denoiser']")
class UnknownGroup(_Sound):
    """Updates a group that it does not train."""

    trains = {"denoiser": ("denoiser",)}


@broken("recipe", "trains_each_group_with_its_own_losses", "sends gradients into tokenizer")
class NoStopGradient(_Sound):
    """Lets the diffusion loss reach the tokenizer."""

    def step(self, m, batch, random, update, step):
        posterior = m.tokenizer.encode(batch.images)
        z = posterior.sample(random["posterior"])
        loss = m.reconstruction["l1"](batch.images, m.tokenizer.decode(z.detach()), posterior)
        update("tokenizer", {"l1": LossTerm(1.0, loss)})
        update("denoiser", {"velocity": LossTerm(1.0, self.velocity(m, z, batch, random))})


@broken("recipe", "changes_no_module", "does not restore requires_grad of denoiser.")
class LeavesFrozen(_Sound):
    """Freezes a module and does not unfreeze it."""

    def step(self, m, batch, random, update, step):
        super().step(m, batch, random, update, step)
        m.denoiser.requires_grad_(False)


@broken("recipe", "changes_no_module", "step changes the weight denoiser.")
class StepsItself(_Sound):
    """Updates the weights itself."""

    def step(self, m, batch, random, update, step):
        super().step(m, batch, random, update, step)
        with torch.no_grad():
            next(m.denoiser.parameters()).mul_(0.9)


@broken("recipe", "is_deterministic", "which would differ between ranks; declare them in random_numbers()")
class OwnNoise(_Sound):
    """Draws its own times."""

    def velocity(self, m, z, batch, random):
        return super().velocity(m, z, batch, random | {"time": torch.rand_like(random["time"])})


@broken("recipe", "keeps_losses_in_fp32", "term velocity of 'denoiser' is torch.bfloat16 under bf16 autocast")
class RoundedVelocity(_Sound):
    """Computes the velocity loss in bf16."""

    def velocity(self, m, z, batch, random):
        return super().velocity(m, z, batch, random).to(torch.get_autocast_dtype("cpu") if _autocast() else z.dtype)


@broken("recipe", "keeps_its_state_in_a_skipped_step", "init_state()['count'] is a int; expected a tensor")
class CountsInPython(_Sound):
    """Keeps a number as its state."""

    def init_state(self, m):
        return {"count": 0}


class _Teacher(_Sound):
    """Averages the denoiser's weights; a correct recipe with a copy."""

    copies = {"teacher": "denoiser"}

    @torch.no_grad()
    def after_step(self, m, finite, step):
        for average, value in zip(m.copies["teacher"].parameters(), m.denoiser.parameters()):
            average.lerp_(value, 0.1 * finite.to(average.dtype))


@broken("recipe", "keeps_its_state_in_a_skipped_step", "weight of a skipped step; where finite is false")
class AveragesAlways(_Teacher):
    """Updates its copy also if the step is skipped."""

    def after_step(self, m, finite, step):
        super().after_step(m, torch.ones_like(finite), step)


@broken("recipe", "samples_images", "sampling.method = 'half' returns images of shape (2, 3, 16, 16)")
class SamplesSmallImages(_Sound):
    """Brings a sampler that returns only a part of the latents."""

    samplers = {"half": lambda denoiser, noise, condition, **options: noise[..., :4, :4]}


@broken("recipe", "trains_on_cached_latents", "fails on a batch without images")
class NeedsImages(_Sound):
    """Declares that it trains on cached latents, but uses the images."""

    uses = frozenset({"tokenizer", "denoiser", "latent_norm"})
    trains = {"denoiser": ("denoiser",)}
    cached_latents = True

    def step(self, m, batch, random, update, step):
        with torch.no_grad():
            z = m.tokenizer.encode(batch.images).sample(random["posterior"])
        update("denoiser", {"velocity": LossTerm(1.0, self.velocity(m, z, batch, random))})


# Optimizers


class _Descent(Optimizer):
    """Gradient descent with momentum; a correct optimizer.

    Args:
        momentum: decay of the average.
    """

    dtype = None

    def __init__(self, modules, lr, *, momentum: float = 0.5) -> None:
        super().__init__(list(self.chosen(modules)), {"lr": lr, "momentum": momentum})

    def chosen(self, modules):
        return trained_parameters(modules).values()

    def skips(self):
        return torch.zeros(()) if self.found_inf is None else self.found_inf

    def buffer(self, p):
        if not self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p, dtype=self.dtype)
        return self.state[p]["momentum"]

    def direction(self, p, momentum):
        return momentum

    def rate(self, group):
        return group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                weight, buffer = local(p), local(self.buffer(p))
                momentum = buffer.lerp(local(p.grad).to(buffer.dtype), 1 - group["momentum"])
                new = weight - self.rate(group) * self.direction(p, momentum)
                for old, value in ((weight, new), (buffer, momentum)):
                    old.copy_(torch.where(self.skips() > 0, old, value))


@broken("optimizer", "options_differ_from_the_common_keys", "the options clip_norm are keys of [optimizer]")
class ClipsItself(_Descent):
    """Has an option that the trainer reads.

    Args:
        clip_norm: largest norm.
    """

    def __init__(self, modules, lr, *, clip_norm: float = 1.0) -> None:
        super().__init__(modules, lr)


@broken("optimizer", "trains_every_parameter", "a step does not change net.")
class TrainsMatrices(_Descent):
    """Trains only what has two dimensions."""

    def chosen(self, modules):
        return (p for p in super().chosen(modules) if p.ndim == 2)


@broken("optimizer", "takes_the_learning_rate_of_the_schedule", "changes with a learning rate of 0")
class OwnRate(_Descent):
    """Keeps its first learning rate."""

    def rate(self, group):
        return self.defaults["lr"]


@broken("optimizer", "keeps_everything_in_a_skipped_step", "changes in a skipped step")
class NeverSkips(_Descent):
    """Ignores found_inf."""

    def skips(self):
        return torch.zeros(())


@broken("optimizer", "does_not_wait_for_the_device", "a step waits for the device")
class Waits(_Descent):
    """Reads found_inf on the host."""

    def step(self, closure=None):
        self.skips().item()
        super().step()


@broken("optimizer", "can_be_resumed", "differs after a resume")
class HidesItsState(_Descent):
    """Keeps its state in an attribute."""

    def buffer(self, p):
        vars(self).setdefault("buffers", {})
        return self.buffers.setdefault(p, torch.zeros_like(p))


@broken("optimizer", "keeps_fp64", "torch.float32 for fp64 weights")
class KeepsFp32(_Descent):
    """Keeps its state in fp32."""

    dtype = torch.float32


@broken("optimizer", "works_on_shards", "the state momentum is not sharded")
class Unsharded(_Descent):
    """Keeps a plain tensor as the state of a sharded weight."""

    def buffer(self, p):
        if not self.state[p]:
            self.state[p]["momentum"] = torch.zeros(p.shape, dtype=p.dtype)
        return self.state[p]["momentum"]


def _autocast() -> Any:
    return torch.is_autocast_enabled("cpu")
