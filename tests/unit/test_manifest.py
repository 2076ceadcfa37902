"""The manifest: read by its documented format, every type placed or dropped with a reason, nothing lost in silence."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from builds import manifest as module
from builds.errors import BuildError
from builds.manifest import Placed, dropped, missing, parse, select, soname_links
from builds.model import Arch

V = "550.163.01"
LIB = "usr/lib/x86_64-linux-gnu"
HEAD = f"""\
NVIDIA Accelerated Graphics Driver for Linux-x86_64
{V}
 
nvidia nvidia-uvm nvidia-modeset nvidia-drm nvidia-peermem 
 
 
./kernel/
./kernel/precompiled/
"""  # noqa: W291, W293
BODY = f"""\
kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman
kernel/dkms.conf 0644 DKMS_CONF INHERIT_PATH_DEPTH:1 MODULE:resman
firmware/gsp_ga10x.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp
firmware/gsp_tu10x.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp
libcuda.so.{V} 0755 CUDA_LIB NATIVE / MODULE:gpgpu
libcuda.so.1 0000 CUDA_SYMLINK NATIVE / libcuda.so.{V} MODULE:gpgpu
libcuda.so 0000 CUDA_SYMLINK NATIVE / libcuda.so.1 MODULE:gpgpu
libnvidia-ml.so.{V} 0755 CUDA_LIB NATIVE / MODULE:nvml
libnvidia-ml.so.1 0000 CUDA_SYMLINK NATIVE / libnvidia-ml.so.{V} MODULE:nvml
./32/libcuda.so.{V} 0755 CUDA_LIB COMPAT32 / MODULE:gpgpu
libcuda.so.1 0000 CUDA_SYMLINK COMPAT32 / libcuda.so.{V} MODULE:gpgpu
libOpenCL.so.1.0.0 0755 OPENCL_WRAPPER_LIB NATIVE / MODULE:gpgpu
libOpenCL.so.1 0000 OPENCL_WRAPPER_SYMLINK NATIVE / libOpenCL.so.1.0.0 MODULE:gpgpu
nvidia.icd 0644 CUDA_ICD MODULE:gpgpu
nvidia-smi 0755 UTILITY_BINARY MODULE:nvml
nvidia-cuda-mps-control 0755 UTILITY_BINARY MODULE:gpgpu
nvidia-persistenced 0755 UTILITY_BINARY MODULE:nvpd
nvidia-modprobe 04755 NVIDIA_MODPROBE /usr/bin/ MODULE:installer
nvidia-modprobe.1.gz 0644 NVIDIA_MODPROBE_MANPAGE man1/ MODULE:installer
libnvcuvid.so.{V} 0755 NVCUVID_LIB NATIVE MODULE:nvcuvid
libnvcuvid.so.1 0000 NVCUVID_LIB_SYMLINK NATIVE libnvcuvid.so.{V} MODULE:nvcuvid
libnvidia-encode.so.{V} 0755 ENCODEAPI_LIB NATIVE MODULE:encodeapi
libvdpau_nvidia.so.{V} 0755 VDPAU_LIB NATIVE vdpau/ MODULE:vdpau
libvdpau_nvidia.so.1 0000 VDPAU_SYMLINK NATIVE vdpau/ libvdpau_nvidia.so.{V} MODULE:vdpau
libvdpau_nvidia.so 0000 VDPAU_SYMLINK NATIVE / vdpau/libvdpau_nvidia.so.{V} MODULE:vdpau
libnvoptix.so.{V} 0755 OPENGL_LIB NATIVE MODULE:optix
libnvoptix.so.1 0000 OPENGL_SYMLINK NATIVE libnvoptix.so.{V} MODULE:optix
nvoptix.bin 0644 OPENGL_DATA /usr/share/nvidia/ MODULE:optix
libnvidia-rtcore.so.{V} 0755 OPENGL_LIB NATIVE MODULE:raytracing
libnvidia-gpucomp.so.{V} 0755 OPENGL_LIB NATIVE MODULE:gpucomp
libnvidia-glcore.so.{V} 0755 OPENGL_LIB NATIVE MODULE:opengl
libnvidia-tls.so.{V} 0755 TLS_LIB NATIVE / MODULE:opengl
libEGL.so.1 0000 EGL_CLIENT_SYMLINK NATIVE libEGL.so.1.1.0 MODULE:opengl
nvidia-drm_gbm.so 0000 GBM_BACKEND_LIB_SYMLINK NATIVE ../libnvidia-allocator.so.1 MODULE:nvalloc
nvidia_drv.so 0755 XMODULE_SHARED_LIB drivers/ MODULE:xdriver
libglxserver_nvidia.so 0000 GLX_MODULE_SYMLINK extensions/ libglxserver_nvidia.so.{V} MODULE:xdriver
nvidia-settings 0755 UTILITY_BINARY MODULE:xutils
libnvidia-gtk3.so.{V} 0755 UTILITY_LIB NATIVE MODULE:xutils
nvidia-xconfig 0755 UTILITY_BINARY MODULE:xutils
nvidia-installer 0755 INSTALLER_BINARY MODULE:installer
nvidia-uninstall 0000 UTILITY_BIN_SYMLINK nvidia-installer MODULE:installer
systemd/system/nvidia-suspend.service 0644 SYSTEMD_UNIT MODULE:powermanagement
nvidia-suspend.service 0000 SYSTEMD_UNIT_SYMLINK suspend.wants/ ../nvidia-suspend.service MODULE:powermanagement
libnvidia-sandboxutils.so.1 0000 UTILITY_LIB_SYMLINK NATIVE libnvidia-sandboxutils.so.{V} MODULE:sandboxutils
libnvidia-sandboxutils.so.{V} 0755 UTILITY_LIB NATIVE MODULE:sandboxutils
sandboxutils-filelist.json 0644 SANDBOXUTILS_FILELIST_JSON /files.d MODULE:sandboxutils
README.txt 0644 DOCUMENTATION NVIDIA_GLX-1.0/ MODULE:installer
LICENSE 0444 DOCUMENTATION NVIDIA_GLX-1.0/ MODULE:installer
supported-gpus/LICENSE 0444 DOCUMENTATION NVIDIA_GLX-1.0/supported-gpus MODULE:installer
supported-gpus/supported-gpus.json 0444 DOCUMENTATION NVIDIA_GLX-1.0/supported-gpus MODULE:installer
"""


@pytest.fixture
def sample() -> module.Manifest:
    return parse(HEAD + BODY)


def entry_of(line: str) -> module.ManifestEntry:
    (entry,) = parse(f"{HEAD}{line}\n").entries
    return entry


def elf_library(soname: str | None) -> bytes:
    """The least of a 64-bit shared library that has (or lacks) a SONAME: two segments and no sections."""
    strings = b"\0" + (soname.encode() + b"\0" if soname else b"")
    start = 64 + 2 * 56
    tags = ([(14, 1)] if soname else []) + [(5, 0), (10, len(strings)), (0, 0)]
    at = start + 16 * len(tags)
    dynamic = b"".join(struct.pack("<QQ", tag, at if tag == 5 else value) for tag, value in tags)
    size = at + len(strings)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, 0, 0, size, size, 4096)
    table = struct.pack("<IIQQQQQQ", 2, 4, start, start, start, len(dynamic), len(dynamic), 8)
    return header + load + table + dynamic + strings


def fill(tree: Path, selected: tuple[Placed, ...]) -> None:
    for one in selected:
        if one.source:
            file = tree / one.source
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(elf_library(None) if ".so" in file.name else b"content")


def test_header(sample: module.Manifest) -> None:
    assert sample.description == "NVIDIA Accelerated Graphics Driver for Linux-x86_64"
    assert sample.version == V
    assert sample.module_names == ("nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm", "nvidia-peermem")
    assert len(sample.entries) == len(BODY.splitlines())


def test_lines_of_the_documented_format() -> None:
    link = entry_of("libcuda.so.1 0000 CUDA_SYMLINK NATIVE / libcuda.so.460.67 MODULE:gpgpu")
    assert (link.path, link.mode, link.type, link.arch) == ("libcuda.so.1", 0, "CUDA_SYMLINK", "NATIVE")
    assert (link.location, link.target, link.module) == ("/", "libcuda.so.460.67", "gpgpu")
    tool = entry_of("nvidia-smi 0755 UTILITY_BINARY MODULE:nvml")
    assert (tool.mode, tool.arch, tool.location, tool.target, tool.module) == (0o755, None, None, None, "nvml")
    modprobe = entry_of("nvidia-modprobe 04755 NVIDIA_MODPROBE /usr/bin/ MODULE:installer")
    assert (modprobe.mode, modprobe.location) == (0o4755, "/usr/bin/")
    dkms = entry_of("kernel/dkms.conf 0644 DKMS_CONF INHERIT_PATH_DEPTH:1 MODULE:resman")
    assert (dkms.inherit_depth, dkms.location) == (1, None)
    assert entry_of("./32/libcuda.so.460.67 0755 CUDA_LIB COMPAT32 / MODULE:gpgpu").path == "32/libcuda.so.460.67"
    # A tag behind the fields that a later branch may bring is none of our business.
    assert entry_of("nvidia-smi 0755 UTILITY_BINARY SUBPACKAGE:x MODULE:nvml").module == "nvml"


def test_a_manifest_is_read_as_far_as_it_is_understood() -> None:
    good = "nvidia-smi 0755 UTILITY_BINARY MODULE:nvml\n"
    read, problems = module.read(f"{HEAD}{good}a 0755 WARP_DRIVE MODULE:x\n{good}b 0755\n. 0755 UTILITY_BINARY\n")
    assert [entry.path for entry in read.entries] == ["nvidia-smi"] * 2
    assert problems == (
        "unknown type WARP_DRIVE (line 10)",
        "line 12: has no type: b 0755",
        "line 13: . is no file's name",
    )


def test_a_line_ends_where_unix_ends_it() -> None:
    """A form feed or a line separator in a text is none: the numbers of lines would be others than an editor's."""
    lines = "nvidia-smi 0755 UTILITY_BINARY MODULE:nvml\r\nodd\x0cname\u2028 0755 X\n"
    _, problems = module.read(HEAD.replace("Driver", "Driver\x0c") + lines)
    assert len(problems) == 1
    assert "line 10" in problems[0]


