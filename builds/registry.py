"""Images in registries: looked up, pulled into a layout and put there, every byte checked against its digest.

The protocol is that of OCI's distribution specification 1.1.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests

from . import authorization, http, oci
from .cache import CHUNK, disk_errors, locked
from .console import Reporter
from .errors import BuildError, ConfigurationError, HarnessError, InfrastructureError
from .model import Arch
from .oci import Descriptor

_MANIFESTS = (oci.MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
_ACCEPT = {"Accept": ", ".join((*oci.INDEXES, *_MANIFESTS))}
_CERTIFICATES = ("/etc/docker/certs.d", "/etc/containers/certs.d", "~/.config/containers/certs.d")
"""Where Docker and Podman keep the certificate authorities of single registries."""

_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
"""Registries that are spoken to elsewhere than at their name."""
_MANIFEST_LIMIT = 4 * 1024 * 1024
"""Bytes of a manifest: what the distribution specification asks registries to take at least, and they do not exceed."""
_COMMIT = 600
"""Seconds that a registry may take to put away a blob after its last byte."""

_Answer = TypeVar("_Answer")


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
    """A repository of a registry as we talk to it; what authorizes us is kept between requests."""

    registry: str
    name: str
    origin: str
    """Scheme and host that it is spoken to at."""
    session: requests.Session
    report: Reporter
    authorization: str = ""
    """Value of the Authorization header that it took last."""

    def __str__(self) -> str:
        return f"{self.registry}/{self.name}"

    def url(self, what: str) -> str:
        """Where something of the repository is: ``manifests/<tag>``, ``blobs/<digest>``."""
        return f"{self.origin}/v2/{self.name}/{what}"

    def owns(self, url: str) -> bool:
        """Whether a URL is the registry's own: nobody else is told who we are."""
        return urlsplit(url)[:2] == urlsplit(self.origin)[:2]


class _Session(requests.Session):
    """A session that sends no Authorization but ours: requests would take one from ~/.netrc, for any host."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Tell only the host that was asked who we are, not the one that it sends us to."""
        old, new = str(response.request.url), str(prepared_request.url)
        if self.should_strip_auth(old, new):  # type: ignore[no-untyped-call]
            prepared_request.headers.pop("Authorization", None)


def connect(registry: str, name: str, report: Reporter) -> Repository:
    """A repository, ready to be asked; nothing says yet that it is there, or that we may.

    Raises ConfigurationError for a certificate authority that cannot be read.
    """
    session = _Session()
    authorities = [path for place in _CERTIFICATES for path in sorted(_folder(place, registry).glob("*.crt"))]
    try:
        http.prepare(session, authorities)
    except OSError as error:
        raise ConfigurationError(
            f"registry {registry}",
            "a certificate authority named for it cannot be read",
            got=f"{error.strerror or error} in {', '.join(map(str, authorities))}",
        ) from error
    scheme = "http" if _speaks_plain(session, registry) else "https"
    return Repository(registry, name, f"{scheme}://{_HOSTS.get(registry, registry)}", session, report)


def pull(reference: Reference, arch: Arch | None, layout: Path, report: Reporter, *, others: bool = False) -> oci.Image:
    """The image of an architecture, pulled into a layout; blobs that are there are not pulled again.

    With ``arch`` None whatever the reference names is taken, as long as there is but one; so it is with ``others``,
    where there is none of that architecture.
    Raises InfrastructureError where the registry cannot be reached or refuses, ConfigurationError where it has
    no such image, BuildError where it sends other bytes than the digest promises.
    """
    repository = connect(reference.registry, reference.repository, report)
    descriptor, manifest = _resolve(repository, reference, arch, others)
    blobs = _descriptors(reference, manifest, "config", "layers")
    with locked(layout), disk_errors(str(reference), layout):
        oci.create(layout)
        for blob in blobs:
            _pull_blob(repository, blob, layout)
        oci.add_bytes(layout, fetch_manifest(repository, descriptor.digest), descriptor.media_type)
    image = oci.read_image(layout, descriptor)
    if arch is not None and not others and image.config.get("architecture") != arch:
        raise ConfigurationError(
            str(reference), f"is not an image for {arch}", got=str(image.config.get("architecture"))
        )
    return image


def _folder(place: str, registry: str) -> Path:
    try:
        return Path(place).expanduser() / registry
    except RuntimeError:  # nobody knows where home is
        return Path(place) / registry


def digest_of(repository: Repository, tag: str) -> str | None:
    """Digest of what a tag means; None where there is no such tag."""
    response = _ask(repository, "HEAD", f"manifests/{tag}", headers=_ACCEPT, expect=(200, 404))
    if response.status_code == 404:
        return None
    return response.headers.get("Docker-Content-Digest") or _digest(fetch_manifest(repository, tag))


