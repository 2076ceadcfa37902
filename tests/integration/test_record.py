"""A verdict that can be repeated from its record alone, on another day, in another folder, of an image gone wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builds import oci
from builds.cache import remove
from builds.oci import Image
from builds.record import Outcome, Record

from .conftest import Built, Cli
from .draft import Draft, damage_layer, flip_crc, thaw


@pytest.fixture(scope="module")
def record(verified: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the default cell, taken away from its image."""
    copy = tmp_path_factory.mktemp("record") / "record.json"
    shutil.copyfile(verified.out / "record.json", copy)
    return copy


@pytest.fixture(scope="module")
def spoiled(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """An image of which one CRC is wrong."""
    folder = tmp_path_factory.mktemp("spoiled")
    draft = Draft(thaw(built.image, built.plan, len(built.inputs.base.layers), folder / "sound"))
    draft.edit(draft.module("nvidia"), flip_crc("vfree"))
    yield draft.write(folder / "image")
    remove(folder)


def test_a_record_repeats_on_a_machine_that_has_nothing_but_the_record(
    record: Path, builds: Cli, tmp_path: Path
) -> None:
    """An empty output folder: the image is built again, and is the same."""
    done = builds("verify", "--record", str(record), env={"OUT_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert f"the verdict is that of {record}" in done.stderr
    (left,) = tmp_path.glob("repeat-*/record.json")
    old, new = Record.read(record), Record.read(left)
    assert (new.digest, new.plan, new.passed) == (old.digest, old.plan, True)


def test_what_differs_is_shown_and_is_no_pass(record: Path, builds: Cli, tmp_path: Path) -> None:
    document: dict[str, Any] = json.loads(record.read_text())
    document["plan"]["sets"][0]["kernel"]["build"]["package"] = "6.1.99-9"
    check = next(check for check in document["checks"] if check["id"] == "config.user")
    check.update(expected="root", found="root")
    document["tools"]["pytest"] = "8.0"
    changed = tmp_path / "record.json"
    changed.write_text(json.dumps(document))
    done = builds("verify", "--record", str(changed))
    assert done.returncode == 4, done.stderr
    assert "does not repeat: 2 differences, got plan.sets[0].kernel.build.package, config.user" in done.stderr
    assert "6.1.99-9" in done.stderr
    assert "tools.pytest (does not count)" in done.stderr
    assert f"repeat: nox -s verify -- --record {changed}" in done.stderr
    assert json.loads(changed.read_text()) == document, "the record that was given stays as it is"


def test_a_failure_repeats_as_well(spoiled: Image, built: Built, builds: Cli, tmp_path: Path) -> None:
    reference = f"oci:{spoiled.layout}"
    done = builds("verify", "--image", reference, "--cell", str(built.cell), env={"OUT_DIR": str(tmp_path / "one")})
    assert done.returncode == 4, done.stderr
    assert f"modules.crcs[{built.set.id}/open/nvidia.ko]" in done.stderr
    (left,) = (tmp_path / "one").glob("image-*/record.json")
    failed = Record.read(left)
    names = {check.name for check in failed.of(Outcome.FAILED)}
    assert {name for name in names if not name.startswith("load.")} == {
        f"modules.crcs[{built.set.id}/open/nvidia.ko]",
        f"modules.bytes[{built.set.id}/open/nvidia.ko]",
    }
    assert f"load.modules[{built.set.id}/open/nvidia.ko]" in names
    assert not [name for name in names if "proprietary" in name]
    assert failed.reference == reference
    assert failed.repeat == f"nox -s verify -- --image {reference} --cell {built.cell}"

    done = builds("verify", "--record", str(left), env={"OUT_DIR": str(tmp_path / "two")})
    assert done.returncode == 4, done.stderr
    assert f"the verdict is that of {left}" in done.stderr
    assert f"{len(names)} of " in done.stderr

    done = builds(
        "verify",
        *("--record", str(left), "--image", f"oci:{built.out / 'image'}"),
        env={"OUT_DIR": str(tmp_path / "three")},
    )
    assert done.returncode == 4, done.stderr
    assert "does not repeat" in done.stderr
    assert spoiled.digest[:30] in done.stderr
    assert built.image.digest[:30] in done.stderr


def test_an_image_that_cannot_be_read_is_no_pass_but_a_failure(
    spoiled: Image, built: Built, builds: Cli, tmp_path: Path
) -> None:
    layout = tmp_path / "image"
    shutil.copytree(spoiled.layout, layout)
    damage_layer(spoiled.__class__(layout, spoiled.descriptor, spoiled.manifest, spoiled.config))
    verify = ("verify", "--image", str(layout), "--cell", str(built.cell), "--out-dir", str(tmp_path / "out"))
    done = builds(*verify)
    assert done.returncode == 4, done.stderr
    assert "layers.blobs" in done.stderr
    for digest in (spoiled.config_descriptor.digest, spoiled.digest):
        oci.blob_path(layout, digest).write_text("{")
        done = builds(*verify)
        assert done.returncode == 4, done.stderr
        assert "layers.blobs" in done.stderr
        oci.blob_path(layout, digest).unlink()
        done = builds(*verify)
        assert done.returncode == 4, done.stderr
        assert "has no blob" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_image_that_says_it_is_of_another_architecture_fails_that_check(
    built: Built, builds: Cli, tmp_path: Path
) -> None:
    draft = Draft(thaw(built.image, built.plan, len(built.inputs.base.layers), tmp_path / "sound"))
    draft.config.update(architecture="arm64")
    image = draft.write(tmp_path / "image")
    done = builds("verify", "--image", str(image.layout), "--out-dir", str(tmp_path / "out"))
    assert done.returncode == 4, done.stderr
    assert "config.architecture" in done.stderr


def test_a_layout_that_names_its_image_as_it_likes_is_verified(built: Built, builds: Cli, tmp_path: Path) -> None:
    """As `skopeo copy oci:…:<name> oci:<folder>:sound` leaves it: that name is the layout's own affair."""
    shutil.copytree(built.out / "image", tmp_path / "image")
    index = json.loads((tmp_path / "image/index.json").read_text())
    (entry, *_) = index["manifests"]
    entry["annotations"] = {oci.REF_NAME: "sound"}
    index["manifests"] = [entry]
    (tmp_path / "image/index.json").write_text(json.dumps(index))
    place = ("--image", f"oci:{tmp_path / 'image'}:sound", "--out-dir", str(tmp_path / "out"))
    done = builds("verify", *place)
    assert done.returncode == 2, done.stderr
    assert "--cell" in done.stderr
    done = builds("verify", *place, "--cell", str(built.cell))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (None, 2, "must name the record.json of a verification"),
        ("", 4, "cannot be read"),
        ("[]", 4, "is not a verification record"),
    ],
)
def test_what_is_no_record_is_said_to_be_none(
    text: str | None, status: int, said: str, builds: Cli, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    done = builds("verify", "--record", str(tmp_path / "record.json"))
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_without_an_engine_nothing_that_must_run_is_passed(record: Path, builds: Cli, tmp_path: Path) -> None:
    """The image is there, the engine is not: exit status 5, and the record says what was not run."""
    env = {"DOCKER_HOST": "unix:///nonexistent.sock", "OUT_DIR": str(tmp_path)}
    cell = Record.read(record).cell
    done = builds("verify", cell, env=env)
    assert done.returncode == 5, done.stderr
