"""The C library's allocator, told to keep the memory of freed tensors for the next ones."""

import ctypes

# glibc's malloc.h; see mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1  # bytes at the end of the heap that are worth giving back


def keep_freed_memory() -> bool:
    """Keep large buffers that are freed, where glibc would hand them back and fault them in anew for each tensor.

    That is for the whole process, so it is for a command that owns its process and for no library. docs/performance.md
    has the time that it saves on a CPU, and the memory that it costs: what is kept does not fit whatever comes next.
    Returns whether this system's C library has the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no CDLL(None)
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
