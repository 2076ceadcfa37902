"""Making a machine ready: what does not start is said at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builds import hostsetup
from builds.console import Reporter
from builds.errors import InfrastructureError


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
