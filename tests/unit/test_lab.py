"""The lab's decisions: what is made of what, where it goes, and what is said when it cannot be made."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
import zstandard

from builds import emulation, lab, layers, matrix, oci, runfile
from builds.cache import Cache
from builds.console import Reporter
from builds.errors import BuildError, ConfigurationError, InfrastructureError
from builds.lab import apt, commands, driver, images, inputs, package, recipes
from builds.lab.apt import Package
from builds.lab.package import Form, Line, Payload
from builds.lab.recipes import Rule
from builds.model import Arch, Cell, Flavor

CELL = Cell.parse("550.163.01-debian12-amd64-cloud")
BASES = [("debian13", Arch.AMD64)]

TARGETS = """\
Google|Other|http://mirror.invalid/apt
||http://unasked.invalid/
Debian|Debian Backports|http://mirror.invalid/backports
Debian|Debian-Security|http://mirror.invalid/security
Debian|Debian|http://mirror.invalid/debian
Debian|Debian|http://second.invalid/debian
"""

SHOWN = """\
Package: zlib1g
Version: 1:1.2.13-1
Architecture: amd64
Filename: pool/main/z/zlib/zlib1g_1.2.13-1_amd64.deb
Size: 12
SHA256: {zlib}
Description: library
 with a second line

Package: adduser
Version: 3.134
Architecture: all
Filename: pool/main/a/adduser/adduser_3.134_all.deb
Size: 7
SHA256: {adduser}
""".format(zlib="2" * 64, adduser="1" * 64)


def deb(name: str, version: str = "550.163.01-2") -> Package:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Package(name, version, "amd64", 1, digest, f"Package: {name}\nFilename: pool/x.deb")


# --- recipes


@pytest.mark.parametrize(
    ("what", "arguments", "known"),
    [
        (recipes.image, ("base", "debian99", Arch.AMD64), "debian12, debian12.bpo, debian13"),
        (recipes.image, ("base", "debian12.bpo", Arch.AMD64), "kmodbuild"),
        (recipes.driver, ("1.2.3", Arch.AMD64), "550.163.01"),
        (recipes.driver, ("470.256.02", Arch.ARM64), "amd64"),
    ],
)
def test_an_unknown_input_is_refused_and_the_known_ones_are_named(what, arguments, known) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError) as caught:
        what(*arguments)
    assert known in str(caught.value)


@pytest.mark.parametrize("gl", ["debian12", "debian12.bpo", "debian13", "debian13.bpo"])
@pytest.mark.parametrize("arch", Arch)
def test_every_release_has_the_headers_of_both_flavours(gl: str, arch: Arch) -> None:
    recipe = recipes.image("kmodbuild", gl, arch)
    names = {name.partition("/")[0] for name in recipe.headers or recipe.packages}
    assert {f"linux-headers-cloud-{arch}", f"linux-headers-{arch}"} <= names
    assert recipe.runs_on is Arch.AMD64


@pytest.mark.parametrize(
    ("gl", "suites"),
    [("debian12", ("bookworm",)), ("debian12.bpo", ("bookworm", "bookworm-backports"))],
)
def test_a_backported_kernel_alone_comes_from_the_backports(gl: str, suites: tuple[str, ...]) -> None:
    for arch in Arch:
        recipe = recipes.image("kmodbuild", gl, arch)
        assert recipe.suites == suites
        from_elsewhere = {name for name in (*recipe.packages, *recipe.headers) if "/" in name}
        assert all(name.startswith("linux-headers-") for name in from_elsewhere)


CELLS = matrix.select({"GL_VERSION": "lab", "DRIVER_VERSION": "all", "TARGET_ARCH": "all", "KERNEL_FLAVOR": "all"})


@pytest.mark.parametrize("of", sorted({(cell.gl, cell.arch, cell.flavor) for cell in CELLS}), ids="-".join)
def test_every_kernel_of_the_lab_is_a_package_of_its_own_or_comes_with_the_headers(
    of: tuple[str, Arch, Flavor],
) -> None:
    """Debian's headers bring it from trixie on, if they are not unpacked without what they depend on."""
    gl, arch, flavor = of
    recipe, kmodbuild = recipes.kernel(gl, arch, flavor), recipes.image("kmodbuild", gl, arch)
    if recipe is None:
        assert gl.startswith("debian13")
        assert not kmodbuild.headers
        return
    name, _, suite = recipe.package.partition("/")
    assert name == f"linux-image-{'cloud-' if flavor is Flavor.CLOUD else ''}{arch}"
    headers = {one for one in (*kmodbuild.packages, *kmodbuild.headers) if one.startswith("linux-headers-")}
    assert recipe.package.replace("-image-", "-headers-") in headers, "headers and kernel are of one suite"
    assert recipe.suites == kmodbuild.suites
    assert bool(suite) is (".bpo" in gl)


