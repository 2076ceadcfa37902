"""Images in registries: looked up, pulled into a layout and put there, every byte checked against its digest.

The protocol is that of OCI's distribution specification 1.1. Authorization is oras' part, credentials are looked up
as Docker and Podman look them up; what the bytes are is proven here.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urljoin

import docker.auth
import oras.logger
import requests
from docker.errors import DockerException
from oras.auth.utils import get_basic_auth
from oras.provider import Registry

from . import http, oci
from .cache import CHUNK, disk_errors, locked
from .console import Reporter
from .errors import BuildError, ConfigurationError, InfrastructureError
from .model import Arch
from .oci import Descriptor

_MANIFESTS = (oci.MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
_ACCEPT = {"Accept": ", ".join((*oci.INDEXES, *_MANIFESTS))}
_CERTIFICATES = ("/etc/docker/certs.d", "/etc/containers/certs.d", "~/.config/containers/certs.d")
"""Where Docker and Podman keep the certificate authorities of single registries."""

_Answer = TypeVar("_Answer")

oras.logger.setup_logger(quiet=True)  # what it would say to the terminal is in our errors


@dataclass(frozen=True)
class Reference:
    """An image in a registry: ``host[:port]/repository[:tag][@sha256:…]``."""

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference. Raises ConfigurationError where it is not a complete one."""
        found = re.fullmatch(
            r"(?P<registry>[^/@]+)/(?P<repository>[a-z0-9][a-z0-9._/-]*)"
            r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
            text,
        )
        if not found or not (found["tag"] or found["digest"]):
            raise ConfigurationError(
                f"image {text}",
                "is not a complete reference",
                hint="write <registry>/<repository>:<tag>, the same with @sha256:…, or oci:<folder>[:<name>]",
            )
        return cls(found["registry"], found["repository"], found["tag"], found["digest"])

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


@dataclass
class Repository:
    """A repository of a registry as we talk to it; whatever authorizes us is kept between requests."""

    registry: str
    name: str
    client: Registry
    report: Reporter
    authorization: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.registry}/{self.name}"

    def url(self, what: str) -> str:
        """Where something of the repository is: ``manifests/<tag>``, ``blobs/<digest>``."""
        return f"{self.client.prefix}://{self.registry}/v2/{self.name}/{what}"


def connect(registry: str, name: str, report: Reporter) -> Repository:
    """A repository, ready to be asked; nothing says yet that it is there, or that we may.

    Raises ConfigurationError for a certificate authority that cannot be read.
    """
    session = requests.Session()
    authorities = sorted(
        path for place in _CERTIFICATES for path in (Path(place).expanduser() / registry).glob("*.crt")
    )
    try:
        http.prepare(session, authorities)
    except OSError as error:
        raise ConfigurationError(
            f"registry {registry}",
            "a certificate authority named for it cannot be read",
            got=f"{error.strerror or error} in {', '.join(map(str, authorities))}",
        ) from error
    client = Registry(hostname=registry, insecure=_speaks_plain(session, registry))
    session.cookies.set_policy(client.session.cookies.get_policy())
    client.session = client.auth.session = session
    return Repository(registry, name, client, report)


def pull(reference: Reference, arch: Arch | None, layout: Path, report: Reporter) -> oci.Image:
    """The image of an architecture, pulled into a layout; blobs that are there are not pulled again.

    With ``arch`` None whatever the reference names is taken, as long as there is but one.
    Raises InfrastructureError where the registry cannot be reached or refuses, ConfigurationError where it has
    no such image, BuildError where it sends other bytes than the digest promises.
    """
    repository = connect(reference.registry, reference.repository, report)
    descriptor, manifest = _resolve(repository, reference, arch)
    with locked(layout), disk_errors(str(reference), layout):
        oci.create(layout)
        for blob in _blobs(reference, manifest):
            _pull_blob(repository, blob, layout)
        oci.add_bytes(layout, fetch_manifest(repository, descriptor.digest), descriptor.media_type)
    image = oci.read_image(layout, descriptor)
    if arch is not None and image.config.get("architecture") != arch:
        raise ConfigurationError(
            str(reference), f"is not an image for {arch}", got=str(image.config.get("architecture"))
        )
    return image


def digest_of(repository: Repository, tag: str) -> str | None:
    """Digest of what a tag means; None where there is no such tag."""
    response = _ask(repository, "HEAD", f"manifests/{tag}", headers=_ACCEPT, expect=(200, 404))
    if response.status_code == 404:
        return None
    return response.headers.get("Docker-Content-Digest") or _digest(fetch_manifest(repository, tag))


def fetch_manifest(repository: Repository, name: str) -> bytes:
    """The manifest or index of a tag or digest. Raises BuildError where it is not the digest's."""
    data = _ask(repository, "GET", f"manifests/{name}", headers=_ACCEPT).content
    if name.startswith("sha256:") and _digest(data) != name:
        raise BuildError(str(repository), f"the registry sent other bytes for {name}", got=_digest(data))
    return data


