"""Text as a condition: a dataset of captioned pictures, and a denoiser that attends to the captions' words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.contracts import Condition, Dataset, DatasetItem, Denoiser, DenoiserOutput, LatentShape
from components.registry import datasets, denoisers

COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}
WORDS = ("", "dark", *COLORS)  # token 0 begins every caption; alone, it is the empty caption
LENGTH = 4  # tokens of the longest caption, and one more


def tokenize(caption: str) -> dict[str, Tensor]:
    """Tokens (LENGTH,), padded with 0, and their mask, True for those of the caption."""
    tokens = [0, *map(WORDS.index, caption.split())]
    text = torch.tensor(tokens + [0] * (LENGTH - len(tokens)))
    return {"text": text, "text_mask": torch.arange(LENGTH) < len(tokens)}


@datasets.register("captioned_colors")
class CaptionedColors(Dataset):
    """Pictures of one color with captions such as "red" and "dark blue".

    Args:
        size: number of pictures.
    """

    num_classes, class_names = 1, ("picture",)
    conditions = ("text", "text_mask")

    def __init__(self, resolution: int, *, size: int = 60) -> None:
        self.resolution, self.size = resolution, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> DatasetItem:
        if not 0 <= index < self.size:
            raise IndexError(f"dataset captioned_colors: index {index} is outside its {self.size} pictures")
        *dark, name = self.caption(index).split()
        color = torch.tensor(COLORS[name]) // (2 if dark else 1)
        image = color.to(torch.uint8)[:, None, None].repeat(1, self.resolution, self.resolution)
        return DatasetItem(image, 0, condition=tokenize(self.caption(index)))

    def sampling_conditions(self, ids: Sequence[int]) -> dict[str, Tensor]:
        found = [tokenize(self.caption(i)) for i in ids]
        return {name: torch.stack([tokens[name] for tokens in found]) for name in self.conditions}

    @staticmethod
    def caption(index: int) -> str:
        name = list(COLORS)[index % len(COLORS)]
        return f"dark {name}" if index // len(COLORS) % 2 else name


@denoisers.register("caption_transformer")
class CaptionTransformer(Denoiser):
    """One token per latent position, which attends to the caption's words; the class is not used.

    Args:
        width: features per token.
        label_dropout: probability of replacing a caption with the empty one in training.
    """

    align_depth = 1

    def __init__(self, latent: LatentShape, num_classes: int, *, width: int = 32, label_dropout: float = 0.1) -> None:
        super().__init__()
        self.width, self.grid = width, latent.height
        self.null_label, self.label_dropout = num_classes, label_dropout
        self.embed = nn.Linear(latent.channels, width)
        self.time = nn.Linear(1, width)
        self.words = nn.Embedding(len(WORDS), width)
        self.blocks = nn.ModuleList(CrossAttention(width) for _ in range(2))
        self.out = nn.Linear(width, latent.channels)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> DenoiserOutput:
        tokens = self.tokens(x_t, t, condition)
        x = self.blocks[1](tokens, *self._text(condition))
        velocity = self.out(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return DenoiserOutput(velocity, tokens)

    def tokens(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x = self.embed(x_t.flatten(2).transpose(1, 2)) + self.time(t.to(x_t.dtype)[:, None])[:, None]
        return self.blocks[0](x, *self._text(condition))

    def null_condition(self, condition: Condition) -> Condition:
        """The empty caption."""
        text, mask = condition.more["text"], condition.more["text_mask"]
        empty = (torch.arange(LENGTH, device=mask.device) == 0).expand_as(mask)
        more = condition.more | {"text": torch.zeros_like(text), "text_mask": empty}
        return super().null_condition(condition)._replace(more=more)

    def example_condition(self, size: int) -> Condition:
        more = {name: tokens.expand(size, -1) for name, tokens in tokenize("dark blue").items()}
        return super().example_condition(size)._replace(more=more)

    def units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def _text(self, condition: Condition) -> tuple[Tensor, Tensor]:
        return self.words(condition.more["text"]), condition.more["text_mask"]


class CrossAttention(nn.Module):
    """Tokens (B, N, width) attend to the words (B, L, width) where the mask (B, L) is True."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        keys, values = self.key_value(words).chunk(2, dim=-1)
        x = x + F.scaled_dot_product_attention(self.query(x), keys, values, attn_mask=mask[:, None])
        return x + self.mlp(x)