def test_entries_end_at_the_first_empty_line() -> None:
    one = "nvidia-smi 0755 UTILITY_BINARY MODULE:nvml\n"
    assert len(parse(f"{HEAD}{one}\nwhatever follows\n").entries) == 1


def test_every_unknown_type_and_bad_line_is_named_at_once() -> None:
    bad = (
        "a 0755 QUANTUM_LIB NATIVE MODULE:x\n"
        "nvidia-smi 0755 UTILITY_BINARY MODULE:nvml\n"
        "b 0755 WARP_DRIVE MODULE:x\n"
        "c 0755 QUANTUM_LIB NATIVE MODULE:x\n"
        "d 0755\n"
        "e rwxr CUDA_LIB NATIVE / MODULE:x\n"
        "f 0755 CUDA_LIB / MODULE:x\n"
        "g 0755 CUDA_SYMLINK NATIVE g.so MODULE:x\n"
        "h 0755 UTILITY_BINARY /usr/bin MODULE:x\n"
        "i 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:x\n"
        "j/k 0644 FIRMWARE MODULE:x\n"
    )
    with pytest.raises(BuildError) as caught:
        parse(HEAD + bad)
    assert caught.value.got is not None
    assert caught.value.hint
    got = caught.value.got.split("; ")
    assert got[:2] == ["unknown type QUANTUM_LIB (line 9, 12)", "unknown type WARP_DRIVE (line 11)"]
    assert [problem.partition(":")[0] for problem in got[2:]] == [f"line {number}" for number in range(13, 20)]


