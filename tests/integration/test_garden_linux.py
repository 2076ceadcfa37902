"""A Garden Linux cell, built and verified as a user does it: by two variables, from a registry and a download site.

Both hosts are processes of ours on the loopback, for the real ones are not at hand. What they serve under the real
names is the lab's: a kernel, a userland and a driver package of Debian's.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from builds.record import Record

from .conftest import Built, run_builds
from .registries import Access, docker_config, put, serve
from .sites import Site, serving

SELECTED = {"GL_VERSION": "1877.3", "DRIVER_VERSION": "550.163.01"}
CELL = "550.163.01-1877.3-amd64-cloud"
REPOSITORY = "gardenlinux/gardenlinux"
PASSWORD = "correct horse"
PLACE = "/tesla/550.163.01/NVIDIA-Linux-x86_64-550.163.01.run"


@dataclass
class World:
    """The hosts that a cell needs, and what a user exports to reach them."""

    site: Site
    sum: bytes
    """What is published of the driver package."""
    package: Path
    folder: Path
    """Has cache and output, and the registry's log."""
    environment: dict[str, str]

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return run_builds(*arguments, env={**self.environment, **more})

    def plan(self, **more: str) -> dict[str, Any]:
        done = self.run("plan", "--json", **more)
        assert done.returncode == 0, done.stderr
        (said,) = json.loads(done.stdout)
        return dict(said)

    def log(self) -> str:
        return (self.folder / "registry/log").read_text()


