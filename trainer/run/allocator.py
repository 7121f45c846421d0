"""How glibc's allocator treats freed memory, for runs on a CPU; other C libraries are left alone."""

from __future__ import annotations

import ctypes
import os

SWITCH = "TITANREPA_KEEP_MEMORY"  # 0 leaves the allocator as it is
# From malloc.h.
M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = 1, -1, -3, -4
# glibc's defaults, of thresholds those that it moves to once large tensors have been freed.
DEFAULTS = {M_MXFAST: 128, M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}
EAGER = 65536  # bytes

keeps = False  # whether this process keeps freed memory


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
    return _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_MXFAST: 0}, keeps_now=True)


def restore_defaults() -> bool:
    """Undo :func:`keep_freed_memory`; returns whether glibc accepted it."""
    return _set(DEFAULTS)


def return_freed_memory() -> bool:
    """Make glibc return freed tensors to the system at once, so that resident memory counts live tensors only.

    Returns:
        Whether glibc accepted it.
    """
    if not _set({M_MMAP_MAX: DEFAULTS[M_MMAP_MAX], M_MMAP_THRESHOLD: EAGER, M_TRIM_THRESHOLD: EAGER}):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set(values: dict[int, int], keeps_now: bool = False) -> bool:
    global keeps
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc; TypeError: Windows
        return False
    accepted = [mallopt(key, value) for key, value in values.items()]
    keeps = all(accepted) and keeps_now
    return all(accepted)
