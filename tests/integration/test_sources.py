"""Inputs from where production has them: a real registry, a real web server."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from builds import oci
from builds.cache import canonical_json
from builds.lab.apt import Archive
from builds.model import Arch

from .conftest import Built, Cli

CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: 127.0.0.1:{port}}}
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the registry keeps its blobs."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def registry(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's docker-registry, unpacked and started; nothing is installed."""
    folder = tmp_path_factory.mktemp("registry")
    archive = Archive(folder / "apt", "bookworm", Arch.AMD64)
    archive.update(["main"])
    packages = archive.named(["docker-registry"])
    archive.download(packages, folder / "pool", lambda _: None)
    (deb,) = (folder / "pool").glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "unpacked")], check=True)
    port = _free_port()
    (folder / "config.yml").write_text(CONFIG.format(root=storage, port=port))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [str(folder / "unpacked/usr/bin/docker-registry"), "serve", str(folder / "config.yml")],
            stdout=log,
            stderr=log,
        ) as server,
    ):
        for _ in range(100):
            try:
                requests.get(f"http://127.0.0.1:{port}/v2/", timeout=5).raise_for_status()
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        server.terminate()


def _push(url: str, image: oci.Image, tag: str, *, as_index: bool) -> None:
    """Put an image into a registry, as its own tools do; behind an index, as Garden Linux publishes base images."""
    for blob in (image.config_descriptor, *(layer.descriptor for layer in image.layers)):
        place = requests.post(f"{url}/blobs/uploads/", timeout=60).headers["Location"]
        data = oci.blob_path(image.layout, blob.digest).read_bytes()
        mark = "&" if "?" in place else "?"
        requests.put(f"{place}{mark}digest={blob.digest}", data=data, timeout=60).raise_for_status()
    manifest = oci.blob_path(image.layout, image.digest).read_bytes()
    _put_manifest(url, image.digest if as_index else tag, manifest, oci.MANIFEST)
    if as_index:
        entry = {**image.descriptor.to_json(), "platform": {"os": "linux", "architecture": "amd64"}}
        index = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": [entry]}
        _put_manifest(url, tag, canonical_json(index), oci.INDEX)


def _put_manifest(url: str, name: str, data: bytes, media_type: str) -> None:
    answer = requests.put(f"{url}/manifests/{name}", data=data, headers={"Content-Type": media_type}, timeout=60)
    answer.raise_for_status()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


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
    _push(f"{url}/kmodbuild", built.inputs.kmodbuild, f"amd64-{gl}", as_index=False)
    _push(url, built.inputs.base, base, as_index=True)
    places = {"GL_REGISTRY": f"{registry}/gardenlinux/gardenlinux", "NVIDIA_BASE_URL": site}
    done = builds("plan", "--json", str(built.cell), env={**places, "CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    (said,) = json.loads(done.stdout)
    for part in ("kernel", "package", "modules", "userspace", "image", "tags"):
        assert said[part] == json.loads((built.out / "plan.json").read_text())[part]
    assert said["kmodbuild"]["digest"] == built.inputs.kmodbuild.digest
    assert said["kmodbuild"]["reference"] == f"{registry}/gardenlinux/gardenlinux/kmodbuild:amd64-{gl}"


def test_what_the_registry_or_the_site_has_not_is_a_configuration_error(
    registry: str, site: str, built: Built, builds: Cli
) -> None:
    done = builds("plan", str(built.cell), env={"GL_REGISTRY": f"{registry}/no/where"})
    assert done.returncode == 2, done.stderr
    assert "has no such image" in done.stderr
    done = builds("plan", str(built.cell), env={"NVIDIA_BASE_URL": f"{site}/nothing"})
    assert done.returncode == 2, done.stderr
    assert "404" in done.stderr


def test_a_blob_with_other_bytes_is_refused(
    registry: str, storage: Path, built: Built, builds: Cli, tmp_path: Path
) -> None:
    """The registry's storage is changed behind its back: what it sends is not what its digest says."""
    url = f"http://{registry}/v2/damaged"
    _push(f"{url}/kmodbuild", built.inputs.kmodbuild, f"amd64-{built.cell.gl}", as_index=False)
    digest = built.inputs.kmodbuild.layers[0].descriptor.digest.removeprefix("sha256:")
    (blob,) = storage.glob(f"**/sha256/{digest[:2]}/{digest}/data")
    whole = blob.read_bytes()
    try:
        blob.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        package = str(built.inputs.package)
        places = {"GL_REGISTRY": f"{registry}/damaged", "NVIDIA_BASE_URL": package, "CACHE_DIR": str(tmp_path)}
        done = builds("plan", str(built.cell), env=places)
    finally:
        blob.write_bytes(whole)
    assert done.returncode == 3, done.stderr
    assert "sent other bytes" in done.stderr
    assert hashlib.sha256(whole).hexdigest() == digest


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
