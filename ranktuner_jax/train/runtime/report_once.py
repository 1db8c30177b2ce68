"""Prints a user error once, from process 0, even if all processes of a run raise it.

Another process stays silent only if process 0 confirms that it printed the same message; otherwise
it prints its own. Once the processes are connected (`jax.distributed`), process 0 puts its message
into JAX's key-value store. Before that, it serves the message on the coordinator's port, where
JAX's service would be, so that no process waits for others that may never start.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # The store has no public API.

from ranktuner_jax.errors import AlreadyReported, UserError

__all__ = ["report_once"]

_KEY = "ranktuner/user_error"
_TIMEOUT_SECONDS = 5.0


@contextlib.contextmanager
def report_once(args: argparse.Namespace) -> Iterator[None]:
    """Prints a `UserError` in the block once, even if all processes raise it.

    Args:
      args: The flags of `distributed.add_arguments`.

    Raises:
      AlreadyReported: In place of a `UserError` that process 0 has printed.
    """
    try:
        yield
    except UserError as error:
        if not _is_reported(str(error), args):
            raise
        raise AlreadyReported(str(error)) from error


def _is_reported(message: str, args: argparse.Namespace) -> bool:
    """Whether process 0 has printed this message; on process 0, prints it first."""
    if jax.distributed.is_initialized():
        store: Any = jax_distributed.global_state.client
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if jax_distributed.global_state.process_id == 0:
                _print_error(message)
                store.key_value_set(_KEY, message)
                return True
            reported = store.blocking_key_value_get(_KEY, int(1000 * _TIMEOUT_SECONDS))
            return bool(reported == message)
        return False
    host, _, port = (args.coordinator or "").rpartition(":")
    if not port.isdigit() or args.processes is None or args.process is None:
        return False
    if args.process == 0:
        _print_error(message)
        with contextlib.suppress(OSError):
            _serve(message, int(port), args.processes - 1)
        return True
    return _receive(host, int(port)) == message


def _print_error(message: str) -> None:
    print(f"ranktuner: {message}", file=sys.stderr, flush=True)


def _serve(message: str, port: int, times: int) -> None:
    """Sends the message to the other processes as they connect."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=dual) as server:
        for _ in range(times):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            connection, _ = server.accept()
            with connection:
                connection.sendall(message.encode())


def _receive(host: str, port: int) -> str:
    """The message that process 0 serves; "" if it serves none."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0) as peer:
            peer.settimeout(1.0)  # JAX's service, if running, keeps the connection open.
            parts = []
            while part := peer.recv(4096):
                parts.append(part)
            return b"".join(parts).decode(errors="replace")
        time.sleep(0.1)
    return ""
