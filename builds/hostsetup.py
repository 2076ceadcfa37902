"""Make a bare Debian machine ready: a container engine that answers, what lab and verification run, emulators.

Runs only when named; says what it installs and does nothing where nothing is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import emulation, engine, machine
from .console import Reporter
from .errors import InfrastructureError
from .model import Arch

_WAIT = 60  # seconds until a started engine must answer
_PID_FILES = (Path("/var/run/docker.pid"), Path("/var/run/docker/containerd/containerd.pid"))
_ENGINE_LOG = Path("/var/log/dockerd.log")
_SYSTEMD = Path("/run/systemd/system")  # there where systemd runs
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_BINFMT_D = (Path("/usr/lib/binfmt.d"), Path("/etc/binfmt.d"))  # descriptions as the kernel reads them


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
    Need("mkfs.ext4", ("e2fsprogs",), "the disk of a node"),
)
ENGINE = Need("dockerd", ("docker.io", "iptables", "ca-certificates"), "a container engine")
MACHINES = {
    Arch.AMD64: Need(machine.PROGRAMS[Arch.AMD64], ("qemu-system-x86",), "loading modules in a virtual machine"),
    Arch.ARM64: Need(machine.PROGRAMS[Arch.ARM64], ("qemu-system-arm",), "loading arm64 modules in a virtual machine"),
}
EMULATOR = Need("qemu-{machine}-static", ("qemu-user-static",), "programs for {arch}")
CLIENT = Need("docker", ("docker-cli", "docker.io"), "checks that run inside a container")


def prepare(report: Reporter, arches: Iterable[Arch] = ()) -> None:
    """Install and start what is missing, also to run programs of some architectures.

    Raises InfrastructureError where that needs another user or fails.
    """
    answering = _answering()
    if not answering and (host := os.environ.get("DOCKER_HOST")):
        raise InfrastructureError(
            "container engine",
            "the one that DOCKER_HOST names does not answer",
            got=host,
            hint="start it, or unset DOCKER_HOST to have one installed and started here",
        )
    arches = sorted(set(arches))
    wanted = [*NEEDS, *(MACHINES[arch] for arch in sorted({Arch.AMD64, *arches}))]  # amd64: the default cell's
    needs = [need for need in wanted if not shutil.which(need.command)]
    if not answering and not shutil.which(ENGINE.command):
        needs.append(ENGINE)
    if needs:
        _install(needs, report)
    elif shutil.which("apt-get") and not _apt_knows_archive():
        with report.step("apt-get update"):
            _run(["apt-get", "update"])
    started = answering is None
    if started:
        _start_engine(report)
        answering = _answering()
    if not shutil.which(CLIENT.command):
        needs.append(_first_known(CLIENT))
        _install(needs[-1:], report)
    emulated = [arch for arch in arches if _emulate(arch, report)]
    if answering:
        report.say(f"  container engine {answering.version} at {answering.url}", style="green")
    report.say("  ready" if needs or started or emulated else "  nothing is missing", style="green")


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


def _emulate(arch: Arch, report: Reporter) -> bool:
    """See to it that this machine runs programs of an architecture; whether something had to be done.

    An emulator must be registered so that it works in containers, which do not have it: by ``binfmt_misc`` with its
    flag F, as Debian's packages describe it. They register it themselves only where systemd runs.
    """
    if emulation.host_runs(arch):
        return False
    command = EMULATOR.command.format(machine=arch.machine)
    if not shutil.which(command):
        _install([Need(command, EMULATOR.packages, EMULATOR.why.format(arch=arch))], report)
    if os.geteuid() != 0:
        raise InfrastructureError("setup", "registering an emulator needs root", got=f"uid {os.geteuid()}")
    name = f"qemu-{arch.machine}"
    with report.step(f"register {name}"):
        if not (_BINFMT / "register").exists():
            _run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)])
        described = next((place / f"{name}.conf" for place in _BINFMT_D if (place / f"{name}.conf").is_file()), None)
        try:
            if described and not (_BINFMT / name).exists():
                (line,) = (line for line in described.read_text().splitlines() if line.startswith(":"))
                (_BINFMT / "register").write_text(line)
        except OSError as error:
            raise InfrastructureError(name, "cannot be registered with the kernel", got=error.strerror) from error
        if not emulation.host_runs(arch):
            raise InfrastructureError(
                name,
                f"is registered and programs for {arch} do not run" if described else "has no description",
                got=_registered(name),
                hint=f"its registration in {_BINFMT} must be enabled and have the flag F; "
                f"`echo -1 > {_BINFMT / name}` removes it, then run setup again",
            )
    return True


def _registered(name: str) -> str:
    """What the kernel says of a registered emulator."""
    try:
        return "; ".join((_BINFMT / name).read_text().splitlines()[:3])
    except OSError:
        return "no registration"


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


def _apt_knows_archive() -> bool:
    """Whether apt has lists at all: container images of Debian come without."""
    shown = subprocess.run(["apt-get", "indextargets"], capture_output=True, check=False)
    return bool(shown.stdout.strip())


def _forget_dead(file: Path) -> None:
    """Remove a pid file whose process is gone, a zombie, or another program by now: the daemon would not start."""
    try:
        process = psutil.Process(int(file.read_text()))
        alive = process.status() != psutil.STATUS_ZOMBIE and process.name() in ("dockerd", "containerd")
    except (OSError, ValueError, psutil.NoSuchProcess):
        alive = False
    if not alive:
        file.unlink(missing_ok=True)


def _start_engine(report: Reporter) -> None:
    """Start Docker: by the service manager where there is one, else as a daemon of its own."""
    if os.geteuid() != 0:
        raise InfrastructureError("setup", "starting a container engine needs root", got=f"uid {os.geteuid()}")
    with report.step("start container engine"):
        daemon: subprocess.Popen[bytes] | None = None
        if _SYSTEMD.is_dir():
            _run(["systemctl", "start", "docker"])
        else:
            for file in _PID_FILES:
                _forget_dead(file)
            # Debian's init script gives up where it may not raise limits; the daemon itself needs no flags.
            with _ENGINE_LOG.open("ab") as log:
                daemon = subprocess.Popen(
                    ["dockerd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        deadline = time.monotonic() + _WAIT
        while not _answering():
            ended = daemon is not None and daemon.poll() is not None
            if ended or time.monotonic() > deadline:
                raise InfrastructureError(
                    "container engine",
                    "ended at once" if ended else f"does not answer {_WAIT} s after its start",
                    hint=f"its log: {_ENGINE_LOG}, or journalctl -u docker",
                )
            time.sleep(0.3)
