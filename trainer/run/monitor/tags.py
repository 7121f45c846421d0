"""Descriptions of all scalars of a run, with their units, which TensorBoard shows next to the curves."""

from __future__ import annotations

import re

# (pattern, description); the first pattern that matches the whole tag applies, and {0}, {1} are its groups.
_TABLE = (
    # -- losses, by parameter group
    (r"discriminator/loss", "Loss that trains discriminator: the weighted sum of its terms."),
    (r"(\w+)/loss", "Loss that trains {0}: the weighted sum of its terms; lower is better."),
    (r"(\w+)/l1", "Mean absolute error of the reconstruction, over pixel values in [-1, 1]; lower is better."),
    (r"(\w+)/l2", "Mean squared error of the reconstruction, over pixel values in [-1, 1]; lower is better."),
    (r"(\w+)/lpips", "LPIPS distance between image and reconstruction; lower is better."),
    (r"(\w+)/kl", "KL divergence of the posterior from N(0, I), in nats, summed over the latent of an image."),
    (r"(\w+)/gan", "Generator loss against the discriminator; 0 before its start step."),
    (r"(\w+)/gan_weight", "Factor by which the weight of the generator loss adapts to the gradients."),
    (
        r"(\w+)/align",
        "Alignment loss: mean of -cos between projected hidden tokens and the encoder's, at least -1; lower is better.",
    ),
    (r"(\w+)/velocity", "Mean squared error of the predicted velocity, on normalized latents; lower is better."),
    (r"(\w+)/early_velocity", "The same of the prediction from an early block, for internal guidance."),
    (r"(\w+)/class_velocity", "Mean squared error of the predicted velocity of the class token."),
    (r"discriminator/hinge", "Hinge loss of the discriminator: 1 if it cannot tell real from fake, 0 if it wins."),
    (r"discriminator/logits_real", "Mean output of the discriminator on images; above that on reconstructions."),
    (r"discriminator/logits_fake", "Mean output of the discriminator on reconstructions."),
    # -- optimization
    (r"grad_norm/(\w+)", "L2 norm of the gradient of all parameters of {0}, before clipping."),
    (r"lr/(\w+)", "Learning rate of {0}."),
    (r"skipped_steps", "Fraction of steps skipped because a loss or a gradient norm was not finite."),
    (r"alarms/(\w+)", "1 at each step where the guard raised the alarm {0}; details in alarms/ of the run folder."),
    # -- latents
    (r"latent/variance", "Running variance of the latents, mean over channels; the guard monitors it."),
    (r"latent/mean", "Mean of the latents of a step, before the latent norm."),
    (
        r"latent/spatial_variance",
        "Variance of the latents over positions, averaged over images and channels. In REPA-E (arXiv 2504.10483) it "
        "falls from 17 to 0.02 if the diffusion loss trains the VAE.",
    ),
    (r"latent/total_variation", "Mean absolute difference between neighboring positions of the latents."),
    (r"latent_norm/mean", "Running mean of the latent norm, averaged over channels."),
    (r"latent_norm/mean_abs_max", "Running mean of the latent norm: maximum magnitude over channels."),
    (r"latent_norm/variance_mean", "Running variance of the latent norm, averaged over channels."),
    (r"latent_norm/variance_min", "Running variance of the latent norm: minimum over channels; 0: an unused channel."),
    (r"latent_norm/variance_max", "Running variance of the latent norm: maximum over channels."),
    # -- time and machine
    (r"time/step", "Milliseconds of a whole step on rank 0."),
    (r"time/data", "Milliseconds per step that rank 0 waits for data."),
    (r"time/encoders", "Milliseconds per step in the frozen encoders' forward passes, on rank 0."),
    (r"time/optimizer", "Milliseconds per step in gradient norms, clipping, optimizers and EMA, on rank 0."),
    (r"time/outside/share", "Fraction of the time since the last point that rank 0 did not spend on training."),
    (r"time/outside/(\w+)", "Seconds since the last point that rank 0 spent on {0} instead of training."),
    (r"time/(\w+)", "Milliseconds per step in the forward and backward passes of {0}, on rank 0."),
    (
        r"speed/images_per_s",
        "Training images per second over all ranks, excluding the time of drawing, evaluation, saving and logging; "
        "higher is better.",
    ),
    (r"speed/images_per_s_per_gpu", "Training images per second and rank."),
    (
        r"speed/tflops_per_gpu",
        "Model TFLOP/s per rank: FLOPs of forward and backward passes per image, without recomputation, times images "
        "per second.",
    ),
    (r"speed/mfu", "Model FLOPs utilization: speed/tflops_per_gpu over the GPU's dense bf16 peak from its data sheet."),
    (r"speed/data_wait_share", "Fraction of training time spent waiting for data, on the rank that waits longest."),
    (r"speed/slowest_rank_ratio", "Time of a fixed computation on the slowest rank, relative to the median rank."),
    (r"memory/allocated_gib", "Current GiB of tensors on rank 0's GPU."),
    (r"memory/reserved_gib", "GiB reserved by PyTorch's allocator on rank 0's GPU."),
    (r"memory/peak_gib", "Peak GiB of tensors on rank 0's GPU since the start of the process."),
    (r"memory/resident_gib", "Resident host memory of rank 0's process in GiB."),
    (r"data/unreadable", "Images that could not be read and were replaced, since the start of the run."),
    (r"data/epoch", "Number of passes over the dataset."),
    # -- images and evaluation
    (
        r"samples/judged_right",
        "Fraction of the samples in the grid that the dataset's own classifier recognizes; higher is better.",
    ),
    (r"evaluation/judged_right", "Fraction of samples that the dataset's own classifier recognizes; higher is better."),
    (r"evaluation/(fid|sfid)", "Frechet distance to real images on Inception features; lower is better."),
    (r"evaluation/rfid", "Frechet distance of reconstructions to originals on Inception features; lower is better."),
    (r"evaluation/fd_judge", "Frechet distance to real images on features of the dataset's judge; lower is better."),
    (r"evaluation/rfd_(\w+)", "Frechet distance of reconstructions to originals on {0}; lower is better."),
    (r"evaluation/fd_(\w+)", "Frechet distance to real images on {0}; lower is better."),
    (r"evaluation/is", "Inception Score of the samples; higher is better."),
    (r"evaluation/mind", "Sliced Wasserstein distance to real images on Inception features (MIND); lower is better."),
    (r"evaluation/fdr6", "Frechet distance relative to validation images, mean of six encoders; lower is better."),
    (r"evaluation/precision", "Fraction of samples within the manifold of real images; higher is better."),
    (r"evaluation/recall", "Fraction of real images within the manifold of samples; higher is better."),
    (r"evaluation/psnr", "Peak signal-to-noise ratio of reconstructions in dB; higher is better."),
    (r"evaluation/ssim", "Structural similarity of images and reconstructions, at most 1; higher is better."),
    (r"evaluation/lpips", "LPIPS distance between images and reconstructions; lower is better."),
    (r"evaluation/(.+)", "{0} of the samples against the reference."),
    (r"(\w+)/(\w+)", "Term {1} of the loss that trains {0}, before weighting."),
)  # fmt: skip
_PATTERNS = [(re.compile(pattern), text) for pattern, text in _TABLE]
_LOSS_TERM = _TABLE[-1][1]


def describe(tag: str) -> str | None:
    """Description of a scalar, with its unit; None: not a tag of a run."""
    for pattern, text in _PATTERNS:
        if match := pattern.fullmatch(tag):
            return text.format(*match.groups())
    return None


def is_generic(tag: str) -> bool:
    """Whether only the generic description of a loss term applies to a tag."""
    return next(text for pattern, text in _PATTERNS if pattern.fullmatch(tag)) == _LOSS_TERM


def direction(tag: str) -> int:
    """Whether a higher value of a scalar is better (1), or a lower one (-1), as its description says; else 0."""
    text = describe(tag) or ""
    return ("higher is better" in text) - ("lower is better" in text)
