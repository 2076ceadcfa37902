"""A download site for the tests: sends files in whole or in part, and fails as it is told to."""

from __future__ import annotations

import http.server
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from .registries import answering


@dataclass(frozen=True)
class Asked:
    """A request that the site got."""

    path: str
    range: str | None
    if_range: str | None


@dataclass
class Site:
    """What a site has, and how it behaves; both may be changed while it runs."""

    files: dict[str, bytes | Path]
    """By path."""
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Status and body that are sent whatever there is, by path; an empty path: for all."""
    cuts: list[int] = field(default_factory=list)
    """How many bytes of the next answers of more than a few kB are sent before the connection is cut."""
    always_cut: int | None = None
    """The same for every one of them."""
    ranges: bool = True
    """Whether it can send the rest of a file."""
    heeds_if_range: bool = True
    """Whether it looks at a validator at all."""
    etag: str = '"1"'
    """Of every file; empty: it sends none, and no time either."""
    pause: float = 0
    """Seconds before each piece."""
    piece: int = 1 << 20
    asked: list[Asked] = field(default_factory=list)
    address: str = ""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.address}"

    def of(self, path: str) -> list[Asked]:
        """The requests for a path."""
        return [one for one in self.asked if one.path == path]


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    """Run a site on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the base class's name
            path = unquote(self.path)
            wanted = self.headers.get("Range")
            site.asked.append(Asked(path, wanted, self.headers.get("If-Range")))
            if (fixed := site.answers.get(path) or site.answers.get("")) is not None:
                return self._send(*fixed, {})
            if path not in site.files:
                return self._send(404, b"<!DOCTYPE html><title>Not Found</title>", {})
            content = site.files[path]
            data = content if isinstance(content, bytes) else content.read_bytes()
            headers = {"ETag": site.etag} if site.etag else {}
            first = self._first(wanted)
            if first is None:
                return self._send(200, data, headers)
            if first >= len(data):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            span = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
            return self._send(206, data[first:], {**headers, **span})

        def _first(self, wanted: str | None) -> int | None:
            found = re.fullmatch(r"bytes=(\d+)-", wanted or "")
            fresh = not site.heeds_if_range or self.headers.get("If-Range", site.etag) == site.etag
            return int(found[1]) if found and site.ranges and fresh else None

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            end = len(data)
            if len(data) > 4096 and status in (200, 206):
                end = site.cuts.pop(0) if site.cuts else site.always_cut if site.always_cut is not None else end
            with suppress(OSError):
                for start in range(0, min(end, len(data)), site.piece):
                    time.sleep(site.pause)
                    self.wfile.write(data[start : min(start + site.piece, end)])
                if end < len(data):
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_arguments: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client that went away
                super().handle()

    with answering(Handler) as site.address:
        yield site
