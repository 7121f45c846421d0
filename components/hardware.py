"""GPUs by name, for estimates."""

from __future__ import annotations

# GiB as PyTorch reports them (the "total capacity" of an out-of-memory message); boards differ by 0.1 GiB.
GPU_GIB = {
    "rtx3090": 23.5,
    "rtx4090": 23.5,
    "a100-40": 39.4,
    "l40s": 44.4,
    "a100-80": 79.1,
    "h100": 79.1,
    "h200": 139.7,
    "b200": 178.3,
}

# Dense bf16 matrix products with fp32 accumulation, TFLOP/s, by the makers' data sheets.
GPU_TFLOPS = {
    "rtx3090": 71,
    "rtx4090": 165,
    "a100-40": 312,
    "l40s": 362,
    "a100-80": 312,
    "h100": 989,
    "h200": 989,
    "b200": 2250,
}
