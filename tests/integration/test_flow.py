"""One cell from Debian's archive to a verified image, as a user runs it; then again, killed, moved and broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from builds import compile as compiling
from builds import engine as engines
from builds import matrix, oci, probe
from builds import plan as planning
from builds.cache import Cache
from builds.errors import BuildError
from builds.model import MODULES, Cell, ModuleType
from builds.plan import Shipped
from builds.record import Record

from .conftest import ROOT, Built, Cli, environment


def test_the_default_cell_has_both_module_types(built: Built) -> None:
    assert built.plan.types == tuple(sorted(ModuleType))
    for module_type in ModuleType:
        folder = built.out / "modules" / built.set.id / module_type
        assert {path.name for path in folder.iterdir()} == {
            *(f"{name}.ko" for name in MODULES),
            "build.log",
            "key",
            ".sha256.json",
        }
        log = (folder / "build.log").read_text()
        assert f'nox -s "build-driver({built.cell})"' in log.splitlines()[0]


def test_the_plan_says_what_the_image_was_made_of(built: Built, builds: Cli) -> None:
    done = builds("plan", "--json", str(built.cell))
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    left = json.loads((built.out / "plan.json").read_text())
    assert said == left
    assert said["sets"][0]["kernel"]["build"]["release"].endswith("-cloud-amd64")
    assert said["package"]["name"] == "NVIDIA-Linux-x86_64-550.163.01.run"
    assert str(built.cache.root) not in done.stdout, "a plan is the same on every machine: it names no folder"


def test_the_engine_has_the_image_under_all_of_its_tags(built: Built) -> None:
    assert len(built.plan.names) == 3, "tag and alias of a lab release are spelled alike"
    ids = {built.engine.client.images.get(name).id for name in built.plan.names}
    assert len(ids) == 1


def test_a_second_build_is_up_to_date(built: Built, builds: Cli) -> None:
    done = builds("build", str(built.cell))
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stderr
    assert "compile" not in done.stderr


def test_verify_passes_and_leaves_a_record(built: Built, builds: Cli) -> None:
    done = builds("verify", str(built.cell))
    assert done.returncode == 0, done.stderr + done.stdout
    record = Record.read(built.out / "record.json")
    assert record.passed
    assert record.digest == built.image.digest
    assert {check.outcome for check in record.checks} == {"passed"}
    assert (built.out / "junit.xml").is_file()


def test_an_image_made_elsewhere_is_verified_by_its_layout_alone(built: Built, builds: Cli, tmp_path: Path) -> None:
    done = builds("verify", "--image", f"oci:{built.out / 'image'}:{built.plan.names[0]}", "--out-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert Record.read(left / "record.json").cell == str(built.cell)


def test_a_type_that_a_rule_leaves_out_is_absent_and_the_rest_is_verified(built_with_rule: Built, builds: Cli) -> None:
    assert built_with_rule.plan.types == (ModuleType.PROPRIETARY,)
    assert "pci_resize_resource" in built_with_rule.set.absent[ModuleType.OPEN]
    assert not built_with_rule.plan.addressable
    done = builds("verify", str(built_with_rule.cell))
    assert done.returncode == 0, done.stderr + done.stdout


def test_cells_of_one_driver_share_base_and_user_space(built: Built, built_with_rule: Built) -> None:
    one, other = ([layer.descriptor.digest for layer in of.image.layers] for of in (built, built_with_rule))
    assert one[:2] == other[:2]
    assert one[2] != other[2]


def test_the_reason_of_the_rule_is_true_and_a_failed_compile_says_it(built_with_rule: Built, tmp_path: Path) -> None:
    """Without the rule, the type is compiled, and ends with the very error that the rule gives as its reason."""
    of = built_with_rule
    plan = planning.make(
        of.cell,
        replace(matrix.matrix_of(of.cell), rules=()),
        shipped=[Shipped(of.cell.gl, of.set.kernel, of.set.kmodbuild)],
        base=of.plan.base,
        package=of.plan.package,
        image_path=of.plan.image_path,
    )
    with pytest.raises(BuildError) as caught:
        compiling.modules(
            plan,
            plan.sets[0],
            of.inputs,
            ModuleType.OPEN,
            engine=of.engine,
            cache=of.cache,
            jobs=2,
            logs=tmp_path,
            report=of.report,
        )
    said = str(caught.value)
    assert "error: too few arguments to function 'pci_resize_resource'" in said
    assert "too few arguments to function 'pci_resize_resource'" in of.set.absent[ModuleType.OPEN]
    assert f"the log: {tmp_path / f'compile-{of.set.id}-open.log'}" in said
    assert f'repeat: nox -s "build-driver({of.cell})"' in said
    assert of.cache.find("modules", plan.sets[0].modules[ModuleType.OPEN]) is None


def test_a_cell_that_fails_does_not_stop_the_others_and_the_summary_says_why(
    built: Built, builds: Cli, tmp_path: Path
) -> None:
    """There is a driver package for one of them only."""
    (tmp_path / "images").symlink_to(built.inputs.base.layout)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / built.cell.driver).symlink_to(built.inputs.package.parent)
    env = {"GL_REGISTRY": f"oci:{tmp_path / 'images'}", "NVIDIA_BASE_URL": str(tmp_path / "packages")}
    lacking = Cell.parse("470.256.02-debian12-amd64-baremetal")
    done = builds("build", str(lacking), str(built.cell), env=env)
    assert done.returncode == 2, done.stderr
    assert f"[1 of 2] {lacking}" in done.stderr
    assert "up to date" in done.stderr.partition(f"[2 of 2] {built.cell}")[2]
    done = builds("summary", str(lacking), str(built.cell), env={"COLUMNS": "400"})
    assert done.returncode == 0, done.stderr
    assert "build failed: driver package" in done.stderr
    assert built.image.digest[:19] in done.stderr


def test_the_header_probe_tells_what_the_compiler_would(built: Built, built_with_rule: Built) -> None:
    found = {
        of.cell.gl: {
            change.name
            for change in probe.run(of.plan, of.set, of.inputs, engine=of.engine, cache=of.cache, report=of.report)
        }
        for of in (built, built_with_rule)
    }
    assert found == {"debian12": set(), "debian13": {"pci_resize_resource"}}


def test_headers_that_nothing_compiles_against_are_no_kernel_without_changes(built: Built, tmp_path: Path) -> None:
    """Else every change would be in a kernel whose compiler is broken, or none where the probe is."""
    nowhere = replace(built.set, kernel=replace(built.set.kernel, output="/usr/src"))
    inputs = replace(built.inputs, sets={nowhere.id: built.inputs.sets[built.set.id]})
    with pytest.raises(BuildError, match="nothing compiles against these headers"):
        probe.run(built.plan, nowhere, inputs, engine=built.engine, cache=Cache(tmp_path), report=built.report)


STEPS = {
    "ask Debian's archive": 0.2,
    "kmodbuild image": 5.0,
    "driver package": 5.0,
    "read kernel": 0.5,
    "unpack driver package": 1.0,
    "compile open": 12.0,
    "compile proprietary": 3.0,
    "pack user space": 1.0,
    "pack modules": 0.5,
    "assemble image": 0.0,
    "load into engine": 1.0,
    "verify": 1.5,
}
"""Steps in which a run is killed, in their order, each with the seconds that it is given before."""


def test_killed_in_each_step_it_ends_well_and_in_the_same_digest(built: Built, tmp_path: Path) -> None:
    """An empty cache, another folder, and SIGKILL again and again: the image is the same to the bit."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    env = environment(CACHE_DIR=str(cache), OUT_DIR=str(out))
    build, verify = ([sys.executable, "-m", "builds", verb, str(built.cell)] for verb in ("build", "verify"))
    reached = [
        title
        for title, seconds in STEPS.items()
        if _killed_in(title, seconds, verify if title == "verify" else build, env)
    ]
    assert reached == list(STEPS), "a step that no run comes to is not tested"
    done = subprocess.run(verify, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image = oci.find_image(out / str(built.cell) / "image", built.plan.names[0])
    assert image.digest == built.image.digest
    oci.check_blobs(image)
    assert Record.read(out / str(built.cell) / "record.json").passed
    left = [*cache.glob("*/*.part"), *cache.glob("lab/**/*.part"), *cache.glob("tmp/*"), *out.glob("*/*.part")]
    assert left == [], "files of killed runs are gone"
    labelled = engines.connect().client.containers.list(all=True, filters={"label": engines.LABEL})
    owners = [json.loads(made.labels[engines.LABEL])["pid"] for made in labelled]
    assert all(map(psutil.pid_exists, owners)), "containers of killed runs are gone"


def _killed_in(title: str, seconds: float, command: list[str], env: dict[str, str]) -> bool:
    """Start a run and kill it some seconds into the step of that title; whether it came there."""
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr
        for line in run.stderr:
            if line.startswith(f"  {title}") and line.rstrip().endswith("…"):
                time.sleep(seconds)
                os.kill(run.pid, signal.SIGKILL)
                return True
    return False


@pytest.mark.parametrize(
    ("arguments", "env", "status", "said"),
    [
        (["build", "550.163.02-debian12-amd64-cloud"], {}, 2, "nearest: 550.163.01-debian12-amd64-cloud"),
        (["build", "nonsense"], {}, 2, "is not in any matrix"),
        (["list"], {"GL_VERSION": "1877.99"}, 2, "nearest: 1877.9"),
        (["build"], {"JOBS": "many"}, 2, "JOBS"),
        (["build"], {"NVIDIA_BASE_URL": "/nonexistent"}, 2, "is not in /nonexistent"),
        (["build"], {"GL_REGISTRY": "127.0.0.1:9/nothing"}, 5, "cannot be reached"),
        (["build"], {"NVIDIA_BASE_URL": "http://127.0.0.1:9/tesla"}, 5, "cannot be downloaded"),
        (["build"], {"DOCKER_HOST": "unix:///nonexistent.sock"}, 5, "nox -s setup"),
        (["verify", "--image", "oci:/nonexistent"], {}, 2, "is not an OCI image layout"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_exit_status(
    arguments: list[str], env: dict[str, str], status: int, said: str, built: Built, builds: Cli
) -> None:
    done = builds(*arguments, env=env)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_modules_carried_in_the_output_folder_are_packed_without_the_cache(built: Built, tmp_path: Path) -> None:
    """The driver stage on one machine, the image stage on another, ``out/`` between them."""
    carried, key = built.out / "modules" / built.set.id / "open", built.set.modules[ModuleType.OPEN]
    cache = Cache(tmp_path)
    assert compiling.adopt(key, carried, cache)
    assert cache.find("modules", key)
    assert not compiling.adopt("another key", carried, cache)
