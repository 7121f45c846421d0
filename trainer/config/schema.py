"""The tables of a config and their fields, each with its type, default, unit and meaning.

A table that names a plugin keeps its options as they are; the plugin's own signature is their schema
(``components.registry``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True)


class PluginTable(BaseModel):
    """A plugin's name and its options."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    name: str
    """Name of the plugin; `python -m trainer plugins` lists them."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EncoderTable(PluginTable):
    """An encoder's name and its options, with its part in the alignment loss."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of this encoder in the mean over encoders that is the alignment loss."""


class Run(Table):
    dir: str = ""
    """Folder of the run: checkpoints, TensorBoard events, images, log. Empty: outputs/<name of the config file>."""
    log_every: Positive = 100
    """Steps between two log lines and TensorBoard points; each costs one device synchronisation."""
    checkpoint_every: NotNegative = 10_000
    """Steps between two checkpoints; 0: only at the end and on interruption."""
    keep_checkpoints: Positive = 3
    """Newest checkpoints that are kept."""
    keep_every: NotNegative = 0
    """Checkpoints of steps that this divides are kept for ever; 0: none."""
    async_checkpoints: bool = True
    """Write periodic checkpoints in the background while training goes on; takes host memory for one copy."""


class Training(Table):
    steps: Positive = 400_000
    """Optimizer steps of the whole run, resumed parts included."""
    batch_size: Positive = 256
    """Images per step over all ranks and micro-batches."""
    accumulation: Positive = 1
    """Micro-batches per step and rank; exact but for batch norms, which see one micro-batch at a time."""
    resolution: Positive = 256
    """Side of the square images in pixels."""
    num_classes: NotNegative = 0
    """Number of class labels; 0: as many as the dataset has."""
    seed: NotNegative = 0
    """Seed of the weights, the data order and every random draw."""
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Arithmetic of the networks. bf16: autocast with fp32 weights, norms and losses; on a CPU it means fp32."""
    tf32: bool = True
    """TF32 in fp32 matrix products and convolutions on GPUs."""
    compile: bool = False
    """torch.compile each block, stage and encoder."""
    deterministic: bool = False
    """Deterministic kernels only; slower on GPUs. CPU runs repeat bit for bit without it."""
    channels_last: bool = True
    """Channels-last memory format for convolutional modules."""
    threads: NotNegative = 0
    """CPU threads per process; 0: PyTorch's choice."""
    gc_every: NotNegative = 500
    """Steps between Python's garbage collections, on all ranks at once, so that none waits for another's; 0: Python
    collects when it likes."""


class ParallelTable(Table):
    strategy: Literal["fsdp", "hsdp", "ddp", "none"] = "fsdp"
    """Who holds the weights: fsdp: every rank a part; ddp: every rank all; hsdp: groups of `shard` ranks share a copy;
    none: a single process. With one process all are the same."""
    shard: NotNegative = 0
    """For hsdp: ranks that share one copy of the weights; 0: those of one machine."""
    reshard_after_forward: bool = True
    """Free a block's whole weights between its forward and backward pass: less memory, one more gathering."""
    shard_frozen: bool = False
    """Share out frozen encoders, LPIPS and a frozen tokenizer, too, instead of a copy on every rank."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory: much slower, for models that do not fit."""
    timeout_s: Positive = 600
    """Seconds after which a rank that waits for a lost one gives up."""


def _recompute(text: str) -> str:
    from components.distributed.activation_checkpoint import Recompute

    Recompute.parse(text)
    return text


RecomputeForm = Annotated[str, AfterValidator(_recompute)]


class ActivationCheckpoint(Table):
    denoiser: RecomputeForm = "none"
    """What the denoiser's blocks recompute in the backward pass: none; full; "every N": each N-th block; selective:
    all but matrix products, convolutions and attention; "budget F": the compiler keeps a fraction F."""
    tokenizer: RecomputeForm = "none"
    """The same for the tokenizer's stages, where it learns."""


class GuardTable(Table):
    policy: Literal["warn", "rollback", "stop"] = "warn"
    """At an alarm: warn; rollback: go back to the last good checkpoint and skip the data since; stop with a report."""
    max_rollbacks: NotNegative = 3
    """Rollbacks of a run, restarts included; the next alarm stops it."""
    window: Annotated[int, Field(ge=10)] = 200
    """Steps of the running medians."""
    skipped: NotNegative = 10
    """Alarm after so many steps in a row that were skipped as not finite; 0: never."""
    spike: Annotated[float, Field(ge=0)] = 10.0
    """Alarm at a loss or gradient norm so many times its spread above the running median; 0: never."""
    collapse: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    """Alarm at gradient norms below this fraction of their usual for `patience` steps; 0: never."""
    latent_variance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Alarm at a latent variance below this fraction of its usual; 0: never."""
    discriminator: Annotated[float, Field(ge=0)] = 0.01
    """Alarm at a discriminator's loss below this for `patience` steps; 0: never."""
    patience: Positive = 100
    """Steps in a row before a collapse counts."""


class Loader(Table):
    workers: NotNegative = 4
    """Data-loading processes per rank; 0 loads in a thread of the trainer."""
    prefetch: Positive = 2
    """Batches that each worker holds ready."""
    max_unreadable: Fraction = 0.01
    """Fraction of unreadable images above which the run stops."""


