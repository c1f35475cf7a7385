"""A setting of the C library's allocator: keep the memory of freed tensors for the next tensors."""

import ctypes

# glibc's malloc.h; see mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1  # give memory at the end of the heap back only if it is as large as this


def keep_freed_memory() -> bool:
    """Keep large buffers that are freed. By default, glibc gives them back and asks for new memory for each tensor.

    The setting is for the whole process, so the `ldm` command uses it and the library does not. docs/performance.md has
    the time that it saves on a CPU and the memory that it costs: a kept buffer does not fit every later tensor.
    Returns whether this system's C library has the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no CDLL(None)
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