def fetch_manifest(repository: Repository, name: str) -> bytes:
    """The manifest or index of a tag or digest. Raises BuildError where it is not the digest's, or has no end."""

    def read() -> bytes:
        with _once(repository, "GET", repository.url(f"manifests/{name}"), headers=_ACCEPT, stream=True) as response:
            data = b""
            for chunk in response.iter_content(CHUNK):
                data += chunk
                if len(data) > _MANIFEST_LIMIT:
                    raise BuildError(f"{repository} {name}", "is larger than any manifest", got=f"{len(data)} bytes")
            return data

    data = _again(repository, f"GET manifests/{name}", read)
    if ":" in name and _digest(data) != name:
        raise BuildError(str(repository), f"the registry sent other bytes for {name}", got=_digest(data))
    return data


def config_of(repository: Repository, digest: str) -> dict[str, Any] | None:
    """The config of the image of a digest; None where the digest is none of a single image with one.

    Raises BuildError where the registry sends other bytes than their digests promise.
    """
    try:
        blob = Descriptor.from_json(json.loads(fetch_manifest(repository, digest))["config"])
    except (KeyError, TypeError, ValueError):
        return None
    if blob.size > _MANIFEST_LIMIT:
        return None
    data = bytearray()

    def read() -> str:
        data.clear()
        return _read(repository, blob, f"read {blob.digest[7:19]}", data.extend)

    if (found := _again(repository, f"GET blobs/{blob.digest}", read)) != blob.digest:
        raise BuildError(str(repository), f"the registry sent other bytes for {blob.digest}", got=found)
    try:
        config = json.loads(data)
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


def has_blob(repository: Repository, blob: Descriptor) -> bool:
    """Whether the repository has a blob, of the right size."""
    response = _ask(repository, "HEAD", f"blobs/{blob.digest}", expect=(200, 404))
    size = response.headers.get("Content-Length")
    return response.status_code == 200 and size in (None, str(blob.size))


def upload_blob(repository: Repository, blob: Descriptor, path: Path) -> None:
    """Put a blob; a connection that is cut begins it anew, because an upload that broke off cannot be gone on with
    in every registry."""
    title = f"push {blob.digest[7:19]}"
    tries = 0

    def put() -> None:
        nonlocal tries
        tries += 1
        if tries > 1 and has_blob(repository, blob):  # it was the answer that was lost
            return
        begun = _once(repository, "POST", repository.url("blobs/uploads/"), expect=(202,))
        if "Location" not in begun.headers:
            raise InfrastructureError(str(repository), "the registry does not say where to send a blob")
        place = urljoin(begun.url, begun.headers["Location"])
        with path.open("rb") as stream, repository.report.bytes(title, blob.size) as advance:
            body = _Body(stream, blob.size, advance)
            _once(
                repository,
                "PUT",
                place,
                params={"digest": blob.digest},
                headers={"Content-Type": "application/octet-stream"},
                data=body,
                expect=(201,),
                timeout=_COMMIT,
            )

    _again(repository, title, put)


def put_manifest(repository: Repository, name: str, data: bytes, media_type: str) -> None:
    """Put a manifest under a tag or its digest; a tag that is there already moves."""
    _ask(repository, "PUT", f"manifests/{name}", headers={"Content-Type": media_type}, data=data, expect=(201,))


def prove_blob(repository: Repository, blob: Descriptor) -> None:
    """Read a blob back. Raises InfrastructureError where the registry has other bytes than its digest says."""
    title = f"read back {blob.digest[7:19]}"
    found = _again(repository, title, lambda: _read(repository, blob, title))
    if found != blob.digest:
        raise InfrastructureError(
            str(repository),
            f"the registry holds other bytes for {blob.digest}",
            got=found,
            hint="its storage is damaged: have the blob deleted there, then push again",
        )


class _Body:
    """A file as the body of a request: streamed, with its length known and its progress told.

    requests goes back to its start where it has to send it again, to where a redirect leads.
    """

    def __init__(self, stream: IO[bytes], size: int, advance: Callable[[int], None]) -> None:
        self._stream, self._size, self._advance, self._told = stream, size, advance, 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._stream.read(CHUNK):
            yield chunk
            self._tell(self._stream.tell())

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int) -> None:
        self._stream.seek(offset)
        self._tell(offset)

    def _tell(self, offset: int) -> None:
        self._advance(offset - self._told)
        self._told = offset


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
    host = re.sub(r":[0-9]+$", "", registry).strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _resolve(repository: Repository, reference: Reference, arch: Arch | None, others: bool) -> tuple[Descriptor, Any]:
    """Descriptor and content of the manifest for an architecture, through an index where the tag names one."""
    data = fetch_manifest(repository, reference.digest or reference.tag or "")
    document = _json(reference, data)
    media_type = document.get("mediaType", oci.INDEX if "manifests" in document else oci.MANIFEST)
    if media_type not in oci.INDEXES:
        told = str(arch) if arch and not others else None
        return Descriptor(media_type, _digest(data), len(data), architecture=told), document
    entries = _descriptors(reference, document, "manifests")
    images = {entry.digest: entry for entry in entries if entry.media_type in _MANIFESTS}
    images = {digest: entry for digest, entry in images.items() if entry.architecture != "unknown"}  # no image
    architectures = {digest: entry.architecture or "?" for digest, entry in images.items()}
    fitting = oci.of_architecture(architectures, arch, others=others)
    if len(fitting) != 1:
        known = ", ".join(sorted({entry.architecture or "?" for entry in entries}))
        raise ConfigurationError(
            str(reference), f"must have exactly one image{f' for {arch}' if arch else ''}", got=known
        )
    return images[fitting[0]], _json(reference, fetch_manifest(repository, fitting[0]))


