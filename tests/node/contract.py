"""A container of the image in which the installer is run over and over, each time on a node of stand-ins.

The scripts are in ``stand-ins/``. Mounts are real: the container's mount namespace is the host's, and the installer
runs in another one that shares ``/run/nvidia`` with it. Modules, sysfs, NVIDIA's own tools and the fabric manager,
which the lab's image lacks, are stand-ins. Nothing here touches the machine.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from docker.models.containers import Container

from builds import engine as engines
from builds import paths
from builds.engine import Engine

STAND_INS = Path(__file__).parent / "stand-ins"
TRACED = ("findmnt", "flock", "insmod", "ldconfig", "mknod", "modinfo", "mount", "nsenter", "rmmod", "umount")
"""The installer's tools; calls of these are steps."""
VENDOR = ("nvidia-modprobe", "nvidia-persistenced", "nvidia-smi")
FABRIC = ("nv-fabricmanager", "nvlsm")

_GPU = "sys/bus/pci/devices/0000:17:00.0"
_BRIDGE = "sys/bus/pci/devices/0000:0a:00.0"


def node(release: str, version: str, *, gpu: bool = True) -> dict[str, str]:
    """A node's files: kernel, firmware setting, an A100 whose IOMMU translates."""
    files = {
        "release": release,
        "proc/version": version,
        "sys/module/firmware_class/parameters/path": "",
        "drivers/nvidia.conf": "# for all nodes\n\nNVreg_EnableStreamMemOPs=1\n",
        "drivers/nvidia-peermem.conf": "peerdirect_support=1",
    }
    if gpu:
        files |= {
            f"{_GPU}/vendor": "0x10de",
            f"{_GPU}/class": "0x030200",
            f"{_GPU}/device": "0x20b0",
            f"{_GPU}/iommu_group/type": "DMA",
            "proc/driver/nvidia/gpus/0000:17:00.0/information": "Model: \t A100\nDevice Minor: \t 0",
        }
    return files


def switches(count: int) -> dict[str, str]:
    """NVSwitches on the bus."""
    kind = {"vendor": "0x10de", "class": "0x068000", "device": "0x1af1"}
    return {
        f"sys/bus/pci/devices/0000:c{number}:00.0/{name}": text
        for number in range(count)
        for name, text in kind.items()
    }


BRIDGE = {
    f"{_BRIDGE}/vendor": "0x15b3",
    f"{_BRIDGE}/class": "0x020700",
    f"{_BRIDGE}/device": "0x1021",
    f"{_BRIDGE}/vpd": "SMDL SW_MNG",
    f"{_BRIDGE}/infiniband/mlx5_0/ports/1/cap_mask": "0xa751e848",
    f"{_BRIDGE}/infiniband/mlx5_0/ports/1/gids/0": "fe80:0000:0000:0000:e09d:7303:003f:3bf8",
    "sys/class/infiniband_mad/umad0/dev": "231:0",
    "sys/class/infiniband_mad/issm0/dev": "231:64",
}
"""The network adapter that leads to NVSwitches of NVLink 5, with its port."""


@dataclass(frozen=True)
class Outcome:
    """What a run of the installer did, said, and left on the node."""

    status: int
    """Of a run that was killed, that of the next one."""
    out: str
    err: str
    calls: tuple[str, ...]
    """Steps in order."""
    before: tuple[str, ...]
    """Steps of the run that was killed."""
    ready: int | None
    """How many of the calls it had made when it was ready; None: it never was."""
    left: Mapping[str, str]
    """What is not as it was before."""
    iommu: str
    after: str
    """What is still left after `unload`."""

    @property
    def errors(self) -> list[str]:
        """The lines that say why it failed."""
        return [line for line in self.err.splitlines() if line.startswith("nvidia-driver: error: ")]


