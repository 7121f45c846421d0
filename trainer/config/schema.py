"""Tables of a config and their fields, each with its type, default, unit and meaning.

Options in a table that names a plugin are not validated here, but against the plugin's signature
(``components.registry``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from components import registry

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class PluginTable(BaseModel):
    """Name of a plugin and its options."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    name: str
    """Name of the plugin; `python -m trainer plugins` lists them."""

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EncoderTable(PluginTable):
    """Name of an encoder, its options, and its weight in the alignment loss."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Relative weight of this encoder in the alignment loss, a weighted mean over encoders."""


class Run(Table):
    dir: str = ""
    """Output folder: checkpoints, TensorBoard events, images, log. Empty: outputs/<name of the config file>."""
    log_every: Positive = 100
    """Log and write TensorBoard scalars every N steps; each time costs one device synchronization."""
    checkpoint_every: NotNegative = 10_000
    """Save a checkpoint every N steps; 0: only at the end and on interruption."""
    keep_checkpoints: Positive = 3
    """Number of newest checkpoints to keep."""
    keep_every: NotNegative = 0
    """Also keep every checkpoint whose step is a multiple of this; 0: none."""
    async_checkpoints: bool = True
    """Write periodic checkpoints in the background during training; needs host memory for one copy."""


class Training(Table):
    steps: Positive = 400_000
    """Optimizer steps of the whole run, across restarts."""
    batch_size: Positive = 256
    """Global batch size: images per step over all ranks and micro-batches."""
    accumulation: Positive = 1
    """Gradient accumulation: micro-batches per step and rank. Exact except for batch norms, which normalize each
    micro-batch by its own statistics."""
    resolution: Positive = 256
    """Height and width of the images in pixels."""
    num_classes: NotNegative = 0
    """Number of classes; 0: taken from the dataset."""
    allow_fewer_classes: bool = False
    """Allow `num_classes` above the dataset's number of classes. The labels without images are never sampled."""
    seed: NotNegative = 0
    """Seed of the initial weights, the data order and all random numbers of training."""
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Precision of the networks. bf16: autocast with fp32 weights, norms and losses; on a CPU without AMX the same as
    fp32."""
    tf32: bool = True
    """Use TF32 for fp32 matrix products and convolutions on GPUs."""
    compile: bool = False
    """Apply torch.compile to each block, stage and encoder."""
    deterministic: bool = False
    """Use only deterministic kernels; slower on GPUs. CPU runs are bit-for-bit reproducible without it."""
    channels_last: bool | Literal["auto"] = "auto"
    """Use the channels-last memory format in convolutional modules. auto: except in eager mode on a GPU, where
    PyTorch's group norm would copy every feature map."""
    threads: NotNegative = 0
    """CPU threads per process; 0: PyTorch's default."""
    gc_every: NotNegative = 500
    """Run Python's garbage collection every N steps, on all ranks at once, so that no rank stalls the others; 0: leave
    it to Python."""


class ParallelTable(Table):
    strategy: Literal["fsdp", "hsdp", "ddp", "none"] = "fsdp"
    """fsdp: shard weights over all ranks; ddp: replicate them; hsdp: shard them within groups of `shard` ranks and
    replicate across groups; none: a single process. All are equivalent on one process."""
    shard: NotNegative = 0
    """For hsdp: ranks per sharding group; 0: the ranks of one machine."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass: saves memory, costs a second all-gather."""
    shard_frozen: bool = False
    """Also shard frozen encoders, LPIPS and a frozen tokenizer, instead of replicating them on every rank."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory: much slower, for models that do not fit."""
    timeout_s: Positive = 600
    """Seconds after which a collective fails if a rank does not answer."""


def _recompute(text: str) -> str:
    from components.distributed.activation_checkpoint import Recompute

    Recompute.parse(text)
    return text


RecomputeForm = Annotated[str, AfterValidator(_recompute)]


class ActivationCheckpoint(Table):
    denoiser: RecomputeForm = "none"
    """Recomputation of the denoiser's blocks in the backward pass: none; full; "every N": every N-th block; selective:
    all but matrix products, convolutions and attention; "budget F": the compiler stores a fraction F of the
    activations."""
    tokenizer: RecomputeForm = "none"
    """The same for the stages of a trained tokenizer."""


