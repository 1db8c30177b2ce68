"""Memory that was freed goes back to the operating system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["release_memory"]


def release_memory() -> None:
    """Gives the pages of freed arrays on CPUs back to the operating system.

    glibc keeps what it freed for arrays of the same size. The arrays of a sampler change their
    sizes again and again, so a process would grow to several times of what it uses. Other C
    libraries give pages back by themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
