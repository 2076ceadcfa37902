"""Making a machine ready: what does not start is said at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from builds import hostsetup
from builds.console import Reporter
from builds.engine import Engine
from builds.errors import InfrastructureError
from builds.model import Arch


def test_an_engine_that_ends_at_once_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = tmp_path / "dockerd"
    daemon.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    daemon.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(hostsetup, "_SYSTEMD", tmp_path / "none")
    monkeypatch.setattr(hostsetup, "_PID_FILES", ())
    monkeypatch.setattr(hostsetup, "_ENGINE_LOG", tmp_path / "log")
    monkeypatch.setattr(hostsetup, "_answering", lambda: None)
    with pytest.raises(InfrastructureError, match="ended at once"):
        hostsetup._start_engine(Reporter())
    assert (tmp_path / "log").read_text() == "no\n"


@pytest.mark.parametrize(
    ("arches", "installed"),
    [
        ((), {"qemu-system-x86"}),
        ((Arch.AMD64,), {"qemu-system-x86"}),
        ((Arch.ARM64, Arch.ARM64), {"qemu-system-x86", "qemu-system-arm"}),
    ],
)
def test_the_machines_that_load_modules_are_installed(
    arches: tuple[Arch, ...], installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already is not asked for; commands and engine only pretend."""
    asked: list[hostsetup.Need] = []
    programs = {need.command for need in hostsetup.MACHINES.values()}
    there: set[str] = set()
    monkeypatch.setattr(shutil, "which", lambda name: None if name in programs - there else f"/usr/bin/{name}")
    monkeypatch.setattr(hostsetup, "_answering", lambda: Engine(None, "unix:///x", "1", "amd64"))  # type: ignore[arg-type]
    monkeypatch.setattr(hostsetup, "_apt_knows_archive", lambda: True)
    monkeypatch.setattr(hostsetup, "_emulate", lambda *_: False)
    monkeypatch.setattr(hostsetup, "_install", lambda needs, _: asked.extend(needs))
    hostsetup.prepare(Reporter(), arches)
    assert {package for need in asked for package in need.packages} == installed
    assert len(asked) == len(installed)
    asked.clear()
    there |= programs
    hostsetup.prepare(Reporter(), arches)
    assert asked == []
