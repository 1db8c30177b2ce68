"""A mistake that every process of a run makes is said by one of them.

Nothing is kept silent on a guess: a process says nothing only where process 0 has told it that it
said the very same. Once they have met (`jax.distributed`), process 0 leaves its message in JAX's
key-value store. Before that it hands it out at the coordinator's port, where JAX's service would
be, so that nobody waits for processes that may never be started.
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
from jax._src import distributed as jax_distributed  # JAX has no other way to its store.

from ranktuner_jax.errors import SaidElsewhere, UserError

__all__ = ["one_voice"]

_KEY = "ranktuner/mistake"
_PATIENCE_SECONDS = 5.0


@contextlib.contextmanager
def one_voice(args: argparse.Namespace) -> Iterator[None]:
    """Lets a `UserError` that comes up in all processes be said once.

    Args:
      args: The flags of `distributed.add_arguments`.

    Raises:
      SaidElsewhere: In place of a `UserError` that has been said.
    """
    try:
        yield
    except UserError as error:
        if not _said(str(error), args):
            raise
        raise SaidElsewhere(str(error)) from error


def _said(message: str, args: argparse.Namespace) -> bool:
    """Whether a message needs no saying any more; process 0 says it here."""
    if jax.distributed.is_initialized():
        store: Any = jax_distributed.global_state.client
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if jax_distributed.global_state.process_id == 0:
                _say(message)
                store.key_value_set(_KEY, message)
                return True
            found = store.blocking_key_value_get(_KEY, int(1000 * _PATIENCE_SECONDS))
            return bool(found == message)
        return False
    host, _, port = (args.coordinator or "").rpartition(":")
    if not port.isdigit() or args.processes is None or args.process is None:
        return False
    if args.process == 0:
        _say(message)
        with contextlib.suppress(OSError):
            _hand_out(message, int(port), args.processes - 1)
        return True
    return _ask(host, int(port)) == message


def _say(message: str) -> None:
    print(f"ranktuner: {message}", file=sys.stderr, flush=True)


def _hand_out(message: str, port: int, times: int) -> None:
    """Tells the others, as they come and ask, what was said."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=dual) as server:
        for _ in range(times):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            connection, _ = server.accept()
            with connection:
                connection.sendall(message.encode())


def _ask(host: str, port: int) -> str:
    """What process 0 said; "" where it said nothing, or is not there."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0) as peer:
            peer.settimeout(1.0)  # JAX's service, where it is, keeps the connection open.
            parts = []
            while part := peer.recv(4096):
                parts.append(part)
            return b"".join(parts).decode(errors="replace")
        time.sleep(0.1)
    return ""
