"""How glibc's allocator treats freed memory, for runs on a CPU; other C libraries are left alone."""

from __future__ import annotations

import ctypes
import os

SWITCH = "TITANREPA_KEEP_MEMORY"  # 0 leaves the allocator as it is
# From malloc.h.
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = 1, -1, -3, -4
MMAP_MAX = 65536  # glibc's default
EAGER = 65536  # bytes


def keep_freed_memory() -> bool:
    """Make glibc reuse freed memory, instead of mapping, clearing and unmapping each tensor above 32 MiB.

    Memory that this process frees stays with it until it ends. Does nothing if the user has set the allocator (MALLOC_*
    or malloc's GLIBC_TUNABLES), or ``TITANREPA_KEEP_MEMORY=0``.

    Returns:
        Whether glibc accepted it.
    """
    set_by_user = any(name.startswith("MALLOC_") for name in os.environ)
    if set_by_user or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or os.environ.get(SWITCH) == "0":
        return False
    # Without fast bins, which glibc would empty after each large tensor.
    return _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_MXFAST: 0})


def return_freed_memory() -> bool:
    """Make glibc return freed tensors to the system at once, so that resident memory counts live tensors only.

    Returns:
        Whether glibc accepted it.
    """
    if not _set({M_MMAP_MAX: MMAP_MAX, M_MMAP_THRESHOLD: EAGER, M_TRIM_THRESHOLD: EAGER}):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set(values: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc; TypeError: Windows
        return False
    accepted = [mallopt(key, value) for key, value in values.items()]
    return all(accepted)
