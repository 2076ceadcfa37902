"""The container engine: whichever answers, Docker or Podman, by the one API that both speak.

Files go into and come out of containers as archives, never by bind mounts, so that the engine may run on another
machine. Every container carries a label that says which process made it; the next run removes those whose maker
is gone.
"""

from __future__ import annotations

import enum
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import psutil
import requests
from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.containers import Container

from . import emulation, oci, tars
from .cache import CHUNK, disk_errors
from .console import Reporter
from .errors import InfrastructureError
from .model import Arch

LABEL = "io.gardenlinux.nvidia-builds.owner"
"""Label of our containers: where their maker runs, its process id and its start time."""

_PODMAN_SOCKETS = ("/run/podman/podman.sock", "{XDG_RUNTIME_DIR}/podman/podman.sock")
_TIMEOUT = 600  # seconds without an answer


@dataclass(frozen=True)
class Engine:
    """A container engine that answers."""

    client: docker.DockerClient
    url: str
    """Where it answers, for tools that are told by ``DOCKER_HOST``."""
    version: str
    arch: str
    """What it runs without emulation."""


def connect() -> Engine:
    """The engine of ``DOCKER_HOST``, the CLI's context, or a Docker or Podman socket.

    Removes containers that killed runs left. Raises InfrastructureError where no engine answers.
    """
    tried: list[str] = []
    for client in _candidates(tried):
        try:
            info = client.version()
        except (DockerException, requests.RequestException) as error:
            tried.append(f"{client.api.base_url}: {type(error).__name__}")
            continue
        engine = Engine(client, _url(client), info["Version"], info["Arch"])
        _reap(engine)
        return engine
    raise InfrastructureError(
        "container engine",
        "none answers",
        got="; ".join(tried),
        hint="`nox -s setup` installs and starts one, or let DOCKER_HOST name one",
    )


def load(engine: Engine, image: oci.Image, names: Sequence[str], report: Reporter) -> bool:
    """Load an image of a layout under names; whether it had to be: not if the engine has it under all of them."""
    if all(_has(engine, name, image) for name in names):
        return False
    with tempfile.TemporaryFile() as spool, report.bytes(f"load {names[0]}", None) as advance:
        with disk_errors("docker archive", Path(tempfile.gettempdir())):
            _docker_archive(image, names, spool)
        spool.seek(0)

        def chunks() -> Iterator[bytes]:
            while chunk := spool.read(CHUNK):
                advance(len(chunk))
                yield chunk

        try:
            # Not images.load(): it takes what Podman says of several names for the name of one image.
            answers = list(engine.client.api.load_image(chunks()))  # type: ignore[no-untyped-call]  # streamed
        except (DockerException, requests.RequestException) as error:
            raise InfrastructureError(names[0], "the engine cannot load the image", got=_said(error)) from error
    for answer in answers:  # a failure comes in the stream, under status 200
        if "error" in answer:
            raise InfrastructureError(names[0], "the engine cannot load the image", got=str(answer["error"]))
    for name in names:
        architecture = engine.client.images.get(name).attrs["Architecture"]
        if architecture != image.config["architecture"]:
            raise InfrastructureError(
                name, f"the engine took an image for {image.config['architecture']}", got=architecture
            )
    return True


@contextmanager
def container(
    engine: Engine,
    image: str,
    command: Sequence[str],
    *,
    mounts: bool = False,
    environment: Mapping[str, str] | None = None,
    entrypoint: Sequence[str] | None = None,
    network: bool = False,
) -> Iterator[Container]:
    """A container, without network unless asked for, created but not started; removed at the end in any case."""
    try:
        made = engine.client.containers.create(
            image,
            list(command),
            entrypoint=list(entrypoint) if entrypoint is not None else None,
            environment=dict(environment or {}),
            # With `mounts` what runs in it may mount, and make mount namespaces of its own.
            cap_add=["SYS_ADMIN"] if mounts else None,
            security_opt=["apparmor=unconfined"] if mounts else None,
            labels={LABEL: json.dumps(_owner())},
            network_mode=None if network else "none",
            init=True,
        )
    except ImageNotFound as error:
        raise InfrastructureError(image, "the engine does not have the image", got=_said(error)) from error
    except (DockerException, requests.RequestException) as error:
        raise InfrastructureError(image, "the engine cannot make a container", got=_said(error)) from error
    try:
        yield made
    except (APIError, requests.RequestException) as error:
        raise InfrastructureError(image, "the engine failed", got=_said(error)) from error
    finally:
        # Whatever is wrong with the engine by now, the error that led here says more.
        with suppress(DockerException, requests.RequestException):
            made.remove(force=True)