@dataclass(frozen=True)
class Pod:
    """The container, which stands by."""

    made: Container

    def run(
        self,
        variant: str,
        command: str = "init",
        act: str = "none",
        at: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run a command of the installer on a node of a kind; ``act`` (fail, kill, stop) at call number ``at``."""
        ready = {"init": "is ready"}.get(command, "module nvidia-peermem loaded")
        done = self.made.exec_run(
            ["/case.sh", variant, command, ready, act, str(at)],
            environment={**_ENVIRONMENT, **(environment or {})},
            demux=True,
        )
        streams: tuple[bytes | None, bytes | None] = done.output  # type: ignore[assignment]  # typed without demux
        out, err = ((stream or b"").decode() for stream in streams)
        assert done.exit_code == 0, out + err
        return _parse(out)

    def does(self, command: str) -> str:
        """What a shell in the container says, with no environment but the image's."""
        output = self.made.exec_run(["sh", "-c", command], environment=_ENVIRONMENT).output
        assert isinstance(output, bytes)
        return output.decode()


_FOLDERS = {"SYS": "sys", "PROC": "proc", "PARAMETERS": "drivers", "PIDS": "pids"}
_ENVIRONMENT = {
    **{f"INSTALLER_{name}": f"/node/{folder}" for name, folder in _FOLDERS.items()},
    "INSTALLER_INTERVAL": "0.05",
    "INSTALLER_PAUSE": "0.01",
}


def _parse(text: str) -> Outcome:
    parts: dict[str, str] = {}
    for part in text.split("\x1e")[1:]:
        name, _, content = part.partition("\n")
        parts[name] = content
    clean = {"host-mounts": "0", "pod-mounts": "0"}
    watched = ("modules", "host-mounts", "pod-mounts", "firmware", "probe-files", "journal", "services")
    left = {name: parts[name].strip() for name in watched if parts[name].strip() != clean.get(name, "")}
    return Outcome(
        int(parts["status"]),
        parts["out"],
        parts["err"],
        tuple(parts["calls"].splitlines()),
        tuple(parts.get("before", "").splitlines()),
        int(parts["ready"].split()[0]) if parts["ready"].strip() else None,
        left,
        parts["iommu"].strip(),
        parts.get("after-unload", "").strip(),
    )


@contextmanager
def open_pod(engine: Engine, image: str, variants: Mapping[str, Mapping[str, str]], folder: Path) -> Iterator[Pod]:
    """A container of the image that may mount, without network, with the stand-ins first on the image's own PATH."""
    tree = folder / "tree"
    for variant, files in variants.items():
        for name, text in files.items():
            path = tree / "variants" / variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
    for place, names in (("usr/local/sbin", TRACED), (f"{paths.DRIVER_ROOT}/usr/bin", VENDOR)):
        for name in names:
            _copy("traced", tree / place / name)
    for name in FABRIC:
        _copy("traced", tree / "fabric" / name)
    _copy("uname", tree / "usr/local/sbin/uname")
    _copy("case.sh", tree / "case.sh")
    for name in ("nvswitch/fabricmanager.cfg", "nvlsm/nvlsm.conf"):
        path = tree / paths.DRIVER_ROOT / "usr/share/nvidia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("DAEMONIZE=1\n")
    with engines.container(engine, image, ["infinity"], entrypoint=["sleep"], mounts=True) as made:
        made.put_archive("/", _archive(tree))
        made.start()
        pod = Pod(made)
        said = pod.does(_PREPARE)
        assert not said, said
        yield pod


_PREPARE = """
set -e
mkdir -p /run/nvidia
/usr/bin/mount -t tmpfs tmpfs /run/nvidia
/usr/bin/mount --make-shared /run/nvidia
unshare --mount --propagation unchanged sleep infinity >/dev/null 2>&1 &
echo $! >/run/pod
until [ "$(readlink /proc/$!/ns/mnt)" != "$(readlink /proc/self/ns/mnt)" ]; do sleep 0.01; done
"""


def _copy(name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(STAND_INS / name, target)


def _archive(tree: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(tree, arcname=".")
    return stream.getvalue()
