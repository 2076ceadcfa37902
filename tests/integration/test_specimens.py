"""A check that cannot fail does not count: each specimen is refused, by the check that is there for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from builds import oci, verify
from builds.cache import remove
from builds.errors import InfrastructureError, VerificationError
from builds.oci import Image
from builds.record import Outcome, Record

from .conftest import Built
from .specimens import SPECIMENS, Draft, Sound, Specimen, damage_layer, thaw


@dataclass(frozen=True)
class Bench:
    """The sound image, and a place to hold specimens of it against its plan."""

    built: Built
    sound: Sound
    folder: Path

    def verify(self, image: Image) -> Record:
        """The record of an image. Nothing is run in a container."""
        out = self.folder / "out"
        with pytest.raises((VerificationError, InfrastructureError)):
            verify.run(
                self.built.plan,
                self.built.inputs,
                image,
                engine=None,
                cache=self.built.cache,
                out=out,
                report=self.built.report,
                repeat="pytest tests/integration/test_specimens.py",
            )
        return Record.read(out / "record.json")


@pytest.fixture(scope="module")
def bench(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("specimens")
    verify.reference(built.plan, built.inputs, engine=built.engine, cache=built.cache, report=built.report)
    sound = thaw(built.image, built.plan, len(built.inputs.base.layers), folder / "sound")
    yield Bench(built, sound, folder)
    remove(folder)


@pytest.fixture
def layout(bench: Bench) -> Iterator[Path]:
    yield bench.folder / "specimen"
    remove(bench.folder / "specimen")


def failed(record: Record) -> set[str]:
    return {check.name for check in record.of(Outcome.FAILED)}


def test_the_sound_image_passes_all_but_what_must_run(bench: Bench) -> None:
    record = bench.verify(bench.sound.image)
    assert failed(record) == set()
    assert {check.group for check in record.of(Outcome.NOT_RUN)} == {"runtime"}
    assert not record.passed


@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda specimen: specimen.name.replace(" ", "-"))
def test_a_specimen_is_refused(specimen: Specimen, bench: Bench, layout: Path) -> None:
    draft = Draft(bench.sound)
    specimen.spoil(draft)
    record = bench.verify(draft.write(layout))
    refusing = {check.object for check in record.of(Outcome.FAILED) if check.id == specimen.check}
    assert refusing, f"{specimen.check} lets it pass; what fails: {sorted(failed(record))}"
    assert specimen.thing in refusing or specimen.thing == "*"
    assert not record.passed


def test_a_damaged_blob_is_refused(bench: Bench, layout: Path) -> None:
    draft = Draft(bench.sound)
    draft.put(f"{draft.folder}/note")
    image = draft.write(layout)
    damage_layer(image)
    assert "layers.blobs" in failed(bench.verify(image))


def test_a_layer_of_another_content_is_refused(bench: Bench, layout: Path) -> None:
    """The config promises other bytes than the manifest."""
    draft = Draft(bench.sound)
    draft.damaged = True
    draft.config["rootfs"]["diff_ids"][-1] = "sha256:" + "0" * 64
    assert "layers.diff-ids" in failed(bench.verify(draft.write(layout)))


def test_a_missing_blob_is_refused(bench: Bench, layout: Path) -> None:
    image = Draft(bench.sound).write(layout)
    oci.blob_path(layout, image.layers[-1].descriptor.digest).unlink()
    record = bench.verify(image)
    assert "layers.blobs" in failed(record)
    assert not {check.group for check in record.of(Outcome.PASSED)} & {"modules", "driver-root"}
