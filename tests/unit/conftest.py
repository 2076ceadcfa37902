"""Unit tests reach for no engine and no network: an attempt is an error, not a slow test."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block what every engine, registry and download call goes through."""

    def refuse(_socket: socket.socket, address: object) -> None:
        raise AssertionError(f"a unit test wants to connect to {address!r}; mark it `engine` and move it")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