def put_tree(made: Container, tree: Path, target: str) -> None:
    """Copy a folder into a container, under the name ``target``."""
    with tempfile.TemporaryFile() as spool:
        with (
            disk_errors("archive", Path(tempfile.gettempdir())),
            tarfile.open(fileobj=spool, mode="w") as archive,
        ):
            archive.add(tree, arcname=target.lstrip("/"), filter=_as_root)
        spool.seek(0)
        made.put_archive("/", spool)


def put_file(made: Container, target: str, content: bytes) -> None:
    """Write a file into a container."""
    spool = io.BytesIO()
    with tarfile.open(fileobj=spool, mode="w") as archive:
        info = tarfile.TarInfo(target.lstrip("/"))
        info.size, info.mode = len(content), 0o755
        archive.addfile(info, io.BytesIO(content))
    made.put_archive("/", spool.getvalue())


def get_tree(made: Container, source: str, target: Path) -> None:
    """Copy what is in a folder of a container into a folder."""
    stream, _ = made.get_archive(source, chunk_size=CHUNK)
    with tempfile.TemporaryFile() as spool, disk_errors("archive", target):
        for chunk in stream:
            spool.write(chunk)
        spool.seek(0)
        with tarfile.open(fileobj=spool) as archive:
            for member in archive:
                member.name = member.name.partition("/")[2]
                if member.name:
                    tars.extract(archive, member, target)


