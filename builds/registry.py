"""Images from a registry: resolved to a digest, pulled by it into a layout, every blob checked.

The protocol is oras' part; the bytes are proven here.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from oras.container import Container
from oras.provider import Registry

from . import http, oci
from .cache import CHUNK, disk_errors, locked
from .console import Reporter
from .errors import BuildError, ConfigurationError, InfrastructureError
from .model import Arch

_MANIFESTS = (oci.MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
_ACCEPT = ", ".join((*oci.INDEXES, *_MANIFESTS))


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


def pull(reference: Reference, arch: Arch, layout: Path, report: Reporter) -> oci.Image:
    """The image of an architecture, pulled into a layout; blobs that are there are not pulled again.

    Raises InfrastructureError where the registry cannot be reached or refuses, ConfigurationError where it has
    no such image, BuildError where it sends other bytes than the digest promises.
    """
    registry = Registry(hostname=reference.registry, insecure=_is_loopback(reference.registry))
    http.prepare(registry.session)
    descriptor, manifest = _resolve(registry, reference, arch)
    with locked(layout), disk_errors(str(reference), layout):
        oci.create(layout)
        for blob in (manifest["config"], *manifest["layers"]):
            _pull_blob(registry, reference, oci.Descriptor.from_json(blob), layout, report)
        oci.add_bytes(layout, _fetch_manifest(registry, reference, descriptor.digest), descriptor.media_type)
    image = oci.read_image(layout, descriptor)
    if image.config.get("architecture") != arch:
        raise ConfigurationError(
            str(reference), f"is not an image for {arch}", got=str(image.config.get("architecture"))
        )
    return image


def _is_loopback(registry: str) -> bool:
    """Whether plain HTTP may be spoken: to this machine only, as container engines do."""
    host = registry.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _resolve(registry: Registry, reference: Reference, arch: Arch) -> tuple[oci.Descriptor, Any]:
    """Descriptor and content of the manifest for an architecture, through an index where the tag names one."""
    data = _fetch_manifest(registry, reference, reference.digest or reference.tag or "")
    document = json.loads(data)
    media_type = document.get("mediaType", oci.INDEX if "manifests" in document else oci.MANIFEST)
    if media_type in oci.INDEXES:
        entries = [oci.Descriptor.from_json(entry) for entry in document["manifests"]]
        fitting = [entry for entry in entries if entry.architecture == arch and entry.media_type in _MANIFESTS]
        if len(fitting) != 1:
            known = ", ".join(sorted({entry.architecture or "?" for entry in entries}))
            raise ConfigurationError(str(reference), f"must have exactly one image for {arch}", got=known)
        return fitting[0], json.loads(_fetch_manifest(registry, reference, fitting[0].digest))
    return oci.Descriptor(media_type, _digest(data), len(data), architecture=str(arch)), document


def _fetch_manifest(registry: Registry, reference: Reference, name: str) -> bytes:
    response = _get(registry, reference, f"manifests/{name}", {"Accept": _ACCEPT})
    data = response.content
    if name.startswith("sha256:") and _digest(data) != name:
        raise BuildError(str(reference), f"the registry sent other bytes for {name}", got=_digest(data))
    return data


def _pull_blob(registry: Registry, reference: Reference, blob: oci.Descriptor, layout: Path, report: Reporter) -> None:
    path = oci.blob_path(layout, blob.digest)
    if path.exists():
        return
    temporary = path.with_name(path.name + ".part")
    digest = hashlib.sha256()
    response = _get(registry, reference, f"blobs/{blob.digest}", {})
    try:
        with temporary.open("wb") as file, report.bytes(f"pull {blob.digest[7:19]}", blob.size) as advance:
            for chunk in response.iter_content(CHUNK):
                digest.update(chunk)
                file.write(chunk)
                advance(len(chunk))
    except requests.RequestException as error:
        raise _unreachable(reference, error) from error
    if f"sha256:{digest.hexdigest()}" != blob.digest:
        temporary.unlink()
        raise BuildError(
            str(reference), f"the registry sent other bytes for {blob.digest}", got=f"sha256:{digest.hexdigest()}"
        )
    temporary.rename(path)


def _get(registry: Registry, reference: Reference, what: str, headers: dict[str, str]) -> requests.Response:
    """GET below the repository, streamed; credentials come from the usual places."""
    container = Container(f"{reference.registry}/{reference.repository}:{reference.tag or 'latest'}")
    url = f"{registry.prefix}://{reference.registry}/v2/{reference.repository}/{what}"
    try:
        registry.auth.load_configs(container)
        # oras' own retries take two minutes to say that nobody answers; ours are in the session.
        ask = Registry.do_request.__wrapped__
        response: requests.Response = ask(registry, url, "GET", headers=headers, stream=True)
    except (requests.RequestException, OSError) as error:
        raise _unreachable(reference, error) from error
    except ValueError as error:  # oras: the registry wants a log-in that the configuration does not have
        raise InfrastructureError(
            str(reference), "the registry refuses", got=str(error), hint=f"log in: docker login {reference.registry}"
        ) from error
    if response.status_code == 404:
        raise ConfigurationError(str(reference), "the registry has no such image", got="404 Not Found")
    if response.status_code != 200:
        raise InfrastructureError(
            str(reference),
            "the registry refuses",
            got=f"{response.status_code} {response.reason}",
            hint=f"log in: docker login {reference.registry}" if response.status_code in (401, 403) else None,
        )
    return response


def _unreachable(reference: Reference, error: Exception) -> InfrastructureError:
    return InfrastructureError(
        str(reference),
        "the registry cannot be reached",
        got=type(error).__name__ + f": {error}"[:200],
        hint="GL_REGISTRY names another registry, or a folder as oci:<folder>",
    )


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
