"""Memory that a training on the CPU frees and wants again at its next step."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the largest that glibc takes
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the allocator keep what is freed instead of handing it back to the system.

    A step frees its memory in pieces and takes it again, and glibc hands back whatever lies at the end of its heap:
    9,800 page faults a step of a ViT of width 128, about a tenth of its time (docs/log.md). The process stays as
    large as it was at the height of a step.

    Returns:
        Whether this system's allocator was told; other systems have other habits.
    """
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # Setting one of the two ends glibc's own adjustment of the other.
        return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _NEVER))
    return False