class GuardTable(Table):
    policy: Literal["warn", "rollback", "stop"] = "warn"
    """Action on an alarm. warn: log it; rollback: reload the last good checkpoint and skip the data seen since; stop:
    end the run with a report."""
    max_rollbacks: NotNegative = 3
    """Maximum number of rollbacks of a run, across restarts; the next alarm stops it."""
    window: Annotated[int, Field(ge=10)] = 200
    """Window of the running medians in steps."""
    skipped: NotNegative = 10
    """Alarm after this many consecutive steps skipped for a non-finite loss or gradient; 0: off."""
    spike: Annotated[float, Field(ge=0)] = 10.0
    """Alarm if a loss or gradient norm exceeds its running median by this many times its spread; 0: off."""
    collapse: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    """Alarm if a gradient norm stays below this fraction of its usual value for `patience` steps; 0: off."""
    latent_variance: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Alarm if the latent variance falls below this fraction of its usual value; 0: off."""
    discriminator: Annotated[float, Field(ge=0)] = 0.01
    """Alarm if the discriminator's loss stays below this for `patience` steps; 0: off."""
    patience: Positive = 100
    """Consecutive steps before `collapse` and `discriminator` raise an alarm."""


class Loader(Table):
    workers: NotNegative = 4
    """Data-loading processes per rank; 0: load in a thread of the trainer."""
    prefetch: Positive = 2
    """Batches that each worker loads ahead."""
    max_unreadable: Fraction = 0.01
    """Stop the run if more than this fraction of the images is unreadable."""


class FlowTable(Table):
    path: Literal["linear", "cosine"] = "linear"
    """Interpolant between latents and noise."""
    time: Literal["uniform", "lognormal"] = "uniform"
    """Distribution of the training times t. lognormal: sigma / alpha is log-normal, so that t is logit-normal on the
    linear path."""
    time_mean: Annotated[float, Field(ge=-10, le=10)] = 0.0
    """For lognormal: mean of log(sigma / alpha); above 0: more weight on high noise."""
    time_std: Annotated[float, Field(gt=0, le=10)] = 1.0
    """For lognormal: standard deviation of log(sigma / alpha)."""
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Timestep shift: factor on sigma / alpha, in training and sampling. 1: none; above 1: more weight on high noise;
    auto: sqrt(number of latent elements / 4096)."""


class LatentCacheTable(Table):
    path: str = ""
    """Latent cache written by `encode`, to train on; empty: encode the images of every batch."""
    features: bool = True
    """Read the encoders' features from the cache if it has them; false: compute them from the images."""


class LatentNormTable(Table):
    momentum: Fraction = 0.1
    """Weight of the current batch in the running statistics."""
    eps: Annotated[float, Field(gt=0)] = 1e-4
    """Added to the variance."""
    statistics: str = ""
    """Initial latent mean and standard deviation: a file, or a diffusers folder whose config.json states them; empty:
    measure them before the first step."""
    images: Positive = 2048
    """Number of training images used to measure the initial statistics."""
    fixed: bool = False
    """Normalize with the initial statistics throughout, instead of a batch norm: an ablation of the paper."""
    per_position: bool = False
    """Normalize each channel of each position by its own statistics, as RAE does; false: each channel. It ties the
    denoiser to one resolution."""


def _points(points: list[list[float]]) -> list[list[float]]:
    if any(len(pair) != 2 or pair[0] != int(pair[0]) or min(pair) < 0 for pair in points):
        raise ValueError("expected pairs [step, factor], such as [[10000, 1.0], [20000, 0.1]]; neither below 0")
    if any(later[0] <= earlier[0] for earlier, later in zip(points, points[1:])):
        raise ValueError("steps must ascend")
    return points


class OptimizerTable(Table):
    model_config = ConfigDict(extra="allow")

    name: str = "adamw"
    """Optimizer; `python -m trainer plugins optimizer` lists them. Its options belong in the same table."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Maximum gradient norm of the group; 0: no clipping."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "piecewise"] = "constant"
    """Learning-rate schedule after warmup: constant; linear or cosine decay to lr * final_lr_ratio; wsd: constant, then
    that decay at the end (`decay_steps`); piecewise: through `points`."""
    warmup_steps: NotNegative = 0
    """Steps of linear warmup from zero."""
    final_lr_ratio: Fraction = 0.0
    """For linear, cosine and wsd: learning rate at the last step as a fraction of the peak."""
    decay_steps: NotNegative = 0
    """For wsd: steps of the decay at the end of the run; 0: `decay_fraction` of the run."""
    decay_fraction: Fraction = 0.1
    """For wsd: steps of the decay as a fraction of `training.steps`."""
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    """For wsd: shape of the decay, linear or by the square root of its progress."""
    points: Annotated[list[list[float]], AfterValidator(_points)] = []
    """For piecewise: pairs [step, factor on lr] with ascending steps; before the first and after the last pair, the
    factor is theirs."""
    between: Literal["linear", "constant"] = "linear"
    """For piecewise: interpolate linearly between points, or keep a point's factor until the next one."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the optimizer; tables are those of parameter groups."""
        return {key: value for key, value in (self.model_extra or {}).items() if not isinstance(value, dict)}