@pytest.mark.parametrize("text", ["", "<html>\n", "\n" * 20, HEAD.replace(V, "latest") + BODY])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match="is not a driver package's"):
        parse(text)


def test_table_knows_every_type_of_the_facts_and_says_what_becomes_of_it() -> None:
    both = ("OPENGL", "CUDA", "OPENCL", "OPENCL_WRAPPER", "UTILITY", "VDPAU", "NVCUVID", "ENCODEAPI", "GLVND")
    for family in (*both, "GLX_CLIENT", "EGL_CLIENT", "GBM_BACKEND"):
        kinds = [kind for kind in module._TYPES if re.fullmatch(f"{family}(_LIB|_LIB_SYMLINK|_SYMLINK)", kind)]
        assert len(kinds) == 2, family
        assert all(module._TYPES[kind].fields.startswith("A") for kind in kinds)
    for kind in ("TLS_LIB", "WINE_LIB", "INTERNAL_UTILITY_BINARY", "INTERNAL_UTILITY_LIB", "INTERNAL_UTILITY_DATA"):
        assert module._TYPES[kind].fields.upper().startswith("A"), kind
    with_path = (
        "TLS_LIB XMODULE_SHARED_LIB DOCUMENTATION MANPAGE APPLICATION_PROFILE DOT_DESKTOP NVIDIA_MODPROBE "
        "VULKAN_ICD_JSON SYSTEMD_UNIT_SYMLINK SANDBOXUTILS_FILELIST_JSON EXPLICIT_PATH"
    )
    families = r"(CUDA|OPENCL|OPENCL_WRAPPER|VDPAU|GLX_MODULE)_(LIB|SHARED_LIB|LIB_SYMLINK|SYMLINK)"
    of_families = [kind for kind in module._TYPES if re.fullmatch(families, kind)]
    assert len(of_families) == 10
    assert all("P" in module._TYPES[kind].fields for kind in (*with_path.split(), *of_families))
    without = (
        "UTILITY_BINARY",
        "INSTALLER_BINARY",
        "CUDA_ICD",
        "KERNEL_MODULE",
        "SYSTEMD_UNIT",
        "SYSTEMD_SLEEP_SCRIPT",
    )
    assert all(not module._TYPES[kind].fields for kind in without)
    assert all("I" in module._TYPES[kind].fields for kind in ("KERNEL_MODULE_SRC", "DKMS_CONF", "FIRMWARE"))
    for kind, rule in module._TYPES.items():
        assert (rule.folder is None) == bool(rule.reason), kind
        assert ("T" in rule.fields) == kind.endswith("SYMLINK"), kind


