"""Reference networks for the encoder tests: plain formulas from the papers, in fp64.

The formulas read the same state dicts as the encoders: seeded random weights under the original authors' key names, at
reduced width and depth. This checks conversion and arithmetic together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from components.nn.timm_encoder import TimmEncoder

WIDTH, DEPTH, HEADS, PATCH = 48, 2, 4, 14
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5,) * 3, (0.5,) * 3


def images(side: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1


def in_fp64(encoder: TimmEncoder, x: torch.Tensor) -> torch.Tensor:
    return encoder.double()(x.double())


# Weights -----------------------------------------------------------------------------------------------------


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return random weights of all relevant scales: small enough that a norm's epsilon affects the result."""
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key, value in state.items():
        is_norm = "norm" in key or "ln_" in key
        if is_norm and key.endswith("weight"):
            value.mul_(0.2).add_(1)
        elif "gamma" in key:
            value.mul_(0.1).add_(0.5)
        elif value.ndim == 2 and ("blocks" in key or "attn_pool" in key):
            value.mul_(1.5 / math.sqrt(value.shape[1]))
        else:
            value.mul_(0.02)
    return state


def linear_shapes(linears: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def norm_shapes(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (WIDTH,) for name in names for part in ("weight", "bias")}


def vit_shapes(grid: int, patch: int, class_token: bool = True, depth: int = DEPTH) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the plain vision transformer of DINO, MAE, MoCo v3 and I-JEPA."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, class_token + grid * grid, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
        "patch_embed.proj.bias": (WIDTH,),
    } | norm_shapes("norm")
    if class_token:
        shapes["cls_token"] = (1, 1, WIDTH)
    for i in range(depth):
        linears = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        linears |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        shapes |= linear_shapes({f"blocks.{i}.{name}": shape for name, shape in linears.items()})
        shapes |= norm_shapes(f"blocks.{i}.norm1", f"blocks.{i}.norm2")
    return shapes


def dinov2_state(registers: bool = False, swiglu: bool = False, grid: int = 37) -> dict[str, torch.Tensor]:
    """Keys and shapes of the authors' DINOv2 files."""
    shapes = vit_shapes(grid, PATCH) | {"mask_token": (1, WIDTH)}
    if registers:
        shapes["register_tokens"] = (1, 4, WIDTH)
    for i in range(DEPTH):
        if swiglu:
            hidden = 128
            for name in ("mlp.fc1", "mlp.fc2"):
                del shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"]
            linears = {"mlp.w12": (2 * hidden, WIDTH), "mlp.w3": (WIDTH, hidden)}
            shapes |= linear_shapes({f"blocks.{i}.{name}": shape for name, shape in linears.items()})
        for name in ("ls1", "ls2"):
            shapes[f"blocks.{i}.{name}.gamma"] = (WIDTH,)
    return random_state(shapes)


def clip_state(grid: int = 16, patch: int = PATCH) -> dict[str, torch.Tensor]:
    """Keys and shapes of OpenAI's CLIP, including two keys of the text tower."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 32),
        "ln_final.weight": (32,),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (1 + grid * grid, WIDTH),
        "visual.proj": (WIDTH, 32),
        "visual.conv1.weight": (WIDTH, 3, patch, patch),
    } | norm_shapes("visual.ln_pre", "visual.ln_post")
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
        linears = {"attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (4 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 4 * WIDTH)}
        shapes |= linear_shapes({f"{block}.{name}": shape for name, shape in linears.items()})
        shapes |= norm_shapes(f"{block}.ln_1", f"{block}.ln_2")
    return random_state(shapes)


# Formulas ----------------------------------------------------------------------------------------------------


def constants(pair):
    """Mean and standard deviation, which all published code holds in fp32."""
    return [torch.tensor(values).double().view(1, 3, 1, 1) for values in pair]


def prepared(x, side, pair, resize_first=False, mode="bicubic"):
    """Preprocess images in [-1, 1] for a network."""
    mean, std = constants(pair)
    x = (x.double() + 1) / 2
    if resize_first:
        return (F.interpolate(x, (side, side), mode=mode) - mean) / std
    return F.interpolate((x - mean) / std, (side, side), mode=mode)


def norm(x, p, key, eps):
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() * p[key + ".weight"] + p[key + ".bias"]


def linear(x, p, weight, bias):
    return x @ p[weight].T + p[bias]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(q, k, v):
    """Attention: (B, N, heads, d) each -> (B, N, heads * d)."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


def split_heads(x, heads):
    return [part.unflatten(-1, (heads, -1)) for part in x.split(WIDTH, dim=-1)]


def attention(x, p, weight, bias, heads=HEADS):
    return attend(*split_heads(linear(x, p, weight, bias), heads))


def patches(x, weight):
    """Patch embedding with the convolution's weights: (B, N, WIDTH), row-major."""
    size = weight.shape[-1]
    n = x.shape[-1] // size
    tiles = [
        x[:, :, size * i : size * (i + 1), size * j : size * (j + 1)].flatten(1) for i in range(n) for j in range(n)
    ]
    return torch.stack(tiles, dim=1) @ weight.flatten(1).T