class FlowTable(Table):
    path: Literal["linear", "cosine"] = "linear"
    """Interpolant between latents and noise."""
    time: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of the training times; lognormal: of sigma / alpha, so that t is logit-normal on the linear path."""
    time_mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """For lognormal: mean of log(sigma / alpha); above 0: more noise."""
    time_std: Annotated[float, Field(gt=0, le=10)] = 1.0
    """For lognormal: standard deviation of log(sigma / alpha)."""
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Factor on sigma / alpha of every time, in training and in sampling; above 1: more noise; auto: the root of the
    latent's dimensions over 4096; 1: none."""


class LatentCacheTable(Table):
    path: str = ""
    """Folder made by `encode`: train on its latents; empty: encode the images of every batch."""
    features: bool = True
    """Take the encoders' features from the cache where it has them; false: from the images."""


class LatentNormTable(Table):
    momentum: Fraction = 0.1
    """Weight of a batch in the running statistics."""
    eps: Annotated[float, Field(gt=0)] = 1e-4
    """Added to the variance."""
    statistics: str = ""
    """File with the tokenizer's latent mean and standard deviation, or a diffusers folder, whose config.json has them;
    empty: measured before the first step."""
    images: Positive = 2048
    """Training images from which the statistics are measured when there is no file."""


class OptimizerTable(Table):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's two decay rates per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm of the group above which it is scaled down; 0: never."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or down to final_lr_ratio at the last step."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up from zero."""
    final_lr_ratio: Fraction = 0.0
    """Learning rate at the last step as a fraction of the peak, for linear and cosine."""


class Optimizer(OptimizerTable):
    """Settings of every parameter group; a sub-table ([optimizer.tokenizer]) overrides them for one group."""

    model_config = ConfigDict(extra="allow")

    def group(self, name: str) -> OptimizerTable:
        """The settings of one parameter group."""
        base = {key: getattr(self, key) for key in OptimizerTable.model_fields}
        return OptimizerTable(**(base | (self.model_extra or {}).get(name, {})))


class Ema(Table):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay per step of the averaged denoiser, heads and latent statistics."""
    tokenizer: bool = False
    """Average the tokenizer as well; the published runs pair the averaged denoiser with the raw tokenizer."""


class Sampling(Table):
    every: NotNegative = 10_000
    """Steps between two grids of reconstructions and samples; 0: only at the end."""
    images: Positive = 64
    """Samples per grid, over all classes in turn."""
    method: Literal["euler", "heun", "sde"] = "euler"
    """Integrator: ODE of first or second order, or Euler-Maruyama on the SDE."""
    steps: Annotated[int, Field(ge=2)] = 50
    """Evaluations of the denoiser (twice as many for heun)."""
    guidance: Annotated[float, Field(ge=1)] = 4.0
    """Classifier-free guidance scale; 1: none."""
    guidance_low: Fraction = 0.0
    """Earliest time t with guidance, included (t = 0 is data)."""
    guidance_high: Fraction = 1.0
    """Latest time t with guidance, included (t = 1 is noise)."""
    shift: Annotated[float, Field(ge=0)] = 0.0
    """Factor on sigma / alpha of the integrator's equal steps; above 1: more of them at noise; 0: as in [flow]."""


class EvaluationTable(Table):
    every: NotNegative = 0
    """Steps between two evaluations of samples, made as [sampling] says from the averaged weights; 0: none."""
    images: Positive = 10_000
    """Samples of an evaluation, over all classes in turn; more than the features of each distance."""
    batch_size: Positive = 64
    """Samples at once on each rank."""
    metrics: list[Literal["fid", "sfid", "is", "precision", "recall"]] = ["fid"]
    """Measures on Inception's features."""
    encoders: list[str] = []
    """Frechet distances on registered encoders besides, as "dinov2:size=l"."""
    reference: str = "dataset"
    """What samples are compared with: the first images of the run's dataset, or a file (.npz) of statistics."""
    reference_images: NotNegative = 50_000
    """Images of the dataset that count; 0: all. Measured once, and kept in the run's folder."""
    inception_weights: str = ""
    """File of Inception's weights; empty: torch-fidelity's own."""
    allow_singular: bool = False
    """Give distances of fewer images than features, too, with a warning."""


class ProfileTable(Table):
    steps: NotNegative = 0
    """Steps of a start that PyTorch's profiler records, into profile/ of the run's folder; 0: none. The same as
    `train --profile=N`."""
    first: NotNegative = 10
    """Steps of a start that run before them, so that compilation and the allocator's growth are over."""
    memory: bool = True
    """Record allocations during these steps, too, for a snapshot of a GPU's memory."""


class Config(Table):
    """One run. Tables that name a plugin take its options beside ``name``."""

    plugins: list[str] = []
    """Modules ("my_lab.encoders") or files ("my_encoder.py") with plugins, besides those in plugins/."""
    run: Run = Run()
    training: Training = Training()
    recipe: PluginTable
    tokenizer: PluginTable
    denoiser: PluginTable | None = None
    encoders: dict[str, EncoderTable] = {}
    losses: dict[str, PluginTable] = {}
    dataset: PluginTable
    loader: Loader = Loader()
    parallel: ParallelTable = ParallelTable()
    activation_checkpoint: ActivationCheckpoint = Field(default_factory=ActivationCheckpoint)  # checked with torch
    guard: GuardTable = GuardTable()
    flow: FlowTable = FlowTable()
    latent_cache: LatentCacheTable = LatentCacheTable()
    latent_norm: LatentNormTable = LatentNormTable()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    sampling: Sampling = Sampling()
    evaluation: EvaluationTable = EvaluationTable()
    profile: ProfileTable = ProfileTable()

    def to_toml(self) -> str:
        """Every key with its value, as it can be read back."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))