def _json(reference: Reference, data: bytes) -> Any:
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise BuildError(str(reference), "the registry sent no manifest", got=repr(data[:40]))
    return document


def _descriptors(reference: Reference, document: Any, *names: str) -> list[Descriptor]:
    """The descriptors that a manifest or an index has under these names."""
    try:
        found = [document[name] for name in names]
        return [Descriptor.from_json(one) for part in found for one in (part if isinstance(part, list) else [part])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BuildError(
            str(reference), "the registry sent a manifest that is not an image's", got=repr(error)
        ) from error


def _pull_blob(repository: Repository, blob: Descriptor, layout: Path) -> None:
    path = oci.blob_path(layout, blob.digest)
    if path.exists():
        return
    temporary = path.with_name(path.name + ".part")
    title = f"pull {blob.digest[7:19]}"

    def read() -> str:
        with temporary.open("wb") as file:
            return _read(repository, blob, title, file.write)

    try:
        found = _again(repository, title, read)
        if found != blob.digest:
            raise BuildError(str(repository), f"the registry sent other bytes for {blob.digest}", got=found)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(
    repository: Repository, blob: Descriptor, title: str, write: Callable[[bytes], object] = lambda _: None
) -> str:
    """Read the bytes of a blob, and no more than it has; their digest."""
    response = _once(repository, "GET", repository.url(f"blobs/{blob.digest}"), stream=True)
    digest, size = hashlib.sha256(), 0
    with response, repository.report.bytes(title, blob.size) as advance:
        for chunk in response.iter_content(CHUNK):
            size += len(chunk)
            if size > blob.size:
                raise BuildError(
                    str(repository), f"the registry sent more for {blob.digest} than its {blob.size} bytes"
                )
            digest.update(chunk)
            write(chunk)
            advance(len(chunk))
    return f"sha256:{digest.hexdigest()}"


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
    response = _send(repository, method, url, headers, options)
    if response.status_code in (401, 403) and repository.owns(response.url) and _authorize(repository, response):
        response.close()
        if isinstance(body, _Body):
            body.seek(0)
        response = _send(repository, method, url, headers, options)
    if response.status_code in expect:
        return response
    with response:
        http.check(response)
        raise _refusal(repository, method, url, response)


def _send(
    repository: Repository, method: str, url: str, headers: Mapping[str, str] | None, options: Mapping[str, Any]
) -> requests.Response:
    said = dict(headers or {})
    if repository.authorization and repository.owns(url):
        said["Authorization"] = repository.authorization
    return repository.session.request(method, url, headers=said, allow_redirects=True, **options)


def _authorize(repository: Repository, response: requests.Response) -> bool:
    """Answer a registry that wants to know who we are; whether there is anything new to answer."""
    challenges = response.raw.headers.getlist("WWW-Authenticate")
    answer = authorization.answer(repository.session, repository.registry, repository.origin, challenges)
    new = answer is not None and answer != repository.authorization
    repository.authorization = answer or repository.authorization
    return new


def _refusal(repository: Repository, method: str, url: str, response: requests.Response) -> HarnessError:
    """The error for an answer that nobody expected and that will not change."""
    what = url.partition("?")[0].partition(f"/v2/{repository.name}/")[2]
    if response.status_code == 404 and method in ("GET", "HEAD"):
        name = what.rpartition("/")[2]
        return ConfigurationError(f"{repository} {name}", "the registry has no such image", got=http.status(response))
    hints = {
        401: f"log in: docker login {repository.registry}",
        403: f"log in as somebody who may: docker login {repository.registry}",
        404: "some registries want a repository to be created before anything is pushed to it",
        405: "it may be read-only",
    }
    return InfrastructureError(
        str(repository),
        f"the registry refuses {method} {what}",
        got=http.status(response),
        hint=hints.get(response.status_code),
    )


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
