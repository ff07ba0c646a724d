"""glibc's allocator, told to keep what is freed.

By default it returns large blocks to the system and fetches others for the next layer, whose every
page is then a fault: of a pass over 8,192 tokens on a virtual machine, a tenth of the time.
"""

import ctypes
import os
import sys
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as <malloc.h> numbers them
LARGEST = 2**28  # bytes of a block that is kept: 29,000 tokens of ModernBERT-base in float32
KEPT = 2**29  # bytes
CHOSEN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def glibc() -> ctypes.CDLL | None:
    """The C library; None where it is not glibc, or the environment chooses how it allocates."""
    if sys.platform != "linux" or any(os.environ.get(name) for name in CHOSEN):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


@cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 512 MiB that it has freed, for what it allocates next.

    False where nothing was changed, for want of `glibc`.
    """
    library = glibc()
    if library is None:
        return False
    kept = library.mallopt(MMAP_THRESHOLD, LARGEST) and library.mallopt(TRIM_THRESHOLD, KEPT)
    return bool(kept)