def has_blob(repository: Repository, blob: Descriptor) -> bool:
    """Whether the repository has a blob, of the right size."""
    response = _ask(repository, "HEAD", f"blobs/{blob.digest}", expect=(200, 404))
    size = response.headers.get("Content-Length")
    return response.status_code == 200 and size in (None, str(blob.size))


def upload_blob(repository: Repository, blob: Descriptor, path: Path) -> None:
    """Put a blob; a connection that is cut begins it anew, because an upload that broke off cannot be gone on with
    in every registry."""
    title = f"push {blob.digest[7:19]}"

    def put() -> None:
        begun = _once(repository, "POST", repository.url("blobs/uploads/"), expect=(202,))
        place = urljoin(begun.url, begun.headers["Location"])
        with path.open("rb") as stream, repository.report.bytes(title, blob.size) as advance:
            body = _Body(stream, blob.size, advance)
            _once(repository, "PUT", place, params={"digest": blob.digest}, headers=_OCTETS, data=body, expect=(201,))

    _again(repository, title, put)


def put_manifest(repository: Repository, name: str, data: bytes, media_type: str) -> None:
    """Put a manifest under a tag or its digest; a tag that is there already moves."""
    _ask(repository, "PUT", f"manifests/{name}", headers={"Content-Type": media_type}, data=data, expect=(201,))


def prove_blob(repository: Repository, blob: Descriptor) -> None:
    """Read a blob back. Raises InfrastructureError where the registry has other bytes than its digest says."""
    title = f"read back {blob.digest[7:19]}"

    def read() -> str:
        digest = hashlib.sha256()
        for chunk in _stream(repository, blob, title):
            digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    found = _again(repository, title, read)
    if found != blob.digest:
        raise InfrastructureError(
            str(repository),
            f"the registry holds other bytes for {blob.digest}",
            got=found,
            hint="its storage is damaged: have the blob deleted there, then push again",
        )


_OCTETS = {"Content-Type": "application/octet-stream"}


class _Body:
    """A file as the body of a request: streamed, with its length known and its progress told."""

    def __init__(self, stream: IO[bytes], size: int, advance: Callable[[int], None]) -> None:
        self._stream, self._size, self._advance = stream, size, advance

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._stream.read(CHUNK):
            yield chunk
            self._advance(len(chunk))

    def rewind(self) -> None:
        """Start from the beginning."""
        self._advance(-self._stream.tell())
        self._stream.seek(0)


def _speaks_plain(session: requests.Session, registry: str) -> bool:
    """Whether a registry is spoken to without TLS: one on this machine, as container engines do, that has none."""
    if not _is_loopback(registry):
        return False
    try:
        session.get(f"https://{registry}/v2/")
    except requests.exceptions.SSLError as error:
        return not http.untrusted(error)
    except requests.RequestException:
        return True
    return False


def _is_loopback(registry: str) -> bool:
    host = registry.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _resolve(repository: Repository, reference: Reference, arch: Arch | None) -> tuple[Descriptor, Any]:
    """Descriptor and content of the manifest for an architecture, through an index where the tag names one."""
    data = fetch_manifest(repository, reference.digest or reference.tag or "")
    document = _json(reference, data)
    media_type = document.get("mediaType", oci.INDEX if "manifests" in document else oci.MANIFEST)
    if media_type in oci.INDEXES:
        entries = [Descriptor.from_json(entry) for entry in document["manifests"]]
        fitting = [entry for entry in entries if arch in (None, entry.architecture) and entry.media_type in _MANIFESTS]
        if len(fitting) != 1:
            known = ", ".join(sorted({entry.architecture or "?" for entry in entries}))
            raise ConfigurationError(
                str(reference), f"must have exactly one image{f' for {arch}' if arch else ''}", got=known
            )
        return fitting[0], _json(reference, fetch_manifest(repository, fitting[0].digest))
    return Descriptor(media_type, _digest(data), len(data), architecture=str(arch) if arch else None), document


def _json(reference: Reference, data: bytes) -> Any:
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise BuildError(str(reference), "the registry sent no manifest", got=repr(data[:40]))
    return document


