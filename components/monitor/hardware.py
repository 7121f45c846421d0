"""Memory and peak throughput of GPUs by name, for estimates."""

from __future__ import annotations

import re

# GiB as PyTorch reports it ("total capacity" in an out-of-memory message); boards differ by 0.1 GiB.
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

# TFLOP/s of dense bf16 matrix products with fp32 accumulation, from vendor data sheets.
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

# The same by `torch.cuda.get_device_name()`: the first pattern that matches. Form factors of one chip differ.
_BY_DEVICE_NAME = (
    (r"\b(H100|H800) PCIe\b", 756),
    (r"\b(H100|H200) NVL\b", 835),
    (r"\b(H100|H200|H800|GH200)\b", 989),
    (r"\bGB200\b", 2500),
    (r"\bB200\b", 2250),
    (r"\b(A100|A800)\b", 312),
    (r"\bL40S\b", 362),
    (r"\bL40\b", 181),
    (r"\bL4\b", 121),
    (r"\bA10G\b", 70),
    (r"\bA10\b", 125),
    (r"\bRTX 4090 D\b", 147),
    (r"\bRTX 4090\b", 165),
    (r"\bRTX 3090 Ti\b", 80),
    (r"\bRTX 3090\b", 71),
    (r"\bMI300X\b", 1307),
)


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU according to the vendor's data sheet, or None if unknown.

    Args:
        device_name: as returned by ``torch.cuda.get_device_name()``, such as "NVIDIA H100 80GB HBM3".
    """
    return next((tflops for pattern, tflops in _BY_DEVICE_NAME if re.search(pattern, device_name)), None)
