"""Registries that mean no good, or have ways of their own: what is said to them, and what is believed of them."""

from __future__ import annotations

import hashlib
import http.server
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from builds import http as ours
from builds import oci, registry
from builds.console import Reporter
from builds.errors import BuildError, ConfigurationError, HarnessError, InfrastructureError
from builds.model import Arch
from builds.oci import Descriptor
from builds.registry import Reference

from .registries import answering, docker_config

BLOB = b"the bytes of a blob" * 1000
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"


@dataclass
class Seen:
    """A request that a server got."""

    method: str
    path: str
    authorization: str | None
    body: bytes


@dataclass
class Played:
    """A server that answers as a test says."""

    address: str = ""
    seen: list[Seen] = field(default_factory=list)


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def played(answer: Callable[[Seen], Answer]) -> Iterator[Played]:
    """Run a server whose answers are those of a function."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen = Seen(self.command, self.path, self.headers.get("Authorization"), body)
            server.seen.append(seen)
            status, headers, data = answer(seen)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = _do  # noqa: N815  # the base class's names

        def log_message(self, *_arguments: object) -> None:
            pass

    server = Played()
    with answering(Handler) as server.address:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_FIRST_PAUSE", 0.001)


@pytest.fixture
def blob(tmp_path: Path) -> tuple[Descriptor, Path]:
    (tmp_path / "blob").write_bytes(BLOB)
    return Descriptor(oci.LAYER_TAR, DIGEST, len(BLOB)), tmp_path / "blob"


def _log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "docker", address, "robot", "secret")))


def _basic(inner: Callable[[Seen], Answer]) -> Callable[[Seen], Answer]:
    """A server that wants a password."""

    def answer(seen: Seen) -> Answer:
        return inner(seen) if seen.authorization else (401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")

    return answer


@pytest.mark.parametrize("by", ["location", "redirect"])
def test_another_host_that_takes_the_blob_is_not_told_who_we_are(
    by: str, blob: tuple[Descriptor, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with played(lambda _: (201, {}, b"")) as store:

        def answer(seen: Seen) -> Answer:
            if seen.method == "POST" and by == "location":
                return 202, {"Location": f"http://{store.address}/up?signature=1"}, b""
            if seen.method == "POST":
                return 202, {"Location": "/v2/gl/driver/blobs/uploads/1"}, b""
            return 307, {"Location": f"http://{store.address}/up?signature=1"}, b""

        with played(_basic(answer)) as server:
            _log_in(tmp_path, monkeypatch, server.address)
            registry.upload_blob(registry.connect(server.address, "gl/driver", Reporter()), *blob)
    (put,) = store.seen
    assert put.authorization is None
    assert put.body == BLOB
    assert put.path.startswith("/up?signature=1")
    assert server.seen[-1].authorization


def test_only_the_registry_itself_is_answered_when_it_asks_who_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob is redirected to a store that wants a password: it does not get ours."""
    with (
        played(lambda _: (401, {"WWW-Authenticate": 'Basic realm="evil"'}, b"")) as store,
        played(_basic(lambda _: (307, {"Location": f"http://{store.address}/blob"}, b""))) as server,
    ):
        _log_in(tmp_path, monkeypatch, server.address)
        with pytest.raises(InfrastructureError, match="401"):
            registry.prove_blob(
                registry.connect(server.address, "gl/driver", Reporter()),
                Descriptor(oci.LAYER_TAR, DIGEST, len(BLOB)),
            )
    assert [seen.authorization for seen in store.seen] == [None]


def test_a_netrc_says_nothing_to_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("default login somebody password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with played(lambda _: (404, {}, b"")) as server:
        assert registry.digest_of(registry.connect(server.address, "gl/driver", Reporter()), "tag") is None
    assert server.seen[-1].authorization is None


def test_a_token_server_that_fails_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(seen: Seen) -> Answer:
        if seen.path.startswith("/token"):
            asked.append(seen.authorization or "")
            return (503, {}, b"") if len(asked) < 3 else (200, {}, b'{"access_token": "t"}')
        if seen.authorization != "Bearer t":
            return 401, {"WWW-Authenticate": f'Bearer realm="http://{server.address}/token",service="s"'}, b""
        return 200, {"Docker-Content-Digest": DIGEST}, b""

    with played(answer) as server:
        _log_in(tmp_path, monkeypatch, server.address)
        assert registry.digest_of(registry.connect(server.address, "gl/driver", Reporter()), "tag") == DIGEST
    assert len(asked) == 3
    assert all(said.startswith("Basic ") for said in asked)


def test_an_identity_token_buys_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(seen: Seen) -> Answer:
        if seen.path.startswith("/token"):
            bought = seen.method == "POST" and b"refresh_token=buys" in seen.body
            return (200, {}, b'{"access_token": "t"}') if bought else (401, {}, b"")
        if seen.authorization != "Bearer t":
            return 401, {"WWW-Authenticate": f'Bearer realm="http://{server.address}/token",service="s"'}, b""
        return 200, {"Docker-Content-Digest": DIGEST}, b""

    with played(answer) as server:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {server.address: {"identitytoken": "buys"}}}))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        assert registry.digest_of(registry.connect(server.address, "gl/driver", Reporter()), "tag") == DIGEST


