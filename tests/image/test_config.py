"""What the image says of itself, and how the GPU Operator starts it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from builds import oci, paths
from builds.rootfs import Node

from .conftest import Compare
from .evidence import Expected, Found

_USERLAND = (
    # the operator's preStop hook (operator contract, row 9) and its probes
    *("sh", "rm"),
    # what nvidia-driver needs to load modules, lend the driver root and stay in the foreground
    *("awk", "cat", "env", "findmnt", "flock", "id", "insmod", "mkdir", "modinfo", "mount", "mountpoint"),
    *("mv", "nsenter", "rmmod", "sleep", "sort", "tac", "tr", "umount", "uname"),
)
"""Programs of the base that somebody calls by name."""

_LABELS = {
    "org.opencontainers.image.title": "NVIDIA driver",
    "org.opencontainers.image.description": (
        "Precompiled NVIDIA {driver} kernel modules for {kernel}, run by the GPU Operator"
    ),
    "org.opencontainers.image.version": "{driver}",
    "org.opencontainers.image.vendor": "Garden Linux",
    "org.opencontainers.image.licenses": "LicenseRef-NVIDIA AND Apache-2.0",
    "org.opencontainers.image.base.digest": "{plan.base.digest}",
    "io.gardenlinux.nvidia.driver-version": "{driver}",
    "io.gardenlinux.nvidia.kernel": "{kernel}",
    "io.gardenlinux.nvidia.kernel-build": "{digests}",
    "io.gardenlinux.nvidia.kernel-package": "{packages}",
    "io.gardenlinux.nvidia.module-types": "{types}",
    "io.gardenlinux.nvidia.plan-key": "{plan.image}",
}
"""Every label an image has, by the plan."""

_SECRETS = (
    r"(?i)(pass(word|wd)|secret|token|api_?key|credential|authorization)\w*[\"']?\s*[=:]\s*\S+",
    r"://[^/\s:@\"]+:[^/\s@\"]+@",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"\b(gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)\w{8,}",
)
_BUILD_PATHS = r"/(home|root|tmp|Users|workspace|builds|var/tmp|github|runner)/[^\s\"']+"


@pytest.mark.check("config.architecture")
def test_architecture(found: Found, expected: Expected, compare: Compare) -> None:
    compare(found.image.config.get("architecture"), expected.plan.cell.arch)


@pytest.mark.check("config.os")
def test_os(found: Found, compare: Compare) -> None:
    compare(found.image.config.get("os"), "linux")


@pytest.mark.check("config.user")
def test_user(found: Found, compare: Compare) -> None:
    """Root: the operator runs it privileged and says nothing of a user."""
    compare(_run(found).get("User", "") in ("", "0", "root", "0:0"), True, "modules cannot be loaded by another user")


@pytest.mark.check("config.entrypoint")
def test_entrypoint(found: Found, compare: Compare) -> None:
    """Started by itself it does what the operator would have it do; `args` of a pod replace the second alone."""
    compare([_run(found).get("Entrypoint"), _run(found).get("Cmd")], [[f"/{paths.ENTRYPOINT}"], ["init"]])


@pytest.mark.check("config.command")
def test_command(found: Found, compare: Compare) -> None:
    """The operator starts `nvidia-driver` by its name (operator contract, row 5): first on PATH, executable."""
    node = _on_path("nvidia-driver", found)
    compare(node.path if node else None, paths.ENTRYPOINT)
    assert node
    compare(oct(node.mode & 0o7777), oct(0o755))


@pytest.mark.check("config.path")
def test_path(found: Found, compare: Compare) -> None:
    """The operator's startup probe calls `nvidia-smi` by its name (operator contract, row 7)."""
    node = _on_path("nvidia-smi", found)
    compare(node.path if node else None, f"{paths.DRIVER_ROOT}/usr/bin/nvidia-smi")


@pytest.mark.check("config.library-path")
def test_library_path(found: Found, expected: Expected, compare: Compare) -> None:
    wanted = f"/{paths.DRIVER_ROOT}/usr/lib/{expected.plan.cell.arch.triplet}"
    compare(_environment(found).get("LD_LIBRARY_PATH"), wanted)