def _blobs(reference: Reference, manifest: Any) -> list[Descriptor]:
    """Config and layers that a manifest names."""
    try:
        return [Descriptor.from_json(blob) for blob in (manifest["config"], *manifest["layers"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise BuildError(str(reference), "its manifest is not an image's", got=repr(error)) from error


def _pull_blob(repository: Repository, blob: Descriptor, layout: Path) -> None:
    path = oci.blob_path(layout, blob.digest)
    if path.exists():
        return
    temporary = path.with_name(path.name + ".part")
    title = f"pull {blob.digest[7:19]}"

    def read() -> str:
        digest = hashlib.sha256()
        with temporary.open("wb") as file:
            for chunk in _stream(repository, blob, title):
                digest.update(chunk)
                file.write(chunk)
        return f"sha256:{digest.hexdigest()}"

    found = _again(repository, title, read)
    if found != blob.digest:
        temporary.unlink()
        raise BuildError(str(repository), f"the registry sent other bytes for {blob.digest}", got=found)
    temporary.rename(path)


def _stream(repository: Repository, blob: Descriptor, title: str) -> Iterator[bytes]:
    response = _once(repository, "GET", repository.url(f"blobs/{blob.digest}"), stream=True)
    with response, repository.report.bytes(title, blob.size) as advance:
        for chunk in response.iter_content(CHUNK):
            yield chunk
            advance(len(chunk))


def _ask(repository: Repository, method: str, what: str, **options: Any) -> requests.Response:
    """A request below the repository, made again while that may help."""
    return _again(repository, f"{method} {what}", lambda: _once(repository, method, repository.url(what), **options))


def _again(repository: Repository, what: str, work: Callable[[], _Answer]) -> _Answer:
    try:
        return http.retrying(what, repository.report.say)(work)
    except requests.RequestException as error:
        raise _unreachable(repository, what, error) from error


def _once(
    repository: Repository,
    method: str,
    url: str,
    *,
    expect: tuple[int, ...] = (200,),
    headers: Mapping[str, str] | None = None,
    **options: Any,
) -> requests.Response:
    """One request, authorized if the registry wants that; the response if its status is an expected one."""
    body = options.get("data")
    for _ in range(2):
        response: requests.Response = repository.client.session.request(
            method, url, headers={**(headers or {}), **repository.authorization}, allow_redirects=True, **options
        )
        if response.status_code not in (401, 403) or not _authorize(repository, response):
            break
        if isinstance(body, _Body):
            body.rewind()
    http.check(response)
    if response.status_code in expect:
        return response
    if response.status_code == 404:
        raise ConfigurationError(
            f"{repository} {url.rpartition('/')[2]}", "the registry has no such image", got="404 Not Found"
        )
    raise InfrastructureError(
        str(repository),
        f"the registry refuses {method} {url.partition('?')[0].partition(repository.name)[2].lstrip('/')}",
        got=http.status(response),
        hint={
            401: f"log in: docker login {repository.registry}",
            403: f"log in as somebody who may: docker login {repository.registry}",
            405: "it may be read-only",
        }.get(response.status_code),
    )


def _authorize(repository: Repository, response: requests.Response) -> bool:
    """Answer a registry that wants us to authorize; whether there is anything new to answer."""
    challenge = response.headers.get("WWW-Authenticate", "")
    credentials = _credentials(repository.registry)
    answer: Mapping[str, str] = {}
    if challenge.lower().startswith("basic") and credentials:
        answer = {"Authorization": f"Basic {get_basic_auth(*credentials)}"}
    elif challenge.lower().startswith("bearer"):
        if credentials:
            repository.client.auth.set_basic_auth(*credentials)
        # A token is for one scope and some minutes: each challenge asks for a new one.
        answer, _ = repository.client.auth.authenticate_request(response, {}, refresh=True)
    new = bool(answer) and answer != repository.authorization
    if answer:
        repository.authorization = answer
    return new


def _credentials(registry: str) -> tuple[str, str] | None:
    """User and password, from where Docker (``DOCKER_CONFIG``, credential helpers) and Podman keep them."""
    podman = os.environ.get("REGISTRY_AUTH_FILE") or f"{os.environ.get('XDG_RUNTIME_DIR', '')}/containers/auth.json"
    for place in (None, podman):
        if place and not Path(place).is_file():
            continue
        try:
            found = docker.auth.load_config(place).resolve_authconfig(registry) or {}
        except (DockerException, ValueError) as error:
            raise ConfigurationError(
                f"registry {registry}",
                "its credentials cannot be looked up",
                got=str(error)[:200],
                hint=f"docker login {registry}",
            ) from error
        values = {key.lower(): value for key, value in found.items()}
        if values.get("username"):
            return values["username"], values.get("password") or ""
    return None


def _unreachable(repository: Repository, what: str, error: requests.RequestException) -> InfrastructureError:
    if error.response is not None:
        return InfrastructureError(
            str(repository), f"the registry keeps failing at {what}", got=http.reason(error), hint="try again later"
        )
    if http.untrusted(error):
        return InfrastructureError(
            str(repository),
            "the registry's certificate is not trusted",
            got=http.reason(error),
            hint=f"put its certificate authority at /etc/docker/certs.d/{repository.registry}/ca.crt",
        )
    return InfrastructureError(
        str(repository),
        f"the registry cannot be reached for {what}",
        got=http.reason(error),
        hint="GL_REGISTRY and IMAGE_PATH name registries; GL_REGISTRY may be a folder: oci:<folder>",
    )


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