def test_what_refuses_for_good_is_asked_once_more_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with played(lambda _: (401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")) as server:
        _log_in(tmp_path, monkeypatch, server.address)
        with pytest.raises(InfrastructureError, match="docker login"):
            registry.digest_of(registry.connect(server.address, "gl/driver", Reporter()), "tag")
        questions = [seen for seen in server.seen if seen.method == "HEAD"]
    assert [bool(seen.authorization) for seen in questions] == [False, True]


def test_a_repository_that_has_to_be_made_first_is_said_to_be_missing(blob: tuple[Descriptor, Path]) -> None:
    body = b'{"errors": [{"code": "NAME_UNKNOWN", "message": "no such repository"}]}'
    with (
        played(lambda _: (404, {}, body)) as server,
        pytest.raises(InfrastructureError, match=r"NAME_UNKNOWN: no such repository\nhint: .*created"),
    ):
        registry.upload_blob(registry.connect(server.address, "gl/driver", Reporter()), *blob)


def test_a_registry_that_names_no_place_for_a_blob_is_said_to_be_one(blob: tuple[Descriptor, Path]) -> None:
    with played(lambda _: (202, {}, b"")) as server, pytest.raises(InfrastructureError, match="where to send"):
        registry.upload_blob(registry.connect(server.address, "gl/driver", Reporter()), *blob)


def _manifest(**changes: Any) -> dict[str, Any]:
    blob = {"mediaType": oci.CONFIG, "digest": DIGEST, "size": len(BLOB)}
    return {"schemaVersion": 2, "mediaType": oci.MANIFEST, "config": {**blob, **changes}, "layers": []}


HOSTILE: dict[str, bytes] = {
    "no manifest": b"[]",
    "not even JSON": b"<html>",
    "index without manifests": json.dumps({"mediaType": oci.INDEX}).encode(),
    "index of nonsense": json.dumps({"mediaType": oci.INDEX, "manifests": [1]}).encode(),
    "index of numbers": json.dumps({"mediaType": oci.INDEX, "manifests": [{"digest": 1}]}).encode(),
    "digest that is a path": json.dumps(_manifest(digest="sha256:/tmp/victim")).encode(),
    "digest that leads out": json.dumps(_manifest(digest="sha256:../../victim")).encode(),
    "digest of another kind": json.dumps(_manifest(digest="sha512:" + "a" * 128)).encode(),
    "size below nothing": json.dumps(_manifest(size=-1)).encode(),
    "size that is a text": json.dumps(_manifest(size="12")).encode(),
    "no config": json.dumps({"mediaType": oci.MANIFEST, "layers": []}).encode(),
    "without end": b" " * (5 * 1024 * 1024),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    with played(lambda _: (200, {}, HOSTILE[case])) as server, pytest.raises(HarnessError) as caught:
        registry.pull(Reference.parse(f"{server.address}/a/b:c"), Arch.AMD64, tmp_path / "layout", Reporter())
    assert isinstance(caught.value, BuildError | ConfigurationError)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_blob_that_goes_on_after_its_end_is_not_kept(tmp_path: Path) -> None:
    manifest = json.dumps(_manifest(size=len(BLOB) - 1)).encode()

    def answer(seen: Seen) -> Answer:
        return 200, {}, BLOB if "/blobs/" in seen.path else manifest

    with played(answer) as server, pytest.raises(BuildError, match="sent more for"):
        registry.pull(Reference.parse(f"{server.address}/a/b:c"), Arch.AMD64, tmp_path / "layout", Reporter())
    assert not list((tmp_path / "layout/blobs/sha256").iterdir())
