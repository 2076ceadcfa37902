"""Fabric manager, nvlsm, nscq and imex in a real image, from stand-ins: the vendor's own archives are not at hand.

The stand-ins have the vendor's names, folders and links; their programs are a few lines of C that say a version.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from builds import compile as compiling
from builds import components, pipeline
from builds import engine as engines
from builds import http as ours
from builds.cache import Cache, remove
from builds.console import Reporter
from builds.errors import BuildError, ConfigurationError, InfrastructureError
from builds.model import Arch
from builds.record import Outcome, Record

from .conftest import Built, run_builds
from .draft import ROOT, Draft, swap_text, thaw
from .sites import Site, serving
from .test_specimens import Bench, failed

SAYS = """
extern int puts(const char *);
extern void exit(int);
__attribute__((force_align_arg_pointer)) void _start(void) { puts(SAID); exit(0); }
"""
"""A program without the C library's start files, which a kmodbuild image does not have."""

MAKE = r"""
set -eu
libc=$(ls /lib/*-linux-gnu/libc.so.6)
program() { gcc -nostdlib -fno-stack-protector -DSAID="\"$2\"" -o "$1" /src/says.c $3 "$libc"; }
library() { echo 'int nothing;' | gcc -shared -nostdlib -Wl,-soname,"$2" -o "$1" -xc -; }
mkdir -p /out/fabricmanager/bin /out/fabricmanager/lib /out/nvlsm/sbin /out/nvlsm/lib /out/nscq/lib /out/imex/usr/bin
program /out/fabricmanager/bin/nv-fabricmanager "Fabric Manager version is : $VERSION" ''
program /out/fabricmanager/bin/nvswitch-audit 'usage' ''
library /out/fabricmanager/lib/libnvfm.so.1 libnvfm.so.1
library /src/libibumad.so.3 libibumad.so.3
program /out/nvlsm/sbin/nvlsm 'OpenSM' '-Wl,--no-as-needed /src/libibumad.so.3'
library /out/nvlsm/lib/libgrpc_mgr.so libgrpc_mgr.so
library "/out/nscq/lib/libnvidia-nscq.so.$VERSION" libnvidia-nscq.so.2
program /out/imex/usr/bin/nvidia-imex 'usage' ''
program /out/imex/usr/bin/nvidia-imex-ctl 'usage' ''
"""

TEXTS = {
    "fabricmanager": (
        *("etc/fabricmanager.cfg", "share/nvidia/nvswitch/dgxh100_hgxh100_topology", "include/nv_fm_agent.h"),
        *("systemd/nvidia-fabricmanager.service", "sbin/fm_run_package_installer.sh"),
    ),
    "nvlsm": ("share/nvidia/nvlsm/nvlsm.conf", "share/nvidia/nvlsm/grpc_mgr.conf"),
    "nscq": (),
    "imex": ("etc/nvidia-imex/config.cfg", "lib/systemd/system/nvidia-imex.service"),
}


