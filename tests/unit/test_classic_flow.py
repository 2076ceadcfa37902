"""The classic flow, entry by entry, and the page that sets it against our user space."""

from __future__ import annotations

import pytest

from builds import classic_flow, manifest
from builds.classic_flow import Fate, outcome
from builds.model import Arch

from .test_manifest import BODY, HEAD, V, entry_of

LIB = "/usr/lib/x86_64-linux-gnu"


@pytest.mark.parametrize(
    ("line", "fate", "installed"),
    [
        # What the facts say of it: its globs lose libnvcuvid, libOpenCL and the vdpau folder.
        (f"libnvcuvid.so.{V} 0755 NVCUVID_LIB NATIVE MODULE:x", Fate.LOST, f"{LIB}/libnvcuvid.so.{V}"),
        ("libOpenCL.so.1.0.0 0755 OPENCL_WRAPPER_LIB NATIVE / MODULE:x", Fate.LOST, f"{LIB}/libOpenCL.so.1.0.0"),
        (
            f"libvdpau_nvidia.so.{V} 0755 VDPAU_LIB NATIVE vdpau MODULE:x",
            Fate.LOST,
            f"{LIB}/vdpau/libvdpau_nvidia.so.{V}",
        ),
        # What reached users without: firmware, licences, nvidia-modprobe, links.
        (
            "firmware/gsp_ga10x.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp",
            Fate.LOST,
            f"/lib/firmware/nvidia/{V}/gsp_ga10x.bin",
        ),
        ("LICENSE 0444 DOCUMENTATION NVIDIA_GLX-1.0/ MODULE:x", Fate.LOST, "/usr/share/doc/NVIDIA_GLX-1.0/LICENSE"),
        ("nvidia-modprobe 04755 NVIDIA_MODPROBE /usr/bin/ MODULE:x", Fate.LOST, "/usr/bin/nvidia-modprobe"),
        (f"libcuda.so.1 0000 CUDA_SYMLINK NATIVE / libcuda.so.{V} MODULE:x", Fate.COPY, f"{LIB}/libcuda.so.1"),
        (f"libcuda.so.{V} 0755 CUDA_LIB NATIVE / MODULE:x", Fate.KEPT, f"{LIB}/libcuda.so.{V}"),
        (f"libnvidia-ml.so.{V} 0755 UTILITY_LIB NATIVE MODULE:x", Fate.KEPT, f"lib/libnvidia-ml.so.{V}"),
        (
            f"libnvidia-ml.so.1 0000 UTILITY_LIB_SYMLINK NATIVE libnvidia-ml.so.{V} MODULE:x",
            Fate.KEPT,
            "lib/libnvidia-ml.so.1",
        ),
        (f"libcuda.so.{V} 0755 CUDA_LIB COMPAT32 / MODULE:x", Fate.LOST, f"/usr/lib/i386-linux-gnu/libcuda.so.{V}"),
        ("nvidia-smi 0755 UTILITY_BINARY MODULE:x", Fate.KEPT, "bin/nvidia-smi"),
        ("nvidia-uninstall 0000 UTILITY_BIN_SYMLINK nvidia-installer MODULE:x", Fate.LOST, "bin/nvidia-uninstall"),
        (f"libnvidia-glcore.so.{V} 0755 OPENGL_LIB NATIVE MODULE:x", Fate.LOST, f"{LIB}/libnvidia-glcore.so.{V}"),
        ("nvidia.icd 0644 CUDA_ICD MODULE:x", Fate.LOST, "/etc/OpenCL/vendors/nvidia.icd"),
        ("nvoptix.bin 0644 OPENGL_DATA /usr/share/nvidia/ MODULE:x", Fate.LOST, "/usr/share/nvidia/nvoptix.bin"),
    ],
)
def test_what_becomes_of_an_entry(line: str, fate: Fate, installed: str) -> None:
    found = outcome(entry_of(line), V, Arch.AMD64)
    assert (found.fate, found.installed) == (fate, installed)
    assert found.why or fate is Fate.KEPT


def test_no_type_is_taken_for_a_library_by_mistake() -> None:
    for kind in manifest._TYPES:
        placed = kind in (
            *classic_flow._FOLDERS, *classic_flow._TOOLS, *classic_flow._UTILITY_LIBS, *classic_flow._SOURCES,
            *classic_flow._ABSOLUTE,
        )  # fmt: skip
        assert placed or kind.endswith(("_LIB", "_SYMLINK", "_LA")), kind


def test_the_page_has_every_difference_once() -> None:
    read = manifest.parse(HEAD + BODY)
    selected, dropped = manifest.select(read, Arch.AMD64), manifest.dropped(read, Arch.AMD64)
    page = classic_flow.differences(read, Arch.AMD64, selected, dropped)
    _, lost, copies, theirs, neither = page.split("\n## ")
    for name in (
        f"libnvcuvid.so.{V}",
        "libOpenCL.so.1.0.0",
        f"vdpau/libvdpau_nvidia.so.{V}",
        "usr/share/nvidia/LICENSE",
    ):
        assert lost.count(f"{name}`") == 1
        assert f"{name}`" not in copies + theirs
    assert "libcuda.so.1`" in copies and "libcuda.so.1`" not in lost
    assert "| `bin/nvidia-settings` | a desktop's settings and menus |" in theirs
    assert "nvidia_drv.so`" in neither
    assert f"libnvidia-ml.so.{V}" not in page, "where both agree there is nothing to say"
    assert f"{len(selected)} files and links are in the image" in page