def test_the_base_has_the_tools_of_the_installer() -> None:
    for gl, arch in product(("debian12", "debian13"), Arch):
        recipe = recipes.image("base", gl, arch)
        assert {"kmod", "pciutils"} <= set(recipe.packages) and recipe.runs_on is arch


@pytest.mark.parametrize(
    ("path", "place", "kind"),
    [
        ("usr/lib/x86_64-linux-gnu/nvidia/current/libcuda.so.550.163.01", "libcuda.so.550.163.01", "CUDA_LIB"),
        ("usr/lib/aarch64-linux-gnu/nvidia/current/libnvcuvid.so.1", "libnvcuvid.so.1", "NVCUVID_LIB"),
        ("usr/lib/firmware/nvidia/550.163.01/gsp_ga10x.bin", "firmware/gsp_ga10x.bin", "FIRMWARE"),
        ("usr/lib/nvidia/current/nvidia-smi", "nvidia-smi", "UTILITY_BINARY"),
        ("usr/bin/nvidia-modprobe", "nvidia-modprobe", "NVIDIA_MODPROBE"),
        ("usr/share/doc/nvidia-driver/copyright", "LICENSE", "DOCUMENTATION"),
        ("usr/share/doc/nvidia-driver-bin/copyright", "supported-gpus/LICENSE", "DOCUMENTATION"),
        ("usr/share/doc/nvidia-driver/supported-gpus.json.gz", "supported-gpus/supported-gpus.json", "DOCUMENTATION"),
    ],
)
def test_a_file_of_debian_goes_where_the_vendor_has_it(path: str, place: str, kind: str) -> None:
    rule = recipes.driver("550.163.01", Arch.AMD64).rule(path)
    assert rule and (rule.place(path), rule.type) == (place, kind)


@pytest.mark.parametrize(
    ("version", "path", "place", "kind"),
    [
        ("470.256.02", "lib/firmware/nvidia/470.256.02/gsp.bin", "firmware/gsp.bin", "FIRMWARE"),
        ("470.256.02", "usr/share/doc/nvidia-tesla-470-driver/copyright", "LICENSE", "DOCUMENTATION"),
        ("470.256.02", "usr/lib/x/nvidia/tesla-470/libnvidia-ifr.so.1", "libnvidia-ifr.so.1", "NVIFR_LIB"),
        ("535.261.03", "lib/firmware/nvidia/535.261.03/gsp_tu10x.bin", "firmware/gsp_tu10x.bin", "FIRMWARE"),
    ],
)
def test_other_branches_have_their_own_places(version: str, path: str, place: str, kind: str) -> None:
    rule = recipes.driver(version, Arch.AMD64).rule(path)
    assert rule and (rule.place(path), rule.type) == (place, kind)


def test_the_driver_packages_of_the_lab_are_of_different_forms() -> None:
    made = {version: recipes.driver(version, Arch.AMD64) for version in ("470.256.02", "535.261.03", "550.163.01")}
    assert {version: dict(one.sources).keys() for version, one in made.items()} == {
        "470.256.02": {"kernel"},
        "535.261.03": {"kernel", "kernel-open"},
        "550.163.01": {"kernel", "kernel-open"},
    }
    assert len({one.form for one in made.values()}) == 3
    assert recipes.driver("550.163.01", Arch.ARM64).packages == made["550.163.01"].packages[:-1]


@pytest.mark.parametrize("path", ["usr/share/doc/libcuda1/copyright", "usr/share/lintian/overrides/nvidia-smi"])
def test_papers_of_debian_are_ignored(path: str) -> None:
    assert recipes.driver("550.163.01", Arch.AMD64).rule(path) is None