def _mirror(made: Path, root: Path, version: str) -> None:
    """Pack what was compiled as the vendor packs it, and list it as the vendor lists it."""
    document = {}
    for component in components.COMPONENTS:
        tree, key = made / component.name, component.listed[0]
        for path in (*TEXTS[component.name], "LICENSE", "third-party-notices.txt"):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(f"{path}: a stand-in for the tests\n")
        of = "2025.03.9" if component.name == "nvlsm" else version
        top = f"{key}-linux-x86_64-{of}-archive"
        relative = f"{key}/linux-x86_64/{top}.tar.xz"
        (root / relative).parent.mkdir(parents=True)
        with tarfile.open(root / relative, "w:xz", preset=0) as tar:
            tar.add(tree, top)
        data = (root / relative).read_bytes()
        said = {"relative_path": relative, "sha256": hashlib.sha256(data).hexdigest(), "size": str(len(data))}
        document[key] = {"name": f"a stand-in for {key}", "version": of, "linux-x86_64": said}
    (root / f"redistrib_{version}.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def mirror(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the vendor's site has it, with stand-ins for the default cell's driver."""
    made, root, version = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("redist"), built.plan.cell.driver
    image = compiling.load_kmodbuild(built.engine, built.kmodbuild, built.report)
    command = ["/bin/sh", "/src/make.sh"]
    with engines.container(built.engine, image, command, environment={"VERSION": version}) as container:
        for name, text in {"says.c": SAYS, "make.sh": MAKE}.items():
            engines.put_file(container, f"/src/{name}", text.encode())
        assert engines.run(container, made / "log") == 0, (made / "log").read_text()
        engines.get_tree(container, "/out", made)
    for link, target in {
        "libnvidia-nscq.so.2.0": f"libnvidia-nscq.so.{version}",
        "libnvidia-nscq.so": "libnvidia-nscq.so.2.0",
    }.items():
        (made / "nscq/lib" / link).symlink_to(target)
    _mirror(made, root, version)
    return root


@dataclass(frozen=True)
class Equipped:
    """The default cell with all components, built and verified."""

    built: Built
    record: Record


@pytest.fixture(scope="module")
def equipped(built: Built, mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Equipped:
    out = tmp_path_factory.mktemp("equipped")
    env = {"OUT_DIR": str(out), "NVIDIA_REDIST_URL": str(mirror)}
    done = run_builds("verify", str(built.cell), env=env)
    assert done.returncode == 0, done.stderr
    assert "absent by rule" not in done.stderr
    run = pipeline.start(built.cell, {"out_dir": str(out), "nvidia_redist_url": str(mirror)}, built.report)
    made, inputs = pipeline.plan(run)
    image = pipeline.build(run)
    here = Built(built.cell, made, inputs, image, run.cache, built.engine, built.report, run.out, built.kernels)
    return Equipped(here, Record.read(run.out / "record.json"))


def test_an_image_has_the_components_and_shares_the_rest(equipped: Equipped, built: Built) -> None:
    made = equipped.built.plan
    assert {name: one.version for name, one in made.components.items()} == {
        "fabricmanager": made.cell.driver,
        "nvlsm": "2025.03.9",
        "nscq": made.cell.driver,
        "imex": made.cell.driver,
    }
    assert made.components_absent == {}
    assert made.sets == built.plan.sets
    assert (made.userspace, made.image) != (built.plan.userspace, built.plan.image)
    assert equipped.record.passed
    passed = {check.name for check in equipped.record.of(Outcome.PASSED)}
    libraries = f"usr/lib/{made.cell.arch.triplet}"
    assert {
        "runtime.fabric-manager",
        *(f"driver-root.components[{name}]" for name in components.NAMES),
        "driver-root.bytes[usr/bin/nv-fabricmanager]",
        "driver-root.bytes[usr/share/nvidia/nvswitch/fabricmanager.cfg]",
        "driver-root.bytes[usr/share/nvidia/imex/LICENSE]",
        "driver-root.needed[usr/bin/nv-fabricmanager]",
        "driver-root.machine[usr/bin/nvidia-imex]",
        f"driver-root.soname[{libraries}/libnvidia-nscq.so.{made.cell.driver}]",
        f"driver-root.links[{libraries}/libnvidia-nscq.so.2]",
        "runtime.tools[usr/bin/nvlsm]",
        "runtime.loads[usr/bin/nv-fabricmanager]",
    } <= passed


def test_the_plan_of_a_lab_cell_says_why_it_has_none(built: Built) -> None:
    assert built.plan.components == {}
    assert set(built.plan.components_absent) == set(components.NAMES)


@pytest.fixture(scope="module")
def bench(equipped: Equipped, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder, here = tmp_path_factory.mktemp("specimens"), equipped.built
    yield Bench(here, thaw(here.image, here.plan, len(here.inputs.base.layers), folder / "sound"), folder)
    remove(folder)


@pytest.fixture
def layout(bench: Bench) -> Iterator[Path]:
    yield bench.folder / "specimen"
    remove(bench.folder / "specimen")


def test_a_fabric_manager_that_says_another_version_is_refused(bench: Bench, layout: Path) -> None:
    draft = Draft(bench.sound)
    version = bench.built.plan.cell.driver.encode()
    draft.edit(f"{ROOT}/usr/bin/nv-fabricmanager", swap_text(version, version[:-1] + b"9"))
    record = bench.verify(draft.write(layout), "runtime", engine=bench.built.engine)
    assert failed(record) == {"runtime.fabric-manager"}


def test_a_component_that_was_left_out_is_missed(bench: Bench, layout: Path) -> None:
    draft = Draft(bench.sound)
    draft.delete(f"{ROOT}/usr/bin/nv-fabricmanager", f"{draft.libraries}/libnvidia-nscq.so.{draft.plan.cell.driver}")
    refusing = failed(bench.verify(draft.write(layout), "driver-root"))
    assert {"driver-root.components[fabricmanager]", "driver-root.components[nscq]"} <= refusing
    assert "driver-root.files[usr/bin/nv-fabricmanager]" in refusing
    assert "driver-root.components[imex]" not in refusing


def test_a_program_of_a_component_that_lacks_a_library_is_refused(bench: Bench, layout: Path) -> None:
    """What nvlsm alone may lack nobody else may."""
    draft = Draft(bench.sound)
    draft.edit(f"{ROOT}/usr/bin/nvidia-imex", lambda _: bench.sound.read(f"{ROOT}/usr/bin/nvlsm"))
    record = bench.verify(draft.write(layout), "driver-root", "runtime", engine=bench.built.engine)
    assert {"driver-root.needed[usr/bin/nvidia-imex]", "runtime.tools[usr/bin/nvidia-imex]"} <= failed(record)


def test_an_image_without_a_source_for_what_it_has_is_refused(bench: Bench, layout: Path, built: Built) -> None:
    """The image with components, held against the plan of the cell without."""
    other = replace(bench, built=replace(bench.built, plan=built.plan, inputs=built.inputs))
    refusing = failed(other.verify(Draft(bench.sound).write(layout), "driver-root"))
    assert {f"driver-root.components[{name}]" for name in components.NAMES} <= refusing


# From a server


@pytest.fixture
def site(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(ours, "_FIRST_PAUSE", 0.001)
    files: dict[str, bytes | Path] = {f"/redist/{path.relative_to(mirror)}": path for path in mirror.rglob("*.*")}
    with serving(Site(files)) as running:
        yield running


def resolve(site: Site, built: Built, tmp_path: Path) -> components.Resolved:
    cache = Cache(tmp_path / "cache")
    return components.resolve(f"{site.url}/redist", built.plan.cell.driver, Arch.AMD64, cache, Reporter())


def test_components_come_from_a_server_once(site: Site, equipped: Equipped, tmp_path: Path) -> None:
    found = resolve(site, equipped.built, tmp_path)
    assert {name: one.sha256 for name, one in found.listed.items()} == {
        name: one.sha256 for name, one in equipped.built.plan.components.items()
    }
    site.answers[""] = 503, b""
    assert resolve(site, equipped.built, tmp_path) == found, "nobody is asked again"


def test_only_a_404_for_the_document_is_absence(site: Site, built: Built, tmp_path: Path) -> None:
    name = f"redistrib_{built.plan.cell.driver}.json"
    for status in (500, 503, 403):
        site.answers[""] = status, b"<html>"
        with pytest.raises(InfrastructureError, match=str(status)):
            resolve(site, built, tmp_path)
    site.answers[""] = 404, b"<html>"
    assert set(resolve(site, built, tmp_path).absent.values()) == {f"its source has no {name}"}
    site.answers[""] = 200, b"<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(BuildError, match="is no JSON document"):
        resolve(site, built, tmp_path)
    site.answers.clear()
    assert resolve(site, built, tmp_path).absent == {}, "nothing of it stays"


def test_a_server_that_cannot_be_reached_is_no_absence(built: Built, tmp_path: Path) -> None:
    with serving(Site({})) as gone:
        pass
    with pytest.raises(InfrastructureError, match="cannot be downloaded"):
        resolve(gone, built, tmp_path)


def test_what_does_not_fit_can_be_mended_on_either_side(site: Site, mirror: Path, built: Built, tmp_path: Path) -> None:
    """A wrong document is not kept, nor is a wrong archive."""
    name = f"/redist/redistrib_{built.plan.cell.driver}.json"
    right = json.loads((mirror / Path(name).name).read_text())
    wrong = {**right, "imex": {**right["imex"], "linux-x86_64": {**right["imex"]["linux-x86_64"], "sha256": "0" * 64}}}
    site.files[name] = json.dumps(wrong).encode()
    with pytest.raises(BuildError, match="its sha256 is 0000"):
        resolve(site, built, tmp_path)
    site.files[name] = json.dumps(right).encode()
    path = f"/redist/{right['imex']['linux-x86_64']['relative_path']}"
    archive = site.files.pop(path)
    with pytest.raises(ConfigurationError, match="there is no such archive"):
        resolve(site, built, tmp_path)
    site.files[path] = archive
    assert resolve(site, built, tmp_path).absent == {}


def test_a_build_with_a_fabric_manager_of_another_version_says_so(built: Built, mirror: Path, tmp_path: Path) -> None:
    shutil.copytree(mirror, tmp_path / "redist")
    document = tmp_path / "redist" / f"redistrib_{built.plan.cell.driver}.json"
    document.write_text(document.read_text().replace(f'"version": "{built.plan.cell.driver}"', '"version": "550.1.1"'))
    env = {"OUT_DIR": str(tmp_path / "out"), "NVIDIA_REDIST_URL": str(tmp_path / "redist")}
    done = run_builds("build", str(built.cell), env=env)
    assert done.returncode == 3, done.stderr
    assert f"must be of the driver's version {built.plan.cell.driver}" in done.stderr
    assert "Traceback" not in done.stderr
