"""Files from download sites: gone on with where they broke off, proven whole, kept by what they are.

A file lies in the cache as ``downloads/<sha256>/<name>``; a small record says which bytes a URL had, so that they are
not asked for again. What a broken download left waits in ``downloads/partial`` for the next try, or the next run: a
request for the rest (RFC 9110, Range) carries the file's validator (If-Range), so that a server whose file has changed
sends all of it anew. Whatever arrived, in one piece or in several, is believed only when it passes its checks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from . import http
from .cache import disk_errors, file_sha256, locked, remove, write_atomically
from .console import Reporter
from .errors import BuildError, HarnessError, InfrastructureError

_PIECE = 64 * 1024
"""Bytes read at a time: what is lost of an answer that breaks off."""

_PLAIN = {"Accept-Encoding": "identity"}
"""A file as it is: a server that compresses what it sends has other lengths and other offsets."""


@dataclass(frozen=True)
class Known:
    """What a URL had when it was last downloaded."""

    url: str
    """Without credentials."""
    sha256: str
    name: str
    checksum: str
    """Who vouched for the bytes, in the words of whoever asked for them."""


@dataclass(frozen=True)
class Site:
    """The part of the cache that downloads go to, and who is told of them."""

    root: Path
    report: Reporter

    def known(self, url: str) -> Known | None:
        """What the record of a URL says, if there is one that can be read."""
        try:
            known = Known(**json.loads(self._record(url).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return known if re.fullmatch(r"[0-9a-f]{64}", str(known.sha256)) else None

    def remember(self, url: str, sha256: str, name: str, checksum: str) -> None:
        """Write down which bytes a URL has."""
        write_atomically(self._record(url), json.dumps(asdict(Known(http.public(url), sha256, name, checksum))) + "\n")

    def forget(self, url: str) -> None:
        """Have the server asked again."""
        self._record(url).unlink(missing_ok=True)

    def path(self, sha256: str, name: str) -> Path:
        """Where a file of these bytes is, or would be."""
        return self.root / sha256 / name

    def find(self, sha256: str, name: str) -> Path | None:
        """A file of these bytes, proven to have them; one that has not is removed."""
        path = self.path(sha256, name)
        if not path.is_file():
            return None
        if file_sha256(path) == sha256:
            return path
        self.drop(path, "its bytes have changed")
        return None

    def drop(self, path: Path, why: str) -> None:
        """Remove a file that is not what it was."""
        self.report.say(f"  {path.name} in the cache: {why}; it is downloaded again", style="yellow")
        path.unlink()

    @contextmanager
    def alone(self, url: str, name: str) -> Iterator[None]:
        """Let no other run download from a URL meanwhile, nor ask what is known of it: it waits, and has it then."""
        waiting = f"  waiting for another run that downloads {name}"
        with disk_errors(name, self.root), locked(self.partial(url), lambda: self.report.say(waiting)):
            yield

    def partial(self, url: str) -> Path:
        """Folder of what has come from a URL so far."""
        return self.root / "partial" / _key(url)[:32]

    def _record(self, url: str) -> Path:
        return self.root / "known" / f"{_key(url)}.json"


def is_remote(place: str) -> bool:
    """Whether a place is a URL that is downloaded from, not a folder or file."""
    return place.startswith(("http://", "https://"))


def local(place: str) -> Path:
    """The folder or file that a place which is no URL names."""
    return Path(place.removeprefix("file://")).expanduser()


def text(url: str, limit: int, site: Site, hint: str, none: Container[int] = (404, 410)) -> str | None:
    """A small text of at most ``limit`` bytes; None where the server says that there is ``none``, by its status.

    Raises InfrastructureError where the server cannot be asked, BuildError where it sends more.
    """
    place = http.public(url)

    def ask() -> bytes | None:
        with http.prepare(requests.Session()) as session, session.get(url, stream=True, headers=_PLAIN) as response:
            http.check(response)
            if response.status_code in none:
                return None
            if response.status_code != 200:
                raise InfrastructureError(place, "the server refuses", got=http.status(response), hint=hint)
            data = b""
            for chunk in response.iter_content(limit + 1):
                data += chunk
                if len(data) > limit:
                    raise BuildError(place, f"is no text of at most {limit} bytes", got="more", hint=hint)
            return data

    try:
        data = http.retrying(f"ask for {place.rpartition('/')[2]}", site.report.say)(ask)
    except requests.RequestException as error:
        raise _unreachable(place, error, hint) from error
    return None if data is None else data.decode("utf-8", "replace")


def exists(url: str, site: Site, hint: str) -> bool:
    """Whether a server has a file; only a 404 says that it has not."""
    place = http.public(url)

    def ask() -> bool:
        with http.prepare(requests.Session()) as session, session.get(url, stream=True, headers=_PLAIN) as response:
            return http.check(response).status_code not in (404, 410)

    try:
        return bool(http.retrying(f"ask for {place.rpartition('/')[2]}", site.report.say)(ask))
    except requests.RequestException as error:
        raise _unreachable(place, error, hint) from error


def fetch(
    url: str, name: str, check: Callable[[Path], str], site: Site, *, absent: HarnessError, hint: str
) -> tuple[Path, str]:
    """Download a file and keep it by its content; its path and sha256. The caller has it :meth:`alone <Site.alone>`.

    ``check`` proves the file and gives its sha256, or raises BuildError; ``absent`` is raised where the server says
    that there is no such file. Raises InfrastructureError where the server cannot be reached, keeps failing or refuses.
    """
    folder = site.partial(url)
    folder.mkdir(parents=True, exist_ok=True)
    part = _Part(folder / f"{name}.part", folder / "server.json")
    resumed = _complete(url, part, site.report, absent, hint)
    try:
        sha256 = check(part.path)
    except BuildError as error:
        part.drop()  # or a server's mistake would stay with us after it is mended
        if not resumed:
            raise
        site.report.say(f"  {name}: its pieces do not fit ({error.fact}): it is downloaded anew", style="yellow")
        _complete(url, part, site.report, absent, hint)
        try:
            sha256 = check(part.path)
        except BuildError:
            part.drop()
            raise
    target = site.path(sha256, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part.path.replace(target)
    remove(folder)
    return target, sha256


@dataclass(frozen=True)
class _Part:
    """What has come of a file so far, and what the server said of it."""

    path: Path
    server: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.server.unlink(missing_ok=True)

    def said(self) -> tuple[str, int | None]:
        """The file's validator, and its length as far as it was told; an empty validator: begin anew."""
        try:
            said = json.loads(self.server.read_bytes())
            validator, total = said["validator"], said["total"]
        except (OSError, ValueError, KeyError, TypeError):
            return "", None
        return (validator if isinstance(validator, str) else ""), (total if isinstance(total, int) else None)

    def begin(self, headers: Mapping[str, str]) -> int | None:
        """Begin anew, with what an answer says of the whole file; its length, as far as it was told."""
        self.drop()
        self.path.touch()
        coded = headers.get("Content-Encoding", "identity") != "identity"
        length = headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() and not coded else None
        etag = headers.get("ETag", "")
        # A weak validator does not say that the bytes are the same, so nothing may be asked for by it.
        validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
        if validator and not coded:
            write_atomically(self.server, json.dumps({"validator": validator, "total": total}))
        return total


