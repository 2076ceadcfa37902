"""Driver packages and manifests at random: whatever is in them, they are read right or refused in our own words."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from posixpath import dirname, normpath

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builds import manifest, runfile
from builds.errors import BuildError
from builds.lab import package
from builds.lab.package import Form, Line
from builds.manifest import Placed
from builds.model import Arch

from .test_manifest import HEAD, V
from .test_runfile import COMPRESS, FILES, content_of, tar_of, write_package

# The same examples on every machine, and no folder of theirs in the project; a timing decides nothing.
settings = hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=60)

FORMS = {
    "zstd with decompressor": Form("zstd", decompressor=True),
    "xz": Form("xz"),
    "xz of old": Form("xz", old=True),
    "gzip": Form("gzip"),
}


def read(path: Path, folder: Path) -> dict[str, bytes]:
    """The content of a package, read as a build does."""
    header = runfile.read_header(path)
    runfile.check(path, header, version=V, arch=Arch.AMD64, sha256=None)
    runfile.unpack(path, header, folder)
    return content_of(folder)


def read_bytes(data: bytes) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "driver.run"
        path.write_bytes(data)
        return read(path, Path(name) / "tree")


@pytest.fixture(scope="module", params=FORMS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A package of the lab's making, in each of its forms."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    for name, content in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    lines = [Line(name, 0o644, "DOCUMENTATION", "x", "/") for name in FILES if name != ".manifest"]
    package.write(tree, V, Arch.AMD64, lines, folder / "x.run", lambda _: None, FORMS[request.param])
    return (folder / "x.run").read_bytes()


def refused_or_same(data: bytes, whole: bytes) -> None:
    expected = read_bytes(whole)
    try:
        found = read_bytes(data)
    except BuildError:
        return
    assert found == expected


@settings
@given(data=st.data())
def test_a_package_with_a_changed_byte_is_refused_or_the_same(sound: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(sound) - 1))
    byte = data.draw(st.integers(1, 255))
    refused_or_same(sound[:at] + bytes([sound[at] ^ byte]) + sound[at + 1 :], sound)


@settings
@given(data=st.data())
def test_a_package_that_is_cut_short_is_refused(sound: bytes, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(sound) - 1))
    with pytest.raises(BuildError):
        read_bytes(sound[:size])


@settings
@given(more=st.binary(min_size=1, max_size=600))
def test_a_package_with_something_behind_it_is_refused(sound: bytes, more: bytes) -> None:
    with pytest.raises(BuildError):
        read_bytes(sound + more)


@settings
@given(
    start=st.sampled_from([b"", b"#!/bin/sh\n", b"#! /bin/sh\nCRCsum=1\nMD5=\n", b"<!DOCTYPE html>"]),
    words=st.lists(
        st.sampled_from(
            [b"skip=", b"version_string=", b"TARGET_OS=Linux", b"TARGET_ARCH=x86_64", b"7", b"\n", b"9" * 6000]
        )
        | st.binary(max_size=40),
        max_size=30,
    ),
)
def test_what_is_no_package_is_refused_in_our_own_words(start: bytes, words: list[bytes]) -> None:
    with pytest.raises(BuildError):
        read_bytes(start + b"".join(words))


@settings
@given(form=st.sampled_from(sorted(COMPRESS)), data=st.data())
def test_a_payload_of_rubbish_is_refused_in_our_own_words(form: str, data: st.DataObject) -> None:
    """Also where nothing but the payload's own form can tell: one checksum fits whatever was made of it."""
    good = COMPRESS[form](tar_of(FILES))
    keep = data.draw(st.integers(0, len(good)))
    payload = good[:keep] + data.draw(st.binary(max_size=200))
    with tempfile.TemporaryDirectory() as name:
        path = write_package(Path(name) / "x.run", payload, version=V)
        with suppress(BuildError):
            assert read(path, Path(name) / "tree") == FILES


PIECES = ["..", ".", "", "a", "b", "link", ".manifest", "evil", "/", "x" * 300, "\0", "\udcff", "ä"]


@settings
@given(
    names=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("/".join), min_size=1, max_size=4),
    target=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("/".join),
    kind=st.sampled_from([b"0", b"1", b"2", b"5", b"6", b"3"]),
)
def test_nothing_is_unpacked_outside(names: list[str], target: str, kind: bytes) -> None:
    """Neither by a path nor by a link, nor through a link that came before."""
    try:
        first = tar_of({"a": b"1"}, "", name=names[0], type=kind, linkname=target)
        more = tar_of(dict.fromkeys(names, b"evil") | {".manifest": b"x"}, "")
    except (ValueError, OverflowError):
        return  # a name that no archive can have
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        path = write_package(top / "x.run", COMPRESS["gzip"](_joined(first, more)), version=V)
        dest = top / "deep" / "tree"
        with suppress(BuildError):
            runfile.unpack(path, runfile.read_header(path), dest)
        assert sorted(one.name for one in top.iterdir()) in (["x.run"], ["deep", "x.run"])
        assert not dest.parent.exists() or [one.name for one in dest.parent.iterdir()] in ([], ["tree"])