class Optimizer(OptimizerTable):
    """Optimizer and its settings for all parameter groups; a sub-table ([optimizer.tokenizer]) overrides them for one
    group."""

    def group(self, name: str) -> OptimizerTable:
        """Settings of one parameter group: the common ones, updated by its sub-table; all options are present.

        A group with another optimizer inherits the options that this one has, too.
        """
        base = {key: value for key, value in self if key in OptimizerTable.model_fields}
        own = (self.model_extra or {}).get(name, {})
        known = registry.optimizers.get(own.get("name", self.name)).options
        defaults = {option.name: option.default for option in known.values() if not option.required}
        inherited = {key: value for key, value in self.options.items() if key in known}
        return OptimizerTable(**(base | defaults | inherited | own))


class Ema(Table):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """EMA decay per step of the denoiser, heads and latent statistics."""
    tokenizer: bool = False
    """Also average the tokenizer; published runs pair the averaged denoiser with the raw tokenizer."""


class Sampling(Table):
    every: NotNegative = 10_000
    """Draw grids of reconstructions and samples every N steps; 0: only at the end."""
    images: Positive = 64
    """Samples per grid, cycling through the classes."""
    method: str = "euler"
    """Sampler: euler (first order) or heun (second order) for the ODE; sde: Euler-Maruyama; or one of the recipe's."""
    steps: Positive = 50
    """Integration steps; heun evaluates the denoiser twice per step, the others once."""
    guidance: Annotated[float, Field(ge=1)] = 4.0
    """Guidance scale; 1: none."""
    guidance_kind: Literal["classifier_free", "internal"] = "classifier_free"
    """What to guide away from. classifier_free: the unconditional velocity, at twice the cost; internal: the denoiser's
    prediction from an early block, at no cost, for a denoiser with `early_depth`."""
    guidance_low: Fraction = 0.0
    """Smallest time t with guidance, inclusive (t = 0 is data)."""
    guidance_high: Fraction = 1.0
    """Largest time t with guidance, inclusive (t = 1 is noise)."""
    shift: Annotated[float, Field(ge=0)] = 0.0
    """Timestep shift in sampling: factor on sigma / alpha of uniform times; above 1: more steps at high noise; 0: as in
    [flow]."""


class EvaluationTable(Table):
    every: NotNegative = 0
    """Evaluate the averaged weights every N steps, with samples generated as in [sampling]; 0: never."""
    images: Positive = 10_000
    """Samples per evaluation; must exceed the feature dimension of each distance."""
    labels: Literal["balanced", "random", "dataset"] = "balanced"
    """Classes of the samples: each equally often, drawn uniformly, or drawn as often as in the training data, as by
    `sample --labels`. They depend on the run's seed and the number of the image only."""
    batch_size: Positive = 64
    """Samples per batch and rank."""
    metrics: list[Literal["fid", "sfid", "is", "precision", "recall", "mind", "fd_judge", "judged_right"]] = ["fid"]
    """Metrics of the samples. fid to mind: on Inception features; fd_judge: Frechet distance on features of the
    dataset's own classifier; judged_right: fraction that it assigns to their class."""
    encoders: list[str] = []
    """Additional Frechet distances of the samples on encoders, e.g. "dinov2:size=l"."""
    reconstruction: list[Literal["psnr", "ssim", "lpips", "rfid", "rfd", "rfd_judge"]] = []
    """Metrics of reconstructions: rfid, rfd (on each of `encoders`) and rfd_judge are Frechet distances between
    originals and reconstructions."""
    reconstruction_images: Positive = 5_000
    """Reconstruct the first N images."""
    heldout: dict[str, Any] = {}
    """Options that turn the run's dataset into held-out images to reconstruct, e.g. {split = "heldout"} or
    {path = "imagenet/val"}; empty: reconstruct training images."""
    reference: str = "dataset"
    """Reference for the metrics: the run's dataset, or a statistics file (.npz)."""
    reference_images: NotNegative = 50_000
    """Use the first N images of the dataset as reference; 0: all. Measured once and kept in the run folder."""
    inception_weights: str = ""
    """File of Inception weights; empty: torch-fidelity's own."""
    allow_singular: bool = False
    """Allow distances with fewer images than features, with a warning."""

    @property
    def wanted(self) -> list[str]:
        """All metrics named, of samples and reconstructions."""
        return [*self.metrics, *self.reconstruction]


class ProfileTable(Table):
    steps: NotNegative = 0
    """Number of steps to record with PyTorch's profiler after each start, into profile/ of the run folder; 0: none.
    Same as `train --profile=N`."""
    first: NotNegative = 10
    """Steps to run before recording, so that compilation and allocator growth are over."""
    memory: bool = True
    """Also record allocations during these steps, for a GPU memory snapshot."""


class Config(Table):
    """Config of one run. A table that names a plugin also holds the plugin's options."""

    plugins: list[str] = []
    """Modules ("my_lab.encoders") or files ("my_encoder.py") with additional plugins."""
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
        """Serialize every key that is not None, in a form that :func:`trainer.config.loads` reads."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))