def test_selection_is_what_a_node_needs(sample: module.Manifest) -> None:
    chosen = {one.dest: one for one in select(sample, Arch.AMD64)}
    assert list(chosen) == sorted(
        [
            "etc/OpenCL/vendors/nvidia.icd",
            f"lib/firmware/nvidia/{V}/gsp_ga10x.bin",
            f"lib/firmware/nvidia/{V}/gsp_tu10x.bin",
            "usr/bin/nvidia-cuda-mps-control",
            "usr/bin/nvidia-modprobe",
            "usr/bin/nvidia-persistenced",
            "usr/bin/nvidia-smi",
            f"{LIB}/libOpenCL.so.1",
            f"{LIB}/libOpenCL.so.1.0.0",
            f"{LIB}/libcuda.so",
            f"{LIB}/libcuda.so.1",
            f"{LIB}/libcuda.so.{V}",
            f"{LIB}/libnvcuvid.so.1",
            f"{LIB}/libnvcuvid.so.{V}",
            f"{LIB}/libnvidia-encode.so.{V}",
            f"{LIB}/libnvidia-gpucomp.so.{V}",
            f"{LIB}/libnvidia-ml.so.1",
            f"{LIB}/libnvidia-ml.so.{V}",
            f"{LIB}/libnvidia-sandboxutils.so.1",
            f"{LIB}/libnvidia-sandboxutils.so.{V}",
            f"{LIB}/libvdpau_nvidia.so",
            f"{LIB}/vdpau/libvdpau_nvidia.so.1",
            f"{LIB}/vdpau/libvdpau_nvidia.so.{V}",
            "usr/share/nvidia/LICENSE",
            "usr/share/nvidia/files.d/sandboxutils-filelist.json",
            "usr/share/nvidia/supported-gpus/LICENSE",
            "usr/share/nvidia/supported-gpus/supported-gpus.json",
        ]
    )
    link = chosen[f"{LIB}/libcuda.so.1"]
    assert (link.source, link.target) == (None, f"libcuda.so.{V}")
    assert chosen["usr/share/nvidia/supported-gpus/LICENSE"].source == "supported-gpus/LICENSE"
    assert all(one.mode in (0o755, 0o644) for one in chosen.values() if one.source)
    assert chosen["usr/bin/nvidia-modprobe"].mode == 0o755
    assert chosen["usr/share/nvidia/LICENSE"].mode == 0o644


def test_the_other_architecture_has_its_own_folder(sample: module.Manifest) -> None:
    folders = {one.dest.rsplit("/", 1)[0] for one in select(sample, Arch.ARM64) if one.dest.startswith("usr/lib")}
    assert folders == {"usr/lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu/vdpau"}


def test_every_entry_is_either_selected_or_dropped_with_a_reason(sample: module.Manifest) -> None:
    kept = {one.entry for one in select(sample, Arch.AMD64)}
    out = dict(dropped(sample, Arch.AMD64))
    assert kept | set(out) == set(sample.entries)
    assert not kept & set(out)
    assert all(out.values())
    reasons = {entry.path: reason for entry, reason in out.items() if entry.arch != "COMPAT32"}
    assert {"nvidia-settings", "nvidia-xconfig", "nvidia-installer", "nvidia-uninstall"} <= set(reasons)
    assert {reason for entry, reason in out.items() if entry.arch == "COMPAT32"} == {"32-bit"}


def test_licences_are_asked_for_even_if_the_manifest_is_silent() -> None:
    manifest = parse(f"{HEAD}nvidia-smi 0755 UTILITY_BINARY MODULE:nvml\n")
    assert [one.source for one in select(manifest, Arch.AMD64) if one.entry is None] == [
        "LICENSE",
        "supported-gpus/LICENSE",
        "supported-gpus/supported-gpus.json",
    ]


