"""What a program in a sandbox may touch: Python's own files, to read."""

import os
import pathlib
import sys
import sysconfig
from typing import Any

__all__ = ["SANDBOXES", "job"]


def _readable() -> list[str]:
    """The folders and files of this Python without its packages, and the system's libraries."""
    paths = {
        *("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"),
        _python(),
        sysconfig.get_config_var("LIBDIR") or "",
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
    }
    bases = {path.replace(sys.prefix, sys.base_prefix, 1) for path in paths if path}
    return sorted(path for path in bases if os.path.exists(path))


def _python() -> str:
    """The interpreter itself, which an environment only links to."""
    return str(pathlib.Path(sys.executable).resolve())


def _sandlock() -> dict[str, Any]:
    """The options of `sandlock.Sandbox`. Network and system calls are refused by its defaults.

    Without its copy-on-write folder: in 0.9.0, a change of mode through a symbolic link in that
    folder reaches the file outside.
    """
    return {
        "fs_readable": [*_readable(), "/dev/urandom"],
        "fs_writable": [os.devnull],
        "cwd": "/",
        "max_processes": 1,
        "clean_env": True,
        "no_coredump": True,
    }


def _bubblewrap() -> dict[str, Any]:
    """The command before the command: new namespaces, and a file system of what is named."""
    mounts = [part for path in _readable() for part in ("--ro-bind", path, path)]
    devices = [part for path in (os.devnull, "/dev/urandom") for part in ("--dev-bind", path, path)]
    return {
        "command": [
            *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns"),
            *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"),
            *mounts,
            *devices,
            *("--remount-ro", "/", "--chdir", "/", "--"),
        ]
    }


# In the order in which they are tried.
SANDBOXES = {"sandlock": _sandlock, "bubblewrap": _bubblewrap}


def job(
    sandbox: str,
    code: str,
    tests: str | None,
    entry_point: str | None,
    timeout_s: float,
    memory_mb: int,
) -> dict[str, Any]:
    """A job for the worker, as plain data.

    `-I -S` starts Python without the user's settings and packages.
    """
    return {
        "sandbox": sandbox,
        "options": SANDBOXES[sandbox](),
        "python": [_python(), "-I", "-S"],
        "code": code,
        "tests": tests,
        "entry_point": entry_point,
        "timeout_s": timeout_s,
        "memory_mb": memory_mb,
    }