def _joined(first: bytes, second: bytes) -> bytes:
    """Two archives as one: the first without the zeros at its end."""
    blocks = [first[at : at + 512] for at in range(0, len(first), 512)]
    while blocks and not any(blocks[-1]):
        blocks.pop()
    return b"".join(blocks) + second


# --- manifests

LETTERS = "abcXYZ019._-+"
WORDS = st.text(LETTERS, min_size=1, max_size=12).filter(lambda word: word.strip("."))
PATHS = st.lists(WORDS, min_size=1, max_size=3).map("/".join)
HOSTILE = st.lists(st.sampled_from([*PIECES, "nvidia-smi", "libcuda.so.1"]), min_size=1, max_size=5).map("/".join)


def _line(kind: str, path: str, arch: str, folder: str, target: str, depth: int) -> tuple[Line, dict[str, object]]:
    """A line of a type, with the fields that it has, and what is to be read of it."""
    fields = manifest._TYPES[kind].fields.upper()
    words = {"A": arch, "P": folder, "I": f"INHERIT_PATH_DEPTH:{min(depth, path.count('/'))}"}
    text = " ".join(words[field] for field in fields if field in words)
    link = "T" in fields
    wanted: dict[str, object] = {
        "path": path,
        "type": kind,
        "arch": arch if "A" in fields else None,
        "location": folder if "P" in fields else None,
        "inherit_depth": min(depth, path.count("/")) if "I" in fields else None,
        "target": target if link else None,
        "mode": 0 if link else 0o755,
        "module": "m",
    }
    return Line(path, 0 if link else 0o755, kind, "m", text, target if link else ""), wanted


LINES = st.builds(
    _line,
    st.sampled_from(sorted(manifest._TYPES)),
    PATHS,
    st.sampled_from(["NATIVE", "COMPAT32"]),
    PATHS.map(lambda path: f"/{path}/") | st.just("/"),
    PATHS,
    st.integers(0, 3),
)


@settings
@given(made=st.lists(LINES, min_size=1, max_size=8))
def test_what_the_lab_writes_is_read_as_it_was_meant(made: list[tuple[Line, dict[str, object]]]) -> None:
    text = package.manifest(V, Arch.AMD64, [line for line, _ in made])
    entries = manifest.parse(text).entries
    assert len(entries) == len(made)
    for entry, (_, wanted) in zip(entries, sorted(made, key=lambda one: (one[0].path, one[0].type)), strict=True):
        assert {name: getattr(entry, name) for name in wanted} == wanted


def _selected(text: str) -> tuple[Placed, ...]:
    """What is selected by a manifest; nothing if it is refused in our own words."""
    try:
        read = manifest.parse(text)
        return manifest.select(read, Arch.AMD64)
    except BuildError:
        return ()


def _inside(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/") and normpath(path) == path


@settings
@given(text=st.text(max_size=300), prefix=st.sampled_from(["", HEAD, HEAD[: len(HEAD) // 2]]))
def test_any_text_is_a_manifest_or_refused_in_our_own_words(text: str, prefix: str) -> None:
    _selected(prefix + text)


@settings
@given(
    kind=st.sampled_from(sorted(manifest._TYPES)), path=HOSTILE, folder=HOSTILE, target=HOSTILE, depth=st.integers(0, 3)
)
def test_no_entry_leads_out_of_the_driver_root(kind: str, path: str, folder: str, target: str, depth: int) -> None:
    line, _ = _line(kind, path, "NATIVE", folder, target, depth)
    for one in _selected(f"{HEAD}{line}\n"):
        assert _inside(one.dest), line
        assert one.source is None or _inside(one.source), line
        if one.target is not None:
            assert not one.target.startswith("/"), line
            assert _inside(normpath(f"{dirname(one.dest)}/{one.target}")), line


@settings
@given(seed=st.integers(0, 2**32), depth=st.integers(0, 10**9))
def test_any_numbers_and_words_in_lines_are_named_or_read(seed: int, depth: int) -> None:
    """Lines of the right words in the wrong order: each is read, or named with its number."""
    chance = random.Random(seed)
    words: list[Callable[[], str]] = [
        lambda: chance.choice(sorted(manifest._TYPES)),
        lambda: chance.choice(["NATIVE", "COMPAT32", "/", "MODULE:x", f"INHERIT_PATH_DEPTH:{depth}", "0755", "lib"]),
    ]
    lines = [" ".join(chance.choice(words)() for _ in range(chance.randint(1, 7))) for _ in range(5)]
    read, problems = manifest.read(HEAD + "\n".join(lines))
    named = sum(problem.count(",") + 1 if problem.startswith("unknown") else 1 for problem in problems)
    assert len(read.entries) + named == len(lines)
