"""Inputs from where production has them: a real registry, a real web server."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builds import oci, sources
from builds.cache import Cache
from builds.console import Reporter
from builds.errors import ConfigurationError
from builds.model import Arch

from .conftest import Built, Cli
from .registries import Server, answering, put, serve


@pytest.fixture(scope="module")
def server(registry_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A registry that anybody may use."""
    with serve(registry_binary, tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def registry(server: Server) -> str:
    """Its address."""
    return server.address


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    with answering(handler) as address:
        yield f"http://{address}"


@pytest.fixture
def site(built: Built) -> Iterator[str]:
    """A web server with the driver package where the vendor's has it."""
    with _served(built.cache.root / "lab" / "driver") as url:
        yield url


def test_a_plan_is_the_same_from_a_registry_and_a_web_server(
    registry: str, site: str, built: Built, builds: Cli, tmp_path: Path
) -> None:
    url = f"http://{registry}/v2/gardenlinux/gardenlinux"
    gl, base = built.cell.gl, "debian13"
    put(f"{url}/kmodbuild", built.kmodbuild, f"amd64-{gl}")
    put(url, built.inputs.base, base, as_index=True)
    places = {"GL_REGISTRY": f"{registry}/gardenlinux/gardenlinux", "NVIDIA_BASE_URL": site}
    done = builds("plan", "--json", str(built.cell), env={**places, "CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    before = json.loads((built.out / "plan.json").read_text())
    for part in ("package", "userspace", "image", "tags"):
        assert said[part] == before[part]
    (here,), (there,) = before["sets"], said["sets"]
    assert {**there, "kmodbuild": None} == {**here, "kmodbuild": None}
    assert there["kmodbuild"] == {
        "reference": f"{registry}/gardenlinux/gardenlinux/kmodbuild:amd64-{gl}",
        "digest": built.kmodbuild.digest,
    }


@pytest.mark.parametrize("as_index", [False, True])
def test_a_kmodbuild_image_of_another_architecture_is_taken_where_it_is_the_only_one(
    as_index: bool, server: Server, tmp_path: Path
) -> None:
    oci.create(tmp_path / "from")
    image = oci.add_image(tmp_path / "from", [], arch=Arch.AMD64, names=["x"], config={"Labels": {"i": str(as_index)}})
    put(f"http://{server.address}/v2/cross", image, f"arm64-{as_index}", as_index=as_index)
    asked = (f"{server.address}/cross:arm64-{as_index}", Arch.ARM64, Cache(tmp_path / "cache"), Reporter())
    assert sources.kmodbuild(*asked).digest == image.digest
    with pytest.raises(ConfigurationError, match="arm64"):
        sources.image(*asked)


def test_what_the_registry_or_the_site_has_not_is_a_configuration_error(
    registry: str, site: str, built: Built, builds: Cli
) -> None:
    done = builds("plan", str(built.cell), env={"GL_REGISTRY": f"{registry}/no/where"})
    assert done.returncode == 2, done.stderr
    assert "has no such image" in done.stderr
    done = builds("plan", str(built.cell), env={"NVIDIA_BASE_URL": f"{site}/nothing"})
    assert done.returncode == 2, done.stderr
    assert "404" in done.stderr


def test_a_blob_with_other_bytes_is_refused(server: Server, built: Built, builds: Cli, tmp_path: Path) -> None:
    """The registry's storage is changed behind its back: what it sends is not what its digest says."""
    url = f"http://{server.address}/v2/damaged"
    put(url, built.inputs.base, "debian13")
    put(f"{url}/kmodbuild", built.kmodbuild, f"amd64-{built.cell.gl}")
    digest = built.kmodbuild.layers[0].descriptor.digest
    blob = server.blob(digest)
    whole = blob.read_bytes()
    try:
        blob.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        package = str(built.inputs.package)
        places = {"GL_REGISTRY": f"{server.address}/damaged", "NVIDIA_BASE_URL": package, "CACHE_DIR": str(tmp_path)}
        done = builds("plan", str(built.cell), env=places)
    finally:
        blob.write_bytes(whole)
    assert done.returncode == 3, done.stderr
    assert "sent other bytes" in done.stderr
    assert f"sha256:{hashlib.sha256(whole).hexdigest()}" == digest


def test_a_web_page_sent_for_the_package_is_refused_and_does_not_stay(
    built: Built, builds: Cli, tmp_path: Path
) -> None:
    """The server answers 200 with a page; mended, the same run succeeds without anybody emptying a cache."""
    package = tmp_path / "site" / built.cell.driver / built.plan.package.name
    package.parent.mkdir(parents=True)
    package.write_text("<!DOCTYPE html><title>Access denied</title>")
    inputs = {"GL_REGISTRY": f"oci:{built.cache.root}/lab/images", "CACHE_DIR": str(tmp_path / "cache")}
    with _served(tmp_path / "site") as url:
        done = builds("plan", str(built.cell), env={**inputs, "NVIDIA_BASE_URL": url})
        assert done.returncode == 3, done.stderr
        package.unlink()
        package.symlink_to(built.inputs.package)
        done = builds("plan", str(built.cell), env={**inputs, "NVIDIA_BASE_URL": url})
        assert done.returncode == 0, done.stderr
