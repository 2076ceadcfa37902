"""Make a bare Debian machine ready: a container engine that answers, and the commands that the lab needs.

Runs only when named; says what it installs and does nothing where nothing is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import engine
from .console import Reporter
from .errors import InfrastructureError

_WAIT = 60  # seconds until a started engine must answer
_ENGINE_LOG = Path("/var/log/dockerd.log")


@dataclass(frozen=True)
class Need:
    """A command that some step runs, the packages that bring it, and what it is for."""

    command: str
    packages: tuple[str, ...]
    why: str


NEEDS = (
    Need("mmdebstrap", ("mmdebstrap", "debian-archive-keyring"), "the lab's images"),
    Need("setpriv", ("util-linux",), "children that end with their parent"),
    Need("dpkg-deb", ("dpkg",), "the lab's driver package"),
)
ENGINE = Need("dockerd", ("docker.io", "iptables", "ca-certificates"), "a container engine")
CLIENT = Need("docker", ("docker-cli", "docker.io"), "checks that run inside a container")


def prepare(report: Reporter) -> None:
    """Install and start what is missing. Raises InfrastructureError where that needs another user or fails."""
    answering = _answering()
    needs = [need for need in NEEDS if not shutil.which(need.command)]
    if not answering and not shutil.which(ENGINE.command):
        needs.append(ENGINE)
    if needs:
        _install(needs, report)
    if not answering:
        _start_engine(report)
        answering = _answering()
    if not shutil.which(CLIENT.command):
        _install([_first_known(CLIENT)], report)
    if answering:
        report.say(f"  container engine {answering.version} at {answering.url}", style="green")
    report.say("  ready" if needs else "  nothing is missing", style="green")


def _answering() -> engine.Engine | None:
    try:
        return engine.connect()
    except InfrastructureError:
        return None


def _install(needs: Sequence[Need], report: Reporter) -> None:
    for need in needs:
        report.say(f"  {need.command} is missing ({need.why}): installing {', '.join(need.packages)}")
    packages = sorted({package for need in needs for package in need.packages})
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if not shutil.which("apt-get"):
        raise InfrastructureError(
            "setup", "knows Debian's apt only", got="no apt-get", hint=f"install {' '.join(packages)} by hand"
        )
    if os.geteuid() != 0:
        raise InfrastructureError(
            "setup", "installing packages needs root", got=f"uid {os.geteuid()}", hint=f"sudo {' '.join(install)}"
        )
    with report.step(f"apt-get install {' '.join(packages)}"):
        for command in (["apt-get", "update"], install):
            _run(command)


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise InfrastructureError(
            " ".join(command), f"ended with status {done.returncode}", got="\n  ".join(lines[-5:]) or "no output"
        )


def _first_known(need: Need) -> Need:
    """The need with the first of its packages that this release of Debian has."""
    for package in need.packages:
        shown = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False)
        if shown.returncode == 0:
            return Need(need.command, (package,), need.why)
    return need


def _start_engine(report: Reporter) -> None:
    """Start Docker: by the service manager where there is one, else as a daemon of its own."""
    with report.step("start container engine"):
        if Path("/run/systemd/system").is_dir():
            _run(["systemctl", "start", "docker"])
        else:
            # Debian's init script gives up where it may not raise limits; the daemon itself needs no flags.
            with _ENGINE_LOG.open("ab") as log:
                subprocess.Popen(["dockerd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + _WAIT
        while not _answering():
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    "container engine",
                    f"does not answer {_WAIT} s after its start",
                    hint=f"its log: {_ENGINE_LOG}, or journalctl -u docker",
                )
            time.sleep(0.3)