@pytest.mark.check("config.userland")
@pytest.mark.parametrize("name", _USERLAND)
def test_userland(name: str, found: Found, compare: Compare) -> None:
    node = _on_path(name, found)
    compare(bool(node and node.mode & 0o111), True, "no such program on PATH")


@pytest.mark.check("config.labels")
@pytest.mark.parametrize("label", _LABELS)
def test_labels(label: str, found: Found, expected: Expected, compare: Compare) -> None:
    plan = expected.plan
    builds = sorted((one.kernel.build for one in plan.sets), key=lambda build: (build.package, build.digest))
    wanted = _LABELS[label].format(
        plan=plan,
        driver=plan.cell.driver,
        kernel=builds[0].release,
        digests=",".join(build.digest for build in builds),
        packages=",".join(build.package for build in builds),
        types=",".join(sorted({kind for one in plan.sets for kind in one.modules})),
    )
    compare(_labels(found).get(label), wanted)


@pytest.mark.check("config.no-other-labels")
def test_no_other_labels(found: Found, compare: Compare) -> None:
    compare(sorted(_labels(found).keys() - _LABELS.keys()), [])


@pytest.mark.check("config.history")
def test_history(found: Found, expected: Expected, compare: Compare) -> None:
    """A line for each layer, in fixed words and without a clock: the same plan gives the same digest."""
    lines = [*("base" for _ in expected.subject.base), "user space", "modules", "installer"]
    compare(found.image.config.get("history"), [{"created": oci.CREATED, "created_by": line} for line in lines])
    compare(found.image.config.get("created"), oci.CREATED)


@pytest.mark.check("config.environment")
def test_environment(found: Found, expected: Expected, compare: Compare) -> None:
    """The two paths and nothing else: no foreign folder goes first, no LD_PRELOAD changes what the tools do."""
    root = f"/{paths.DRIVER_ROOT}"
    folders = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", f"{root}/usr/bin")
    libraries = f"{root}/usr/lib/{expected.plan.cell.arch.triplet}"
    compare(_run(found).get("Env"), [f"PATH={':'.join(folders)}", f"LD_LIBRARY_PATH={libraries}"])


@pytest.mark.check("config.settings")
def test_settings(found: Found, compare: Compare) -> None:
    """Nothing that the operator does not expect: no volumes, ports, health checks, working folder, stop signal."""
    compare(sorted(_run(found)), ["Cmd", "Entrypoint", "Env", "Labels"])
    fields = {"architecture", "os", "created", "config", "rootfs", "history"}
    compare(sorted(found.image.config), sorted(fields))
    rootfs = found.image.config["rootfs"]
    compare({**rootfs, "diff_ids": []}, {"type": "layers", "diff_ids": []})


@pytest.mark.check("config.secrets")
def test_secrets(found: Found, compare: Compare) -> None:
    text = _said(found)
    compare([match[0][:12] + "…" for pattern in _SECRETS for match in re.finditer(pattern, text)], [])


@pytest.mark.check("config.build-paths")
def test_build_paths(found: Found, expected: Expected, compare: Compare) -> None:
    """No path of the machine that built or checks it."""
    text = _said(found)
    paths_found = {match[0] for match in re.finditer(_BUILD_PATHS, text)}
    compare(paths_found | {path for path in expected.subject.private if path in text}, [])


def _run(found: Found) -> dict[str, Any]:
    """How a runtime is to start the image."""
    return found.image.config.get("config") or {}


def _said(found: Found) -> str:
    """Everything that manifest, config and index say, as it is written."""
    image = found.image
    blobs = (oci.blob_path(image.layout, digest) for digest in (image.digest, image.config_descriptor.digest))
    return "\n".join(path.read_text(errors="replace") for path in (*blobs, image.layout / "index.json"))


def _environment(found: Found) -> dict[str, str]:
    lines = _run(found).get("Env")
    return dict(str(line).partition("=")[::2] for line in (lines if isinstance(lines, list) else []))


def _labels(found: Found) -> dict[str, Any]:
    labels = _run(found).get("Labels")
    return labels if isinstance(labels, dict) else {}


def _on_path(name: str, found: Found) -> Node | None:
    """The program that a name means to the image's environment."""
    for folder in _environment(found).get("PATH", "").split(":"):
        node = found.rootfs.resolve(f"{folder}/{name}")
        if node and node.is_file and node.mode & 0o111:
            return node
    return None
