"""Registries for the tests: Debian's docker-registry as a process of ours, and a proxy that makes it fail."""

from __future__ import annotations

import base64
import enum
import http.client
import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import bcrypt
import requests
import trustme
import yaml
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from builds import oci
from builds.cache import canonical_json
from builds.lab.apt import Archive
from builds.model import Arch


def fetch(folder: Path) -> Path:
    """Debian's docker-registry, downloaded and unpacked; nothing is installed."""
    archive = Archive(folder / "apt", ("bookworm",), Arch.AMD64, ("main",))
    archive.update()
    packages = archive.named(["docker-registry"])
    archive.download(packages, folder / "pool", lambda _: None)
    (deb,) = (folder / "pool").glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "unpacked")], check=True)
    return folder / "unpacked/usr/bin/docker-registry"


_SERVICE, _ISSUER = "tests-registry", "tests-issuer"


@dataclass
class Tokens:
    """A token server, as public registries have one: whoever knows the password gets what the challenge asks for."""

    user: str
    password: str
    seconds: int
    """How long a token is good."""
    certificate: bytes = b""
    realm: str = ""
    scopes: list[str] = field(default_factory=list)
    """What tokens were given for."""


@contextmanager
def answering(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a web server on a free port of this machine; its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def token_server(tokens: Tokens) -> Iterator[Tokens]:
    """Run a token server (distribution's token authentication: a JWT, signed with a key that the registry knows)."""
    issued = trustme.CA().issue_cert("tokens.tests.example", key_type=trustme.KeyType.RSA)
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    tokens.certificate = issued.cert_chain_pems[0].bytes()
    der = ssl.PEM_cert_to_DER_cert(tokens.certificate.decode())

    def token(scopes: list[str]) -> str:
        access = [
            {"type": kind, "name": name, "actions": actions.split(",")}
            for kind, name, actions in (scope.split(":") for scope in scopes)
        ]
        now = int(time.time())
        claims = {"iss": _ISSUER, "sub": tokens.user, "aud": _SERVICE, "access": access, "jti": str(time.time_ns())}
        claims |= {"nbf": now - 60, "iat": now, "exp": now + tokens.seconds}  # type: ignore[dict-item]
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        signed = b".".join(_base64(json.dumps(part).encode()) for part in (header, claims))
        return (signed + b"." + _base64(key.sign(signed, padding.PKCS1v15(), hashes.SHA256()))).decode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the base class's name
            known = base64.b64encode(f"{tokens.user}:{tokens.password}".encode()).decode()
            good = self.headers.get("Authorization") == f"Basic {known}"
            scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
            tokens.scopes += scopes if good else []
            body = json.dumps({"token": token(scopes)} if good else {"details": "who are you?"}).encode()
            self.send_response(200 if good else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    with answering(Handler) as address:
        tokens.realm = f"http://{address}/token"
        yield tokens


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


@dataclass(frozen=True)
class Access:
    """How a registry is to be spoken to; by default as anybody likes."""

    user: str = ""
    password: str = ""
    authority: trustme.CA | None = None
    read_only: bool = False
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Server:
    """A registry that runs."""

    address: str
    """``host:port``"""
    storage: Path

    def tags(self, repository: str) -> dict[str, str]:
        """What each tag of a repository means, straight from the registry's disk."""
        folder = self.storage / "docker/registry/v2/repositories" / repository / "_manifests/tags"
        return {link.parent.parent.name: link.read_text() for link in folder.glob("*/current/link")}

    def blob(self, digest: str) -> Path:
        """Where the registry keeps a blob."""
        value = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"


@contextmanager
def serve(binary: Path, folder: Path, access: Access = Access(), storage: Path | None = None) -> Iterator[Server]:
    """Run a registry whose configuration and log are in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = storage or folder / "storage"
    address = f"127.0.0.1:{_free_port()}"
    settings: dict[str, Any] = {
        "version": 0.1,
        "storage": {
            "filesystem": {"rootdirectory": str(storage)},
            "maintenance": {"readonly": {"enabled": access.read_only}},
        },
        "http": {"addr": address},
    }
    session = requests.Session()
    session.trust_env = False  # a certificate bundle named there would be asked instead of ours
    if access.tokens:
        (folder / "tokens.pem").write_bytes(access.tokens.certificate)
        settings["auth"] = {
            "token": {
                "realm": access.tokens.realm,
                "service": _SERVICE,
                "issuer": _ISSUER,
                "rootcertbundle": str(folder / "tokens.pem"),
            }
        }
    elif access.user:
        hashed = bcrypt.hashpw(access.password.encode(), bcrypt.gensalt(4)).decode()
        (folder / "htpasswd").write_text(f"{access.user}:{hashed}\n")
        settings["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
        session.auth = (access.user, access.password)
    if access.authority:
        certificate = access.authority.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
        settings["http"]["tls"] = {"certificate": str(folder / "server.pem"), "key": str(folder / "server.pem")}
        access.authority.cert_pem.write_to_path(folder / "ca.pem")
        session.verify = str(folder / "ca.pem")
    (folder / "config.yml").write_text(yaml.safe_dump(settings))
    with (
        (folder / "log").open("ab") as log,
        subprocess.Popen([str(binary), "serve", str(folder / "config.yml")], stdout=log, stderr=log) as process,
    ):
        try:
            _wait(session, f"{'https' if access.authority else 'http'}://{address}/v2/")
            yield Server(address, storage)
        finally:
            process.terminate()


def put(url: str, image: oci.Image, tag: str, *, as_index: bool = False) -> None:
    """Put an image into a repository, as its own tools do; behind an index, as Garden Linux publishes base images.

    Independent of how this project pushes.
    """
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


class Kind(enum.StrEnum):
    """What a fault does to a request."""

    CUT_REQUEST = "the connection is cut before the request is through"
    CUT_ANSWER = "the registry does as it is told, but its answer is lost"
    HALF_ANSWER = "the answer breaks off half-way"
    TOO_MANY = "429"
    UNAVAILABLE = "503"
    DELAY = "the answer takes its time"


@dataclass
class Proxy:
    """Stands in front of a registry; ``faults`` are what becomes of requests, by their number, the first being 0."""

    target: str
    faults: dict[int, Kind] = field(default_factory=dict)
    lasting: bool = False
    """Whether a fault's request fails for good: the same method on the same path fails again."""
    seen: list[str] = field(default_factory=list)
    """Requests so far: method and path."""
    address: str = ""
    _broken: dict[str, Kind] = field(default_factory=dict)

    def reset(self, faults: dict[int, Kind], *, lasting: bool = False) -> None:
        """Forget what was, and fail anew."""
        self.faults, self.lasting, self._broken = faults, lasting, {}
        self.seen.clear()

    def fault_of(self, method: str, path: str) -> Kind | None:
        """What becomes of the next request."""
        name = f"{method} {path.partition('?')[0]}"
        if "/uploads/" in name:  # an upload is at another place each time
            name = name.partition("/uploads/")[0] + "/uploads/"
        number = len(self.seen)
        self.seen.append(name)
        kind = self.faults.get(number) or self._broken.get(name)
        if kind and self.lasting:
            self._broken[name] = kind
        return kind


@contextmanager
def proxied(target: str, seconds: float = 0.2) -> Iterator[Proxy]:
    """A proxy in front of a plain registry; a delay takes so many seconds."""
    proxy = Proxy(target)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            fault = proxy.fault_of(self.command, self.path)
            size = int(self.headers.get("Content-Length") or 0)
            if fault is Kind.CUT_REQUEST:
                self.rfile.read(size // 2)
                return self._cut()
            body = self.rfile.read(size)
            if fault in (Kind.TOO_MANY, Kind.UNAVAILABLE):
                return self._answer(int(fault), {"Retry-After": "0"}, b"")
            if fault is Kind.DELAY:
                time.sleep(seconds)
            upstream = http.client.HTTPConnection(proxy.target, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if fault is Kind.CUT_ANSWER:
                return self._cut()
            headers = {name: value for name, value in answer.getheaders() if name.lower() != "connection"}
            return self._answer(answer.status, headers, data, half=fault is Kind.HALF_ANSWER)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _do  # noqa: N815  # the base class's names

        def _answer(self, status: int, headers: dict[str, str], data: bytes, *, half: bool = False) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if half else data)
            if half:
                self._cut()

        def _cut(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_arguments: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError, ValueError):  # a client that went away, or one that speaks TLS
                super().handle()

    with answering(Handler) as proxy.address:
        yield proxy


def docker_config(folder: Path, address: str, user: str, password: str) -> Path:
    """A folder for DOCKER_CONFIG, as ``docker login`` leaves one."""
    folder.mkdir(parents=True, exist_ok=True)
    secret = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {address: {"auth": secret}}}))
    return folder


def _put_manifest(url: str, name: str, data: bytes, media_type: str) -> None:
    answer = requests.put(f"{url}/manifests/{name}", data=data, headers={"Content-Type": media_type}, timeout=60)
    answer.raise_for_status()


def _wait(session: requests.Session, url: str) -> None:
    for _ in range(100):
        try:
            answer = session.get(url, timeout=5)
            if answer.status_code != 401:  # as one that wants a token answers
                answer.raise_for_status()
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