def run(made: Container, log: Path, line: object = None) -> int:
    """Start a container, write what it prints to a log, and give its exit status.

    ``line`` is called with each line that is printed.
    """
    made.start()
    with log.open("ab") as file:
        rest = b""
        for chunk in made.logs(stream=True, follow=True):
            file.write(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            if callable(line):
                for text in lines:
                    line(text.decode(errors="replace"))
    return int(made.wait()["StatusCode"])


class Execution(enum.StrEnum):
    """How an engine runs programs of an architecture."""

    NATIVE = "native"
    EMULATED = "emulated"


def execution(engine: Engine, arch: Arch) -> Execution:
    """How the engine runs programs of an architecture; whether it can emulate it is found out by trying.

    Raises InfrastructureError, with what makes it, where it cannot.
    """
    if engine.arch in (str(arch), arch.machine):
        return Execution.NATIVE
    name = f"gardenlinux-nvidia-builds/probe:{arch}-{os.getpid()}"
    try:
        list(engine.client.api.load_image(_probe(arch, name)))  # type: ignore[no-untyped-call]  # streamed
        with container(engine, name, ["/program"]) as made:
            made.start()
            ended = f"status {made.wait()['StatusCode']}"
    except (InfrastructureError, DockerException, requests.RequestException) as error:  # the runtime refuses it
        ended = _said(error)
    finally:
        with suppress(DockerException, requests.RequestException):
            engine.client.images.remove(name, force=True)
    if ended != "status 0":
        raise InfrastructureError(
            "container engine",
            f"runs no programs for {arch}",
            got=f"an engine for {engine.arch}, where one ends with {ended}",
            hint=f"{emulation.hint(arch)}; or let DOCKER_HOST name an engine for {arch}",
        )
    return Execution.EMULATED


def _probe(arch: Arch, name: str) -> bytes:
    """The archive of an image that holds one small program."""

    def archive(members: Mapping[str, bytes]) -> bytes:
        spool = io.BytesIO()
        with tarfile.open(fileobj=spool, mode="w") as tar:
            for path, content in members.items():
                info = tarfile.TarInfo(path)
                info.size, info.mode = len(content), 0o755
                tar.addfile(info, io.BytesIO(content))
        return spool.getvalue()

    layer = archive({"program": emulation.program(arch)})
    config = {
        "architecture": str(arch),
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    return archive(
        {
            "layer.tar": layer,
            "config.json": json.dumps(config).encode(),
            "manifest.json": json.dumps(manifest).encode(),
        }
    )


def _candidates(tried: list[str]) -> Iterator[docker.DockerClient]:
    try:
        yield docker.from_env(timeout=_TIMEOUT, use_ssh_client=True)
    except (DockerException, ValueError, OSError) as error:
        tried.append(f"{os.environ.get('DOCKER_HOST', 'docker socket')}: {_said(error)}"[:200])
    if "DOCKER_HOST" in os.environ:
        return
    for template in _PODMAN_SOCKETS:
        path = template.format(XDG_RUNTIME_DIR=os.environ.get("XDG_RUNTIME_DIR", "/nonexistent"))
        if Path(path).is_socket():
            yield docker.DockerClient(base_url=f"unix://{path}", timeout=_TIMEOUT)


def _url(client: docker.DockerClient) -> str:
    """Where a client's engine is, as ``DOCKER_HOST`` spells it."""
    url = client.api.base_url
    if url.startswith("http+docker://"):
        adapter = client.api.get_adapter(url)
        return f"unix://{adapter.socket_path}" if hasattr(adapter, "socket_path") else os.environ.get("DOCKER_HOST", "")
    return url.replace("https://", "tcp://").replace("http://", "tcp://")


def _has(engine: Engine, name: str, image: oci.Image) -> bool:
    """Whether the engine knows the image by a name: an image's id is the digest of its config."""
    try:
        return bool(engine.client.images.get(name).id == image.config_descriptor.digest)
    except ImageNotFound:
        return False
    except (DockerException, requests.RequestException) as error:
        raise InfrastructureError("container engine", "failed", got=_said(error)) from error


def _docker_archive(image: oci.Image, names: Sequence[str], target: object) -> None:
    """Write an image as the archive that every engine loads: layers uncompressed, ``manifest.json`` beside them."""
    config = image.config_descriptor.digest.removeprefix("sha256:")
    with tarfile.open(fileobj=target, mode="w") as archive:  # type: ignore[call-overload]

        def add(name: str, stream: object, size: int) -> None:
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, stream)

        blobs = []
        for layer in image.layers:
            name = f"{layer.diff_id.removeprefix('sha256:')}.tar"
            if name not in blobs:
                with tempfile.TemporaryFile() as plain:
                    with oci.open_layer(image.layout, layer.descriptor) as stream:
                        while chunk := stream.read(CHUNK):
                            plain.write(chunk)
                    size = plain.tell()
                    plain.seek(0)
                    add(name, plain, size)
            blobs.append(name)
        data = oci.blob_path(image.layout, image.config_descriptor.digest).read_bytes()
        add(f"{config}.json", io.BytesIO(data), len(data))
        manifest = json.dumps([{"Config": f"{config}.json", "RepoTags": list(names), "Layers": blobs}]).encode()
        add("manifest.json", io.BytesIO(manifest), len(manifest))


def _as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


def _owner() -> dict[str, object]:
    """This process, so that others can tell whether it is still there."""
    machine = Path("/etc/machine-id")
    return {
        "machine": machine.read_text().strip() if machine.is_file() else "",
        # A process id means something in its own namespace only, and until the next boot; engines can be shared.
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pids": Path("/proc/self/ns/pid").stat().st_ino,
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _is_gone(owner: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether the maker of a container is certainly no more, seen from here."""
    if owner["boot"] != here["boot"]:
        return bool(here["machine"]) and owner["machine"] == here["machine"]
    if owner["pids"] != here["pids"]:
        return False
    try:
        return bool(psutil.Process(owner["pid"]).create_time() != owner["started"])
    except psutil.NoSuchProcess:
        return True


def _reap(engine: Engine) -> None:
    """Remove containers whose maker is gone."""
    here = _owner()
    for made in engine.client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True):
        try:
            gone = _is_gone(json.loads(made.labels[LABEL]), here)
        except (KeyError, ValueError):
            continue
        if gone:
            with suppress(APIError):
                made.remove(force=True)


def _said(error: Exception) -> str:
    return str(getattr(error, "explanation", None) or error)[:300]