def test_one_place_is_for_one_file() -> None:
    one, other = "libx.so.1 0755 CUDA_LIB NATIVE / MODULE:a\n", "b/libx.so.1 0755 UTILITY_LIB NATIVE MODULE:b\n"
    assert len(select(parse(HEAD + one + one), Arch.AMD64)) == 4
    with pytest.raises(BuildError, match=f"two entries for {LIB}/libx.so.1, got libx.so.1 and b/libx.so.1"):
        select(parse(HEAD + one + other), Arch.AMD64)


@pytest.mark.parametrize(
    "line",
    [
        "../nvidia-smi 0755 UTILITY_BINARY MODULE:nvml",
        "/etc/passwd 0755 UTILITY_BINARY MODULE:nvml",
        "evil 0755 EXPLICIT_PATH /usr/../../etc MODULE:x",
        "libx.so 0000 CUDA_SYMLINK NATIVE / /etc/passwd MODULE:x",
        "libx.so 0000 CUDA_SYMLINK NATIVE / ../../../../etc/passwd MODULE:x",
    ],
)
def test_nothing_leads_out_of_the_driver_root(line: str) -> None:
    with pytest.raises(BuildError, match="leads out of its folder"):
        select(parse(f"{HEAD}{line}\n"), Arch.AMD64)


def test_a_name_that_no_disk_takes_is_a_bad_line() -> None:
    with pytest.raises(BuildError, match="has a name of more than 255 bytes"):
        module.parse(f"title\n1.0\n\nnvidia\n\n\n./\n./\n{'a' * 256} 0644 DOCUMENTATION x MODULE:x\n\n")


def test_missing_names_absent_and_empty_files_and_links_to_nothing(sample: module.Manifest, tmp_path: Path) -> None:
    selected = select(sample, Arch.AMD64)
    fill(tmp_path, selected)
    assert missing(sample, selected, tmp_path) == ()

    (tmp_path / "firmware" / "gsp_ga10x.bin").unlink()
    (tmp_path / "LICENSE").write_bytes(b"")
    assert set(missing(sample, selected, tmp_path)) == {"firmware/gsp_ga10x.bin: not in the package", "LICENSE: empty"}

    without = parse(HEAD + BODY.replace(f"libcuda.so.{V} 0755 CUDA_LIB NATIVE / MODULE:gpgpu\n", ""))
    fill(tmp_path, selected)
    assert missing(without, select(without, Arch.AMD64), tmp_path) == (
        f"{LIB}/libcuda.so.1: its target libcuda.so.{V} is not kept",
        f"libcuda.so.{V}: not in the manifest",
    )


def test_soname_links_are_made_where_none_is(sample: module.Manifest, tmp_path: Path) -> None:
    selected = select(sample, Arch.AMD64)
    fill(tmp_path, selected)
    assert soname_links(selected, tmp_path) == ()
    for name, soname in (
        (f"libcuda.so.{V}", "libcuda.so.1"),  # the manifest has this link
        (f"libnvidia-gpucomp.so.{V}", f"libnvidia-gpucomp.so.{V}"),  # its own name
        (f"libnvidia-encode.so.{V}", "libnvidia-encode.so.1"),
        (f"libvdpau_nvidia.so.{V}", "libvdpau_nvidia.so.2"),
    ):
        (tmp_path / name).write_bytes(elf_library(soname))
    assert soname_links(selected, tmp_path) == (
        Placed(f"{LIB}/libnvidia-encode.so.1", None, f"libnvidia-encode.so.{V}", 0o777, None),
        Placed(f"{LIB}/vdpau/libvdpau_nvidia.so.2", None, f"libvdpau_nvidia.so.{V}", 0o777, None),
    )


def test_soname_links_refuse_what_they_cannot_read_or_decide(sample: module.Manifest, tmp_path: Path) -> None:
    selected = select(sample, Arch.AMD64)
    fill(tmp_path, selected)
    library = tmp_path / f"libnvidia-encode.so.{V}"
    for content, fact in (
        (b"#!/bin/sh\n", "is not a library that can be read"),
        (elf_library("../evil.so"), "SONAME with a folder"),
    ):
        library.write_bytes(content)
        with pytest.raises(BuildError, match=fact):
            soname_links(selected, tmp_path)
    for name in (library.name, f"libnvcuvid.so.{V}"):
        (tmp_path / name).write_bytes(elf_library("libsame.so.1"))
    with pytest.raises(BuildError, match="SONAME of two libraries"):
        soname_links(selected, tmp_path)
