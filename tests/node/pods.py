"""How the GPU Operator's driver pod is run: a runtime's configuration as kubelet and containerd write it.

Rows are those of the operator's contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builds.model import ModuleType
from builds.oci import Image

PARAMETER = "NVreg_RegistryDwords=RmAllowNoGpuInit=1"
"""A parameter for nvidia.ko, in a file where the operator mounts it. Branches that do not count an NVSwitch need it to
stay where there is no GPU; the others pass over it."""

PROBE = "/usr/local/bin/startup-probe.sh"

_ALL_CAPABILITIES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
_PRIVILEGED = [f"CAP_{name}" for name in _ALL_CAPABILITIES.split()]


def environment(kind: ModuleType | None) -> dict[str, str]:
    """What the operator sets (row 10); ``kind`` None is its default, ``auto``."""
    return {
        "KERNEL_MODULE_TYPE": kind or "auto",
        "NODE_NAME": "node",
        "NODE_IP": "192.0.2.1",
        "NVIDIA_VISIBLE_DEVICES": "void",
        "DRIVER_CONFIG_DIGEST": "0",
        "USE_HOST_MOFED": "false",
    }


def driver(image: Image, pod: str, kind: ModuleType | None) -> dict[str, Any]:
    """The driver's container (rows 5, 10, 11); ``kind`` None is the operator's default, ``auto``."""
    return _spec(image, pod, ("nvidia-driver", "init"), environment(kind), _mounts(), "rshared")


def onlooker(image: Image, pod: str) -> dict[str, Any]:
    """A container that looks at what the driver's lends the node, as the container toolkit's does.

    It has the host's /run/nvidia with HostToContainer propagation, and may be there before the driver.
    """
    return _spec(image, pod, ("sleep", "infinity"), {}, [_bind("/run/nvidia", "rslave")], "rslave")


def _spec(
    image: Image, pod: str, command: Sequence[str], env: Mapping[str, str], mounts: Sequence[Any], propagation: str
) -> dict[str, Any]:
    """The runtime's configuration of a pod's one container (OCI runtime specification 1.0): privileged, host PID.

    Its root is ``rootfs`` in the pod's folder, its environment the image's own and ``env``.
    """
    own: Sequence[str] = image.config["config"]["Env"]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": list(command),
            "env": [*own, *(f"{name}={value}" for name, value in env.items())],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _PRIVILEGED),
            "noNewPrivileges": False,
        },
        "root": {"path": "rootfs"},
        "hostname": "driver",
        "mounts": [*_OWN, *mounts],
        "linux": {
            "namespaces": [{"type": name} for name in ("ipc", "uts", "mount", "network", "cgroup")],  # PID: the host's
            "cgroupsPath": f"/kubepods/{pod}",
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
            "rootfsPropagation": propagation,  # as containerd sets it by that of the mounts
        },
    }


_OWN = (
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "rw"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "rw"]},
)
"""What every privileged container has."""


def _bind(path: str, *options: str, source: str = "") -> dict[str, Any]:
    options = ("rbind", *(options or ("rprivate",)))
    return {"destination": path, "type": "bind", "source": source or path, "options": list(options)}


def _mounts() -> list[dict[str, Any]]:
    return [
        # row 11
        _bind("/run/nvidia", "rshared"),
        _bind("/run/nvidia-fabricmanager"),
        _bind("/run/nvidia-topologyd"),
        _bind("/var/log"),
        _bind("/dev/log"),
        _bind("/host-etc/os-release", "rprivate", "ro", source="/etc/os-release"),
        _bind("/run/mellanox/drivers", "rslave"),
        _bind("/sys/devices/system"),
        _bind("/sys/module/firmware_class/parameters/path"),
        # row 12
        _bind("/lib/firmware", source="/run/nvidia/driver/lib/firmware"),
        # row 7
        _bind(PROBE, "rprivate", "ro", source="/node/startup-probe.sh"),
        _bind("/usr/local/bin/nvidia-smi", "rprivate", "ro", source="/node/nvidia-smi"),
        # row 13
        _bind("/drivers", "rprivate", "ro", source="/node/drivers"),
    ]
