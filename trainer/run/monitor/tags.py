"""Every scalar that a run shows: what it means, and in which unit. TensorBoard shows it beside the curve."""

from __future__ import annotations

import re

# Patterns of tags, the first that matches the whole tag holds; {0}, {1} are its groups.
_TABLE = (
    # -- losses, by parameter group
    (r"(\w+)/loss", "What trains {0}: the weighted sum of its terms."),
    (r"(\w+)/l1", "Absolute difference of image and reconstruction, mean over pixels in [-1, 1]."),
    (r"(\w+)/l2", "Squared difference of image and reconstruction, mean over pixels in [-1, 1]."),
    (r"(\w+)/lpips", "LPIPS distance of image and reconstruction."),
    (r"(\w+)/kl", "KL divergence of the posterior from N(0, I), in nats, summed over the latent of an image."),
    (r"(\w+)/gan", "The generator's side of the adversarial loss; 0 before its start step."),
    (r"(\w+)/align", "Alignment loss: mean of -cos between projected hidden tokens and the encoder's; -1 is perfect."),
    (r"(\w+)/velocity", "Mean squared error of the predicted velocity, on normalized latents."),
    (r"(\w+)/class_velocity", "Mean squared error of the class token's predicted velocity."),
    (r"discriminator/hinge", "Hinge loss of the discriminator: 1 where it cannot tell real from fake, 0 if it wins."),
    (r"discriminator/logits_real", "The discriminator's mean output on images; above its output on reconstructions."),
    (r"discriminator/logits_fake", "The discriminator's mean output on reconstructions."),
    # -- optimization
    (r"grad_norm/(\w+)", "Euclidean norm of the gradient of all parameters of {0}, before clipping."),
    (r"lr/(\w+)", "Learning rate of {0}."),
    (r"skipped_steps", "Share of the steps that were not applied, since a loss or a gradient norm was not finite."),
    (r"alarms/(\w+)", "1 at each step where the guard raised the alarm {0}; details in alarms/ of the run's folder."),
    # -- latents
    (r"latent/variance", "Running variance of the latents, mean over channels; the guard watches it."),
    (r"latent/mean", "Mean of the latents of a step, before the latent norm."),
    (
        r"latent/spatial_variance",
        "Variance of the latents over positions, of each image and channel, averaged over both. In REPA-E "
        "(arXiv 2504.10483) it falls from 17 to 0.02 where the diffusion loss trains the VAE.",
    ),
    (r"latent/total_variation", "Absolute difference of neighboring positions of the latents, mean."),
    (r"latent_norm/mean", "Running mean of the latent norm, averaged over channels."),
    (r"latent_norm/mean_abs_max", "Running mean of the latent norm: the largest magnitude of a channel."),
    (r"latent_norm/variance_mean", "Running variance of the latent norm, averaged over channels."),
    (r"latent_norm/variance_min", "Running variance of the latent norm: the smallest channel's; 0: it is unused."),
    (r"latent_norm/variance_max", "Running variance of the latent norm: the largest channel's."),
    # -- time and machine
    (r"time/step", "Milliseconds of a whole step on rank 0."),
    (r"time/data", "Milliseconds of a step in which rank 0 had no data."),
    (r"time/encoders", "Milliseconds of a step in the frozen encoders' forward passes, on rank 0."),
    (r"time/optimizer", "Milliseconds of a step in gradient norms, clipping, optimizers and EMA, on rank 0."),
    (r"time/outside/share", "Share of the time since the last point in which rank 0 did not train."),
    (r"time/outside/(\w+)", "Seconds since the last point that rank 0 spent on {0} instead of training."),
    (r"time/(\w+)", "Milliseconds of a step in the forward and backward passes of {0}, on rank 0."),
    (
        r"speed/images_per_s",
        "Images per second over all ranks while training: without the time of pictures, evaluation, saving, logging.",
    ),
    (r"speed/images_per_s_per_gpu", "Images per second of one rank, while training."),
    (
        r"speed/tflops_per_gpu",
        "TFLOP/s per rank that the model needs: operations of an image's forward and backward passes, nothing "
        "recomputed, times images per second.",
    ),
    (r"speed/mfu", "Model FLOPs utilization: speed/tflops_per_gpu over the GPU's dense bf16 peak by its data sheet."),
    (r"speed/data_wait_share", "Share of the training time spent waiting for data, on the rank that waits longest."),
    (r"speed/slowest_rank_ratio", "Time of a fixed computation on the slowest rank over the median rank's."),
    (r"memory/allocated_gib", "GiB of tensors on rank 0's GPU at this moment."),
    (r"memory/reserved_gib", "GiB that PyTorch's allocator holds on rank 0's GPU."),
    (r"memory/peak_gib", "GiB of tensors on rank 0's GPU at most since the start of the process."),
    (r"memory/resident_gib", "GiB of host memory that rank 0's process holds."),
    (r"data/unreadable", "Images that could not be read and were replaced, since the start of the run."),
    (r"data/epoch", "How often the dataset was seen."),
    # -- pictures and evaluation
    (r"samples/judged_right", "Share of the samples in the grid that the dataset's own classifier recognizes."),
    (r"evaluation/(fid|sfid|rfid)", "Frechet distance to real images on Inception's features; lower is better."),
    (r"evaluation/is", "Inception Score of the samples; higher is better."),
    (r"evaluation/precision", "Share of the samples that lie among real images; higher is better."),
    (r"evaluation/recall", "Share of real images that lie among the samples; higher is better."),
    (r"evaluation/psnr", "Peak signal-to-noise ratio of reconstructions in dB; higher is better."),
    (r"evaluation/ssim", "Structural similarity of images and reconstructions; 1 is best."),
    (r"evaluation/lpips", "LPIPS distance of images and reconstructions; lower is better."),
    (r"evaluation/(.+)", "{0} of the samples against the reference."),
    (r"(\w+)/(\w+)", "Term {1} of the loss that trains {0}, before its weight."),
)  # fmt: skip
_PATTERNS = [(re.compile(pattern), text) for pattern, text in _TABLE]
_LOSS_TERM = _TABLE[-1][1]


def describe(tag: str) -> str | None:
    """What a scalar means, with its unit; None: not a tag of a run."""
    for pattern, text in _PATTERNS:
        if match := pattern.fullmatch(tag):
            return text.format(*match.groups())
    return None


def is_generic(tag: str) -> bool:
    """Whether nothing more is known of a tag than that it is a term of a loss."""
    return next(text for pattern, text in _PATTERNS if pattern.fullmatch(tag)) == _LOSS_TERM