def _complete(url: str, part: _Part, report: Reporter, absent: HarnessError, hint: str) -> bool:
    """Download until it is all there; whether it came in pieces. Gives up when nothing more comes, not at once."""
    place, before = http.public(url), part.size
    pieces = 0

    def once() -> None:
        nonlocal pieces
        pieces += _attempt(url, part, report, absent, hint)

    while True:
        try:
            http.retrying(f"download {part.path.stem}", report.say)(once)
        except requests.RequestException as error:
            if part.size < before + _PIECE:
                raise _unreachable(place, error, hint) from error
            before = part.size
        else:
            return pieces > 0


def _attempt(url: str, part: _Part, report: Reporter, absent: HarnessError, hint: str) -> bool:
    """One try at what is missing of a file; whether it went on with what an earlier one left."""
    place, have = http.public(url), part.size
    validator, total = part.said()
    if not validator or (total is not None and have > total):
        part.drop()
        have = 0
    if have and have == total:
        return True  # it broke off after the last byte
    asked = {"Range": f"bytes={have}-", "If-Range": validator} if have else {}
    with (
        http.prepare(requests.Session()) as session,
        session.get(url, stream=True, headers={**_PLAIN, **asked}) as response,
    ):
        http.check(response)
        if response.status_code in (404, 410):
            part.drop()
            raise absent
        if response.status_code == 200:
            have, total = 0, part.begin(response.headers)
        elif have and response.status_code in (206, 416):
            first, whole = _content_range(response)
            if response.status_code == 416 and whole == have:
                return True
            if response.status_code == 416 or first != have or whole is None or total not in (None, whole):
                part.drop()  # not what was asked for: the next answer is to a request for all of it
                return _attempt(url, part, report, absent, hint)
            total = whole
        else:
            raise InfrastructureError(place, "the server refuses", got=http.status(response), hint=hint)
        if have:
            report.say(f"  download {part.path.stem}: goes on at {have} of {total} bytes")
        with report.bytes(f"download {part.path.stem}", total) as advance, part.path.open("ab") as file:
            advance(have)
            for chunk in response.iter_content(_PIECE):
                file.write(chunk)
                advance(len(chunk))
    if total is not None and part.size != total:
        # requests sees to it that an answer has the length that it promises; whatever else, the rest is asked for
        raise requests.ConnectionError(f"{part.size} of {total} bytes came")
    return have > 0


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and length of the whole file, as an answer's Content-Range says."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    first, whole = found.groups() if found else (None, None)
    return (int(first) if first else None), (int(whole) if whole and whole != "*" else None)


def _unreachable(place: str, error: requests.RequestException, hint: str) -> InfrastructureError:
    fact = "the server keeps failing" if error.response is not None else "cannot be downloaded"
    return InfrastructureError(place, fact, got=http.reason(error), hint=hint)


def _key(url: str) -> str:
    """Name of a URL in the file system; who asks makes no difference."""
    return hashlib.sha256(http.public(url).encode()).hexdigest()
