"""The cache: whole entries or none, one maker per key, clear words for a full disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from builds.cache import Cache, copy_checked, disk_errors, key_of, publish, recipe, remove, scratch
from builds.errors import BuildError, InfrastructureError


def test_a_key_depends_on_content_not_on_order() -> None:
    assert key_of(a=1, b={"x": 1, "y": 2}) == key_of(b={"y": 2, "x": 1}, a=1)
    assert key_of(a=1) != key_of(a=2)


def test_a_recipe_depends_on_every_byte_and_not_on_the_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "step.py").write_text("x = 1\n")
    one, two = tmp_path / "one" / "step.py", tmp_path / "two" / "step.py"
    assert recipe(one) == recipe(two)
    two.write_text("x = 2\n")
    assert recipe(one) != recipe(two)
    assert recipe(one, compressor="a") != recipe(one, compressor="b")


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("content")

    first, fresh = cache.make("step", "key", build)
    second, again = cache.make("step", "key", build)
    assert (first, fresh, again) == (second, True, False)
    assert len(made) == 1
    assert (first / "file").read_text() == "content"


def test_two_runs_at_once_make_an_entry_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    cache, started, go = Cache(tmp_path), threading.Event(), threading.Event()
    made, waited = [], threading.Event()

    def slow(folder: Path) -> None:
        started.set()
        assert go.wait(10)
        made.append(folder)

    first = threading.Thread(target=lambda: cache.make("step", "key", slow))
    first.start()
    assert started.wait(10)
    second = threading.Thread(target=lambda: cache.make("step", "key", slow, waiting=waited.set))
    second.start()
    assert waited.wait(10)
    go.set()
    first.join(10)
    second.join(10)
    assert len(made) == 1


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cache.make("step", "key", fail)
    assert cache.find("step", "key") is None
    assert [path.name for path in (tmp_path / "step").iterdir() if not path.name.startswith(".")] == []


def test_what_a_killed_run_left_is_not_taken_for_whole(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    left = tmp_path / "step" / "key.part"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    path, fresh = cache.make("step", "key", lambda folder: (folder / "whole").touch())
    assert fresh
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_publishing_replaces_an_older_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ("old", "new"):
        publish(target, lambda folder, name=name: (folder / name).touch())  # type: ignore[misc]
    assert [file.name for file in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written")])
def test_a_disk_that_takes_no_more_is_said_in_words(number: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=words), disk_errors("layer", tmp_path):
        raise OSError(number, "no")


def test_another_error_of_the_system_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors("layer", tmp_path):
        raise FileNotFoundError("gone")


def test_a_changed_cache_entry_is_noticed_when_it_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("changed")
    with pytest.raises(BuildError, match="not those of its digest"):
        copy_checked(source, target, "0" * 64)
    assert not target.exists()


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove(tmp_path / "nothing")


def test_scratch_folders_of_dead_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    dead, foreign = tmp_path / "nvidia-builds-x", tmp_path / "y"
    for left in (dead, foreign):
        left.mkdir()
        os.utime(left, (0, 0))
    with scratch(tmp_path) as folder, scratch(tmp_path) as other:
        os.utime(folder, (0, 0))  # as if it had been in use for long
        with scratch(tmp_path) as third:
            assert set(tmp_path.iterdir()) == {folder, other, third, foreign}
    assert list(tmp_path.iterdir()) == [foreign]


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing", "too many", "digests gone"])
def test_a_proven_entry_that_is_not_what_it_was_is_made_again(damage: str, tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content")

    entry, new = cache.make("step", "key", build, proven=True)
    assert new
    assert cache.make("step", "key", build, proven=True) == (entry, False)
    file = entry / "sub" / "file"
    actions: dict[str, Callable[[], object]] = {
        "changed": lambda: file.write_text("Content"),
        "cut short": lambda: file.write_text("conten"),
        "missing": file.unlink,
        "too many": lambda: (entry / "more").write_text(""),
        "digests gone": (entry / ".sha256.json").unlink,
    }
    actions[damage]()
    assert cache.find_whole("step", "key") is None
    assert cache.make("step", "key", build, proven=True) == (entry, True)
    assert file.read_text() == "content"
    assert cache.find_whole("step", "key") == entry
    assert len(made) == 2