def test_a_file_that_no_rule_knows_is_not_left_out_in_silence() -> None:
    with pytest.raises(LookupError):
        recipes.driver("550.163.01", Arch.AMD64).rule("usr/lib/x86_64-linux-gnu/libnew.so.1")


# --- the archive


def test_debian_is_found_among_the_sources_of_other_vendors() -> None:
    assert apt.archive_of(TARGETS) == "http://mirror.invalid/debian"


@pytest.mark.parametrize("targets", ["", "Ubuntu|Ubuntu|http://mirror.invalid/ubuntu\n", "||http://mirror.invalid/\n"])
def test_a_machine_without_debian_is_told_so(targets: str) -> None:
    with pytest.raises(InfrastructureError, match="not among the sources"):
        apt.archive_of(targets)


def test_the_configuration_of_apt_is_its_own_but_for_the_machines_way_to_the_network() -> None:
    text = apt.configuration(Path("/cache/lab/apt/x"), Arch.ARM64)
    for setting in ("Dir::State", "Dir::Cache", "Dir::Etc::sourceparts", "Dir::Etc::preferencesparts"):
        assert setting in text
    assert "#clear APT::Update;" in text
    assert 'APT::Architectures { "arm64"; };' in text
    assert "Proxy" not in text and "netrc" not in text and "Dir::Etc::parts" not in text


def test_what_a_simulated_installation_installs_is_read() -> None:
    said = """\
Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])
Inst gcc (4:12.2.0-3 Debian:12.15/oldstable [amd64]) []
Conf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])
"""
    assert apt.simulated(said) == (("libc6", "2.36-9+deb12u14"), ("gcc", "4:12.2.0-3"))


def test_packages_are_read_from_what_apt_shows_sorted_and_once() -> None:
    found = apt.stanzas(SHOWN + "\n" + SHOWN)
    assert [one.name for one in found] == ["adduser", "zlib1g"]
    assert found[1].identity == ("zlib1g", "1:1.2.13-1", "2" * 64)
    assert (found[0].arch, found[0].size) == ("all", 7)


def test_the_index_of_the_folder_names_the_files_of_the_pool() -> None:
    index = apt.flat_index(apt.stanzas(SHOWN))
    assert f"Filename: ./{'1' * 64}.deb" in index
    assert "pool/" not in index
    assert [one.name for one in apt.stanzas(index)] == ["adduser", "zlib1g"]
    assert f"{hashlib.sha256(index.encode()).hexdigest()} {len(index)} Packages" in apt.flat_release("trixie", index)


def test_the_sources_are_the_suites_that_are_named_and_no_others() -> None:
    lines = apt.source_lines("http://mirror.invalid/debian", ("a", "a-backports"), ("main",), Path("/keys"))
    assert lines == (
        "deb [signed-by=/keys] http://mirror.invalid/debian a main\n"
        "deb [signed-by=/keys] http://mirror.invalid/debian a-backports main\n"
    )


