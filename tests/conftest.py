"""What every test shares: no network, few threads, and the data that ships with the repository."""

import os
import socket
import sys
from pathlib import Path

# Before any test imports a library that reads these at import time. Two threads: the machines
# the suite is meant for have two cores, and results do not depend on how many a big one has. Where
# other programs use the cores too, OMP_NUM_THREADS=1 is many times faster: threads that wait for
# each other wait for the others' turns as well.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest

# a busy machine is no failure
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

_ROOT = Path(__file__).resolve().parents[1]
_NETWORK_EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")


def _refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: raises on any connection or name look-up that leaves this machine."""
    if event not in _NETWORK_EVENTS:
        return
    if event == "socket.connect":
        connection, address = arguments
        if isinstance(connection, socket.socket) and connection.family == socket.AF_UNIX:
            return
        host = address[0] if isinstance(address, tuple) else address
    else:
        host = arguments[0]
    if host is None or str(host) == "localhost" or str(host).startswith(("127.", "::1")):
        return
    raise PermissionError(f"tests use no network: {event} to {host!r}")


sys.addaudithook(_refuse_network)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of data and weights that ship with the repository."""
    return _ROOT / "assets"


@pytest.fixture(scope="session")
def emoji(assets: Path) -> Path:
    """The animated emoji set: clips, stills and the JSON files of its splits."""
    return assets / "animated-emoji"