@pytest.fixture(scope="module")
def hosts(built: Built, registry_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A registry with a password and a certificate of its own authority, and a download site.

    Modules are not compiled again: the driver stage of the lab's cell, of the same kernel and package, has left them.
    """
    folder = tmp_path_factory.mktemp("gardenlinux")
    with serve(registry_binary, folder / "open", storage=folder / "storage") as server:
        url = f"http://{server.address}/v2/{REPOSITORY}"
        put(f"{url}/kmodbuild", built.kmodbuild, "amd64-1877.3")
        put(url, built.inputs.base, "1877.3", as_index=True)
    shutil.copytree(built.out / "modules", folder / "out" / CELL / "modules")
    access = Access("robot", PASSWORD, trustme.CA())
    with (
        serve(registry_binary, folder / "registry", access, folder / "storage") as server,
        serving(Site({})) as site,
    ):
        environment = {
            **SELECTED,
            "GL_REGISTRY": f"{server.address}/{REPOSITORY}",
            "NVIDIA_BASE_URL": f"{site.url}/tesla",
            "NVIDIA_REDIST_URL": f"{site.url}/redist",
            "DOCKER_CONFIG": str(docker_config(folder / "docker", server.address, "robot", PASSWORD)),
            "SSL_CERT_FILE": str(folder / "registry/ca.pem"),
            "CACHE_DIR": str(folder / "cache"),
            "OUT_DIR": str(folder / "out"),
        }
        package = built.inputs.package
        published = f"{hashlib.sha256(package.read_bytes()).hexdigest()}  {package.name}\n".encode()
        yield World(site, published, package, folder, environment)


@pytest.fixture
def world(hosts: World) -> World:
    """The hosts as they should be, and a cache without downloads."""
    hosts.site.files = {PLACE: hosts.package, f"{PLACE}.sha256sum": hosts.sum}
    hosts.site.answers.clear()
    hosts.site.asked.clear()
    hosts.site.cuts, hosts.site.pause, hosts.site.piece = [], 0, 1 << 20
    shutil.rmtree(hosts.folder / "cache/downloads", ignore_errors=True)
    return hosts


def test_a_cell_is_built_and_verified_by_two_variables(world: World, built: Built) -> None:
    world.site.cuts = [60_000_000, 100_000_000]
    done = world.run("build")
    assert done.returncode == 0, done.stderr
    assert "compile open" not in done.stderr, "the modules were there"

    first, *rest = world.site.of(PLACE)
    assert first.range is None
    starts = [int(str(one.range).removeprefix("bytes=").removesuffix("-")) for one in rest]
    assert len(starts) == 2
    assert 59_000_000 < starts[0] <= 60_000_000
    assert 159_000_000 < starts[1] <= 160_000_000

    said = json.loads((world.folder / "out" / CELL / "plan.json").read_text())
    release = said["sets"][0]["kernel"]["build"]["release"]
    assert said["package"]["checksum"] == "published"
    assert said["package"]["sha256"] == built.plan.package.sha256
    assert {tag["name"] for tag in said["tags"]} >= {
        f"550-{release}-gardenlinux0",
        f"550.163.01-{release}-gardenlinux0",
        f"550-{release}-gardenlinux1877.3",
    }
    assert set(said["components_absent"].values()) == {"its source has no redistrib_550.163.01.json"}

    for image, path in ((built.kmodbuild, f"{REPOSITORY}/kmodbuild"), (built.inputs.base, REPOSITORY)):
        assert f'"GET /v2/{path}/manifests/{image.digest} ' in world.log(), "by digest, once the tag is resolved"
    assert re.search(rf'"\w+ /v2/{REPOSITORY}/kmodbuild/manifests/amd64-1877.3 ', world.log())

    done = world.run("verify")
    assert done.returncode == 0, done.stderr
    record = Record.read(world.folder / "out" / CELL / "record.json")
    assert record.passed
    assert record.cell == CELL
    text = (done.stdout + done.stderr + world.run("plan").stderr).replace("\n", "")
    assert PASSWORD not in text


def test_nothing_is_downloaded_or_pulled_twice(world: World) -> None:
    before = world.plan()
    world.site.answers[""] = 404, b"gone"
    pulled = world.log().count("/blobs/sha256:")
    assert world.plan()["package"] == before["package"]
    assert world.log().count("/blobs/sha256:") == pulled
    assert len(world.site.of(PLACE)) == 1


def test_a_wrong_published_checksum_stops_it(world: World) -> None:
    world.site.files[f"{PLACE}.sha256sum"] = b"0" * 64 + world.sum[64:]
    done = world.run("plan")
    assert done.returncode == 3, done.stderr
    assert "expected sha256 is 0000" in " ".join(done.stderr.split())


def test_a_package_without_any_checksum_is_refused_unless_told_otherwise(world: World) -> None:
    del world.site.files[f"{PLACE}.sha256sum"]
    done = world.run("plan")
    assert done.returncode == 3, done.stderr
    assert "nobody vouches for its bytes" in done.stderr
    assert world.site.of(PLACE)[0].range is None
    assert world.plan(PACKAGE_SHA256="optional")["package"]["checksum"] == "own"


def test_a_page_that_says_404_is_no_package(world: World) -> None:
    world.site.files = {}
    done = world.run("plan")
    assert done.returncode == 2, done.stderr
    assert "there is no such driver package" in " ".join(done.stderr.split())


def test_a_page_that_says_200_is_no_package(world: World) -> None:
    page = b"<!DOCTYPE html><html><title>Access denied</title></html>"
    world.site.files[PLACE] = page
    done = world.run("plan")
    assert done.returncode == 3, done.stderr
    assert "a web page" in done.stderr
    world.site.answers[""] = 200, page  # for whatever is asked
    done = world.run("plan")
    assert done.returncode == 3, done.stderr
    assert "is no list of sha256 checksums" in " ".join(done.stderr.split())


def test_a_slow_site_is_waited_for(world: World) -> None:
    world.site.pause, world.site.piece = 0.01, 500_000
    assert world.plan()["package"]["checksum"] == "published"
    assert len(world.site.of(PLACE)) == 1


def test_the_wrong_password_and_an_unknown_authority_are_said(world: World, tmp_path: Path) -> None:
    address = world.environment["GL_REGISTRY"].partition("/")[0]
    wrong = docker_config(tmp_path / "wrong", address, "robot", "incorrect")
    done = world.run("plan", DOCKER_CONFIG=str(wrong))
    assert done.returncode == 5, done.stderr
    assert "docker login" in done.stderr
    done = world.run("plan", SSL_CERT_FILE="")
    assert done.returncode == 5, done.stderr
    assert f"certs.d/{address}/ca.crt" in "".join(done.stderr.split())