@pytest.mark.parametrize(
    ("said", "fact"),
    [
        (
            "E: The repository 'http://x a-backports Release' does not have a Release file.",
            "has none of a, a-backports",
        ),
        ("E: Temporary failure resolving 'x'", "apt-get failed"),
    ],
)
def test_a_suite_that_is_gone_is_told_from_a_network_that_is(
    said: str, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = apt.Archive(tmp_path, ("a", "a-backports"), Arch.AMD64, ("main",))
    monkeypatch.setattr(commands, "require", lambda _: None)
    monkeypatch.setattr(apt, "_keyring", lambda: Path("/keys"))

    def output(command: list[str], *, subject: str, **_: object) -> str:
        if "update" in command:
            raise InfrastructureError(subject, "apt-get failed with status 100", got=said)
        return TARGETS

    monkeypatch.setattr(commands, "output", output)
    with pytest.raises(InfrastructureError, match=fact):
        archive.update()


# --- images


def test_headers_of_another_architecture_go_in_by_the_images_own_dpkg() -> None:
    recipe = recipes.image("kmodbuild", "debian12", Arch.ARM64)
    contents = images.Contents((deb("make"),), ("make",), (deb("linux-headers-6.1.0-1-cloud-arm64"),))
    line = images.command(recipe, contents, Path("/r"), Path("/a b"), Path("/t"))
    assert "--architectures=amd64" in line and "--include=make" in line
    hooks = [word.removeprefix("--customize-hook=") for word in line if word.startswith("--customize-hook=")]
    assert "cp '/a b'/*.deb" in hooks[0]
    assert hooks[1] == 'chroot "$1" dpkg --add-architecture arm64'
    assert "--force-depends" in hooks[2]
    assert not any("foreign" in hook for hook in hooks[4:]), "what was copied is gone before the image is cleaned"


@pytest.mark.parametrize(("runs", "error"), [(False, InfrastructureError), (True, BuildError)])
def test_an_image_of_an_architecture_that_does_not_run_here_is_not_tried(
    runs: bool, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulation, "host_runs", lambda _: runs)
    monkeypatch.setattr(images, "command", lambda *_: ("sh", "-c", "exit 1"))
    recipe = recipes.image("base", "debian13", Arch.ARM64)
    with pytest.raises(error) as caught:
        images.build(recipe, images.Contents((), ()), tmp_path, tmp_path, tmp_path / "log", lambda _: None)
    assert ("--arch arm64" in str(caught.value)) is not runs


def test_an_image_is_made_without_the_network_and_dies_with_us() -> None:
    recipe = recipes.image("base", "debian13", Arch.AMD64)
    contents = images.Contents((deb("kmod"),), ("kmod",))
    line = images.command(recipe, contents, Path("/cache/repository"), Path("/cache/f"), Path("/cache/root.tar"))
    assert line[:3] == ("setpriv", "--pdeathsig", "KILL")
    assert "--kill-child" in line and "--mount" in line
    assert line[-3:] == ("trixie", "/cache/root.tar", "deb [trusted=yes] copy:/cache/repository ./")
    assert not any("http" in word for word in line)


@pytest.mark.parametrize(
    ("said", "error"), [("E: No space left on device", InfrastructureError), ("E: broken packages", BuildError)]
)
def test_a_failed_installation_shows_the_end_of_its_log(
    said: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "command", lambda *_, **__: ("sh", "-c", f"echo Setting up x; echo '{said}'; exit 25"))
    units: list[int] = []
    with pytest.raises(error, match="status 25") as caught:
        images.build(
            recipes.image("base", "debian13", Arch.AMD64),
            images.Contents((), ()),
            tmp_path,
            tmp_path,
            tmp_path / "log",
            units.append,
        )
    assert said in str(caught.value) and str(tmp_path / "log") in str(caught.value)
    assert units == [1]


def test_an_image_is_named_in_its_layout(tmp_path: Path) -> None:
    recipe = recipes.image("kmodbuild", "debian12", Arch.AMD64)
    (tmp_path / "part").mkdir()
    layer = layers.write_layer([layers.Entry("etc/hi", "file", source=b"hi")], tmp_path / "part" / images.LAYER)
    facts = {**layer.descriptor.to_json(), "diff_id": layer.diff_id}
    (tmp_path / "part" / images.LAYER_FACTS).write_text(json.dumps(facts))
    made = images.add(tmp_path / "part", recipe, tmp_path / "layout", "amd64-debian12")
    found = oci.find_image(tmp_path / "layout", "amd64-debian12", Arch.AMD64)
    assert found.digest == made.digest
    assert found.layers == (layer,)
    oci.check_blobs(found)


# --- the driver package


def test_the_lines_of_a_manifest_are_as_the_vendor_writes_them() -> None:
    assert (
        str(Line("libcuda.so.1", 0, "CUDA_SYMLINK", "gpgpu", "NATIVE /", "libcuda.so.460.67"))
        == "libcuda.so.1 0000 CUDA_SYMLINK NATIVE / libcuda.so.460.67 MODULE:gpgpu"
    )
    assert str(Line("nvidia-smi", 0o755, "UTILITY_BINARY", "nvml")) == "nvidia-smi 0755 UTILITY_BINARY MODULE:nvml"
    assert (
        str(Line("nvidia-modprobe", 0o4755, "NVIDIA_MODPROBE", "installer", "/usr/bin/"))
        == "nvidia-modprobe 04755 NVIDIA_MODPROBE /usr/bin/ MODULE:installer"
    )
    assert (
        str(driver.source_line("kernel/dkms.conf"))
        == "kernel/dkms.conf 0644 DKMS_CONF INHERIT_PATH_DEPTH:1 MODULE:resman"
    )


def test_a_manifest_has_eight_lines_before_its_entries_and_an_empty_one_behind() -> None:
    lines = [Line("b", 0o644, "CUDA_ICD", "x"), Line("a", 0o644, "CUDA_ICD", "x")]
    text = package.manifest("550.163.01", Arch.AMD64, lines).split("\n")
    assert text[1] == "550.163.01"
    assert text[3].split()[0] == "nvidia"
    assert text[6:8] == ["./kernel/", "./kernel/precompiled/"]
    assert [line.split()[0] for line in text[8:10]] == ["a", "b"]
    assert text[10:] == ["", ""]


def test_links_keep_their_target_and_take_the_type_for_links() -> None:
    rule = Rule(("libcuda.so*",), "gpgpu", type="CUDA_LIB", link="CUDA_SYMLINK", fields="NATIVE /")
    line = driver.link_line("usr/lib/x/libcuda.so.1", "libcuda.so.550.163.01", rule)
    assert line == Line("libcuda.so.1", 0, "CUDA_SYMLINK", "gpgpu", "NATIVE /", "libcuda.so.550.163.01")
    assert driver.link_line("x/a.so", "b.so", Rule(("a.so",), "x", type="XMODULE_SHARED_LIB")) is None


@pytest.mark.parametrize(
    ("member", "path"),
    [
        ("modules/nvidia-kernel/nvidia/nv.c", "nvidia/nv.c"),
        ("./modules/nvidia-kernel/Makefile", "Makefile"),
        ("modules/nvidia-kernel/debian/rules", None),
        ("modules/nvidia-kernel", None),
    ],
)
def test_sources_lose_the_folders_above_them_and_what_debian_added(member: str, path: str | None) -> None:
    assert driver.source_path(member, ("debian/*",)) == path


def test_another_driver_version_in_the_archive_is_refused_but_for_what_debian_builds_itself() -> None:
    recipe = recipes.driver("550.163.01", Arch.AMD64)
    driver.check_versions(recipe, [deb("libcuda1"), deb("nvidia-modprobe", "570.133.07-1"), deb("a", "1:550.163.01-1")])
    with pytest.raises(BuildError, match="libcuda1") as caught:
        driver.check_versions(recipe, [deb("libcuda1", "550.90.07-1")])
    assert caught.value.got == "550.90.07-1"


@pytest.mark.parametrize("data", [b"", b"a", b"abc" * 100_000, bytes(300)])
def test_the_checksum_is_that_of_cksum(data: bytes) -> None:
    theirs = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout.split()[0]
    pieces = (data[at : at + 4096] for at in range(0, len(data), 4096))
    assert package.posix_cksum(pieces) == int(theirs)


def _tree(folder: Path) -> list[Line]:
    folder.mkdir(parents=True)
    (folder / "kernel").mkdir()
    (folder / "kernel" / "Makefile").write_text("all:\n")
    (folder / "nvidia-smi").write_bytes(b"\x7fELF")
    return [
        Line("nvidia-smi", 0o4755, "UTILITY_BINARY", "nvml"),
        driver.source_line("kernel/Makefile"),
        Line("libcuda.so.1", 0, "CUDA_SYMLINK", "gpgpu", "NATIVE /", "libcuda.so.2"),
    ]


def test_a_package_has_the_vendors_header_and_holds_the_tree(tmp_path: Path) -> None:
    lines = _tree(tmp_path / "tree")
    target = tmp_path / "x.run"
    package.write(tmp_path / "tree", "550.163.01", Arch.AMD64, lines, target, lambda _: None)
    data = target.read_bytes()
    first, crc, md5, rest = data.split(b"\n", 3)
    assert first == b"#! /bin/sh"
    assert crc == b"CRCsum=%d" % package.posix_cksum([rest])
    assert md5 == b"MD5=" + hashlib.md5(rest).hexdigest().encode()
    head = dict(line.split(b"=", 1) for line in rest.split(b"\n")[:6])
    assert (head[b"TARGET_OS"], head[b"TARGET_ARCH"]) == (b'"Linux"', b'"x86_64"')
    payload = b"\n".join(data.split(b"\n")[int(head[b"skip"]) - 1 :])
    with (
        zstandard.ZstdDecompressor().stream_reader(io.BytesIO(payload)) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        members = {member.name: member for member in archive}
    assert list(members) == ["./.manifest", "./kernel", "./kernel/Makefile", "./nvidia-smi"]
    assert members["./nvidia-smi"].mode == 0o755
    assert {(one.uid, one.mtime) for one in members.values()} == {(0, oci.EPOCH)}


@pytest.mark.parametrize("payload", ["zstd", "xz", "gzip"])
@pytest.mark.parametrize("decompressor", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_package_of_each_form_is_read(tmp_path: Path, payload: Payload, decompressor: bool, old: bool) -> None:
    lines, target, form = _tree(tmp_path / "tree"), tmp_path / "x.run", Form(payload, decompressor, old)
    package.write(tmp_path / "tree", "1.2", Arch.AMD64, lines, target, lambda _: None, form)
    header = runfile.read_header(target)
    assert runfile.check(target, header, version="1.2", arch=Arch.AMD64, sha256=None)
    assert runfile.payload_format(target, header) == payload
    assert (header.decompressor is not None) == decompressor
    assert (b'\nCRCsum="' in target.read_bytes()) == old
    runfile.unpack(target, header, tmp_path / "read")
    assert (tmp_path / "read" / "kernel" / "Makefile").read_text() == "all:\n"
    if header.decompressor:
        first, size = header.decompressor
        embedded = b"\n".join(target.read_bytes().split(b"\n")[first - 1 : first + size - 1])
        assert embedded.startswith(b"#! /bin/sh\n") and first + size == header.skip
        done = subprocess.run(["sh"], input=embedded, capture_output=True, check=False)
        assert done.returncode == 1, "whoever runs it finds out"


def test_the_same_tree_gives_the_same_package_wherever_it_is(tmp_path: Path) -> None:
    made = []
    for place in ("one", "another/place"):
        lines = _tree(tmp_path / place / "tree")
        package.write(tmp_path / place / "tree", "1.2", Arch.ARM64, lines, tmp_path / place / "x", lambda _: None)
        made.append((tmp_path / place / "x").read_bytes())
    assert made[0] == made[1]


def test_a_package_that_is_run_says_what_it_is_and_fails(tmp_path: Path) -> None:
    package.write(tmp_path / "t", "1.2", Arch.AMD64, _tree(tmp_path / "t"), tmp_path / "x", lambda _: None)
    done = subprocess.run(["sh", str(tmp_path / "x")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not to be run" in done.stderr


# --- making


class _Made:
    """An archive, an installer and a packer that only pretend, and count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.version, self.built = "550.163.01-1", 0
        self.network = True
        monkeypatch.setattr(commands, "require", lambda _: None)
        monkeypatch.setattr(inputs, "_mmdebstrap_version", lambda: "mmdebstrap 1")
        monkeypatch.setattr(apt.Archive, "update", self.update)
        monkeypatch.setattr(apt.Archive, "closure", lambda _, names: self.packages(names))
        monkeypatch.setattr(apt.Archive, "named", lambda _, names: self.packages(names))
        monkeypatch.setattr(apt.Archive, "download", self.download)
        monkeypatch.setattr(images, "build", self.image)
        monkeypatch.setattr(driver, "build", self.driver)

    def update(self, *_: object) -> None:
        if not self.network:
            raise InfrastructureError("Debian's archive", "apt-get failed", hint="is the network up")

    def packages(self, names: Iterable[str]) -> tuple[Package, ...]:
        packages = [deb(name, self.version) for name in names]
        if kernels := [name for name in names if name.startswith("linux-image-")]:
            packages += [deb(f"linux-image-6.1.0-{len(kernels)}-amd64", self.version), deb("linux-base", "4.9")]
        return tuple(packages)

    def download(self, packages: Iterable[Package], pool: Path, *__: object) -> None:
        pool.mkdir(parents=True, exist_ok=True)
        for one in packages:
            (pool / apt.file_name(one)).write_text(one.name)

    def image(self, _: object, __: object, ___: object, folder: Path, *____: object) -> None:
        self.built += 1
        layer = layers.write_layer([layers.Entry("v", "file", source=self.version.encode())], folder / images.LAYER)
        facts = {**layer.descriptor.to_json(), "diff_id": layer.diff_id}
        (folder / images.LAYER_FACTS).write_text(json.dumps(facts))

    def driver(self, recipe: recipes.DriverRecipe, _: object, __: object, folder: Path, ___: object) -> None:
        self.built += 1
        (folder / driver.package_name(recipe)).write_text(self.version)


KERNEL = "linux-image-6.1.0-1-amd64_550.163.01-1_amd64.deb"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> _Made:
    """A lab whose archive and tools only pretend."""
    return _Made(monkeypatch)


def test_inputs_are_put_where_the_pipeline_looks_for_them(made: _Made, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert len(lab.missing([CELL], BASES, cache)) == 4
    lab.make([CELL], BASES, cache, Reporter())
    assert lab.missing([CELL], BASES, cache) == ()
    oci.find_image(lab.images_root(tmp_path) / "kmodbuild", "amd64-debian12", Arch.AMD64)
    oci.find_image(lab.images_root(tmp_path), "debian13", Arch.AMD64)
    assert (lab.packages_root(tmp_path) / "550.163.01" / "NVIDIA-Linux-x86_64-550.163.01.run").is_file()
    (kernel,) = lab.kernels_root(tmp_path).iterdir()
    assert (kernel.name, kernel.read_text()) == (KERNEL, "linux-image-6.1.0-1-amd64")


def test_inputs_are_made_again_only_when_something_changed(made: _Made, tmp_path: Path) -> None:
    cache, report = Cache(tmp_path), Reporter()
    lab.make([CELL], BASES, cache, report)
    lab.make([CELL, CELL], BASES, cache, report)
    assert made.built == 3
    assert [step.outcome for step in report.steps][-4:] == ["up to date"] * 4
    made.version = "550.163.01-2"
    lab.make([CELL], BASES, cache, report)
    assert made.built == 6
    assert len([path for path in (tmp_path / "lab" / "parts").iterdir() if path.is_dir()]) == 4
    assert [path.name for path in lab.kernels_root(tmp_path).iterdir()] == [KERNEL.replace("-1_", "-2_")]
    assert lab.missing([CELL], BASES, cache) == ()


@pytest.mark.parametrize(
    "lost",
    [
        "lab/driver/550.163.01/NVIDIA-Linux-x86_64-550.163.01.run",
        "lab/images/index.json",
        "lab/kernels/linux-image-6.1.0-1-amd64_550.163.01-1_amd64.deb",
    ],
)
def test_a_lost_output_is_missing_and_comes_back_from_the_cache(made: _Made, tmp_path: Path, lost: str) -> None:
    cache = Cache(tmp_path)
    lab.make([CELL], BASES, cache, Reporter())
    (tmp_path / lost).unlink()
    assert len(lab.missing([CELL], BASES, cache)) == 1
    lab.make([CELL], BASES, cache, Reporter())
    assert lab.missing([CELL], BASES, cache) == ()
    assert made.built == 3


def test_an_older_recipes_output_is_missing(made: _Made, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    lab.make([CELL], [], cache, Reporter())
    record = tmp_path / "lab" / "made" / "kmodbuild-amd64-debian12.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "code": "older"}))
    assert lab.missing([CELL], [], cache) == ("kmodbuild image amd64-debian12",)


def test_without_the_archive_what_is_there_is_kept_and_what_is_not_is_an_error(made: _Made, tmp_path: Path) -> None:
    cache, report = Cache(tmp_path), Reporter()
    lab.make([CELL], [], cache, report)
    made.network = False
    lab.make([CELL], [], cache, report)
    assert report.steps[-1].outcome == "kept as it is"
    with pytest.raises(InfrastructureError, match="base image amd64-debian13") as caught:
        lab.make([CELL], BASES, cache, report)
    assert "is the network up" in str(caught.value)


def test_what_a_killed_run_left_is_removed(made: _Made, tmp_path: Path) -> None:
    left = tmp_path / "lab" / "parts" / "abc.part"
    left.mkdir(parents=True)
    lab.make([CELL], [], Cache(tmp_path), Reporter())
    assert not left.exists()


def test_missing_commands_of_the_host_are_named_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InfrastructureError, match="mmdebstrap, setpriv") as caught:
        commands.require(("mmdebstrap", "setpriv"))
    assert "nox -s setup" in str(caught.value)
