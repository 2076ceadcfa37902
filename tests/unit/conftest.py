"""Unit tests reach for no engine and no network: an attempt is an error, not a slow test."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from .installer_node import Node


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block what every engine, registry and download call goes through."""

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"a unit test wants to connect to {address!r}; mark it `engine` and move it")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A stand-in node for the installer."""
    node = Node(tmp_path)
    yield node
    for daemon in ("nvidia-persistenced.pid", "nv-fabricmanager", "nvlsm"):
        node.stop_daemon(daemon)
