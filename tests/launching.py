"""Ranks of `mlx.launch` on this machine, on ports of their own.

Ranks find each other by port, and tests run side by side: on the usual ports they would join each other's runs.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

LAUNCHER = str(Path(sys.executable).with_name("mlx.launch"))


def free_port(count: int = 2) -> str:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        sockets = [socket.socket() for _ in range(count)]
        try:
            for k, one in enumerate(sockets):
                one.bind(("127.0.0.1", port + k))
            return str(port)
        except (OSError, OverflowError):
            continue  # one of them is taken, or beyond the last port
        finally:
            for one in sockets:
                one.close()


def launched(*words: str, ranks: int = 2) -> list[str]:
    """The command that runs a Python program as several ranks."""
    ports = ["--starting-port", free_port(ranks)]
    return [LAUNCHER, "-n", str(ranks), "--backend", "ring", *ports, "--", sys.executable, *words]
