"""The content-addressed cache: one folder per step and key, written whole or not at all.

An entry is made in a temporary folder beside its final place, under a lock of its own, and renamed when it is
complete: a killed run leaves nothing that a later one takes for finished, and two runs that want the same entry
make it once. What a killed run left is removed by the next one that holds the lock.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import BuildError, InfrastructureError

CHUNK = 1 << 20
_SCRATCH = "nvidia-builds-"
_JUST_MADE = 1.0  # seconds in which whoever made a folder has locked it
_DIGESTS = ".sha256.json"


def key_of(**parts: object) -> str:
    """The key of a step's output: sha256 over the canonical JSON of everything it depends on."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def canonical_json(value: object) -> bytes:
    """One spelling of a JSON value, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def recipe(*sources: Path, **facts: str) -> str:
    """The version of our own code behind an output: digest of the files that make it, and of named facts.

    The bytes of the sources are taken as they are: an edited comment costs a rebuild, a forgotten version
    number would cost a wrong image.
    """
    digests = {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sources}
    return key_of(sources=digests, facts=facts)


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, in hex; ``progress`` is told the bytes of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def write_digests(folder: Path) -> None:
    """Note the sha256 of every file below a folder in it, for :func:`is_whole`."""
    digests = {path: file_sha256(folder / path) for path in _files(folder)}
    (folder / _DIGESTS).write_text(json.dumps(digests, indent=1))


def read_digests(folder: Path) -> dict[str, str]:
    """The digests that were noted, by path. Raises OSError or ValueError where there are none that can be read."""
    digests: dict[str, str] = json.loads((folder / _DIGESTS).read_text())
    return digests


def is_whole(folder: Path) -> bool:
    """Whether a folder has the files that were noted, to the bit, and no others: disks fail, and people have hands."""
    try:
        return read_digests(folder) == {path: file_sha256(folder / path) for path in _files(folder)}
    except (OSError, ValueError):
        return False


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in found if path.name != _DIGESTS)


@contextmanager
def disk_errors(subject: str, place: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fact, hint = (
                "the disk is full",
                "free some space, or name another place with CACHE_DIR, OUT_DIR or TMPDIR",
            )
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            fact, hint = "cannot be written", "name a writable place with CACHE_DIR or OUT_DIR"
        else:
            raise
        raise InfrastructureError(
            subject, fact, got=f"{error.strerror} at {error.filename or place}", hint=hint
        ) from error


def publish(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make ``folder`` whole or not at all, replacing an older one: fill a temporary one, then rename.

    The caller holds the lock of ``folder``, so any temporary folder found beside it was left by a killed run.
    """
    temporary = folder.with_name(folder.name + ".part")
    with disk_errors(f"{folder.parent.name}/{folder.name[:12]}", folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        try:
            make(temporary)
            if folder.exists():
                old = folder.with_name(folder.name + ".old")
                remove(old)
                folder.rename(old)
                temporary.rename(folder)
                remove(old)
            else:
                temporary.rename(folder)
        except BaseException:
            remove(temporary)
            raise
    return folder


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """A temporary folder below ``place``; removes those that killed runs left.

    A folder is locked by whoever uses it: unlike a process id that means the same to every container that shares the
    cache.
    """
    place.mkdir(parents=True, exist_ok=True)
    for left in place.glob(f"{_SCRATCH}*"):
        with suppress(OSError), _held(left):
            if left.stat().st_mtime < time.time() - _JUST_MADE:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=place) as folder, _held(Path(folder)):
        yield Path(folder)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder itself. Raises OSError where somebody has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name and rename it into place."""
    temporary = path.with_name(f"{path.name}.part-{os.getpid()}")
    with disk_errors(path.name, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a folder or file if it is there. Refuses to step into a mounted file system below it."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        below = f"{folder.resolve()}/"
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        if mounted := [place for place in mounts if place.startswith(below)]:
            raise InfrastructureError(
                str(folder),
                "has file systems mounted below it",
                got=mounted[0],
                hint=f"umount {' '.join(mounted)}",
            )
        shutil.rmtree(folder)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of ``path``; ``waiting`` is called once if another run has it."""
    with disk_errors(path.name, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if waiting:
                waiting()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Cache:
    """The shared parts of all cells, each under ``<root>/<step>/<key>/``."""

    root: Path

    def path(self, step: str, key: str) -> Path:
        """Where the output of a step for a key is, or would be."""
        return self.root / step / key

    def find(self, step: str, key: str) -> Path | None:
        """The output of a step for a key, if it is there."""
        path = self.path(step, key)
        return path if path.is_dir() else None

    def find_whole(self, step: str, key: str) -> Path | None:
        """The output of a step that notes digests, if it is there and still is what it was."""
        path = self.find(step, key)
        return path if path and is_whole(path) else None

    def make(
        self,
        step: str,
        key: str,
        build: Callable[[Path], None],
        waiting: Callable[[], None] | None = None,
        *,
        proven: bool = False,
    ) -> tuple[Path, bool]:
        """The output of a step for a key, made by ``build`` if it is not there; and whether it was made now.

        ``proven`` outputs have their digests noted, and are made anew where they are not what was noted.
        """
        find = self.find_whole if proven else self.find
        if found := find(step, key):
            return found, False
        path = self.path(step, key)

        def make(folder: Path) -> None:
            build(folder)
            if proven:
                write_digests(folder)

        with locked(path, waiting):
            if found := find(step, key):
                return found, False
            return publish(path, make), True


def copy_checked(source: Path, target: Path, sha256: str) -> None:
    """Copy a file and prove while copying that it still is what its digest says."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise BuildError(
            str(source),
            f"its bytes are not those of its digest {sha256[:12]}",
            got=digest.hexdigest()[:12],
            hint="the cache was changed from outside: `nox -s clean -- --all` empties it",
        )