def positions(table, grid, mode="bicubic", antialias=True):
    """Resample position embeddings, (n * n, WIDTH) -> (grid * grid, WIDTH), in fp32 as weight loading does."""
    n = math.isqrt(len(table))
    planes = table.float().T.reshape(1, -1, n, n)
    if n != grid:
        planes = F.interpolate(planes, (grid, grid), mode=mode, align_corners=False, antialias=antialias)
    return planes[0].flatten(1).T.double()


def vit_formula(state, x, grid, *, heads=HEADS, depth=DEPTH, final_norm=True, act=gelu):
    """Plain vision transformer: preprocessed images -> all tokens, the class token first if there is one."""
    p = {key: value.double() for key, value in state.items()}
    x = patches(x, p["patch_embed.proj.weight"]) + p["patch_embed.proj.bias"]
    first = int("cls_token" in p)
    x = x + positions(p["pos_embed"][0, first:], grid)
    if first:
        x = torch.cat([(p["cls_token"] + p["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)
    for i in range(depth):
        b = f"blocks.{i}"
        h = attention(norm(x, p, f"{b}.norm1", 1e-6), p, f"{b}.attn.qkv.weight", f"{b}.attn.qkv.bias", heads)
        x = x + linear(h, p, f"{b}.attn.proj.weight", f"{b}.attn.proj.bias")
        h = act(linear(norm(x, p, f"{b}.norm2", 1e-6), p, f"{b}.mlp.fc1.weight", f"{b}.mlp.fc1.bias"))
        x = x + linear(h, p, f"{b}.mlp.fc2.weight", f"{b}.mlp.fc2.bias")
    return norm(x, p, "norm", 1e-6) if final_norm else x


def dinov2_formula(state, x, grid):
    p = {key: value.double() for key, value in state.items()}
    x = prepared(x, PATCH * grid, IMAGENET)
    x = patches(x, p["patch_embed.proj.weight"]) + p["patch_embed.proj.bias"]
    x = x + positions(p["pos_embed"][0, 1:], grid)
    if "register_tokens" in p:  # no position embedding; the class token's is added in fp32 when weights are loaded
        prefix = torch.cat([(state["cls_token"] + state["pos_embed"][:, :1]).double(), p["register_tokens"]], dim=1)
    else:
        prefix = p["cls_token"] + p["pos_embed"][:, :1]
    x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
    for i in range(DEPTH):
        b = f"blocks.{i}"
        h = attention(norm(x, p, f"{b}.norm1", 1e-6), p, f"{b}.attn.qkv.weight", f"{b}.attn.qkv.bias")
        x = x + p[f"{b}.ls1.gamma"] * linear(h, p, f"{b}.attn.proj.weight", f"{b}.attn.proj.bias")
        h = norm(x, p, f"{b}.norm2", 1e-6)
        if f"{b}.mlp.w12.weight" in p:
            gate, value = linear(h, p, f"{b}.mlp.w12.weight", f"{b}.mlp.w12.bias").chunk(2, dim=-1)
            h = linear(gate * torch.sigmoid(gate) * value, p, f"{b}.mlp.w3.weight", f"{b}.mlp.w3.bias")
        else:
            h = gelu(linear(h, p, f"{b}.mlp.fc1.weight", f"{b}.mlp.fc1.bias"))
            h = linear(h, p, f"{b}.mlp.fc2.weight", f"{b}.mlp.fc2.bias")
        x = x + p[f"{b}.ls2.gamma"] * h
    return norm(x, p, "norm", 1e-6)[:, prefix.shape[1] :]


def clip_formula(state, x, grid, pair=OPENAI, act=lambda h: h * torch.sigmoid(1.702 * h)):
    p = {key.removeprefix("visual."): value.double() for key, value in state.items() if key.startswith("visual.")}
    x = prepared(x, p["conv1.weight"].shape[-1] * grid, pair, resize_first=True)
    x = patches(x, p["conv1.weight"])
    x = torch.cat([p["class_embedding"].expand(len(x), 1, -1), x], dim=1)
    table = p["positional_embedding"]
    x = norm(x + torch.cat([table[:1], positions(table[1:], grid)]), p, "ln_pre", 1e-5)
    for i in range(DEPTH):
        b = f"transformer.resblocks.{i}"
        h = attention(norm(x, p, f"{b}.ln_1", 1e-5), p, f"{b}.attn.in_proj_weight", f"{b}.attn.in_proj_bias")
        x = x + linear(h, p, f"{b}.attn.out_proj.weight", f"{b}.attn.out_proj.bias")
        h = act(linear(norm(x, p, f"{b}.ln_2", 1e-5), p, f"{b}.mlp.c_fc.weight", f"{b}.mlp.c_fc.bias"))
        x = x + linear(h, p, f"{b}.mlp.c_proj.weight", f"{b}.mlp.c_proj.bias")
    return x[:, 1:]  # without ln_post and proj
