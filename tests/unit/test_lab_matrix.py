"""The walk over many cells: which words of a compiler prove a rule."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from builds import lab_matrix, matrix, oci, pipeline
from builds.errors import ExcludedError, VerificationError
from builds.layers import Entry, write_layer
from builds.model import Arch, Cell
from builds.oci import Image

from .test_plan import cell_run

REASONS = {rule.reason for of in matrix.load_all() if of.inputs == "lab" for rule in of.rules}
RESIZE = "error: too few arguments to function 'pci_resize_resource'"


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (f"/src/nvidia/nv-pci.c:237:9: {RESIZE}", "pci_resize_resource"),
        ("error: ‘struct vm_area_struct’ has no member named ‘__vm_flags’; did you mean ‘vm_fl’?", "__vm_"),
        ("nv-time.h:1: error: implicit declaration of function 'in_irq' [-Werror]", "in_irq"),
        ("no kernel-open/Makefile", "kernel-open"),
    ],
)
def test_the_reason_that_names_what_the_compiler_names_is_proven_and_no_other(said: str, named: str) -> None:
    assert {reason for reason in REASONS if lab_matrix._agree(reason, said)} == {
        reason for reason in REASONS if named in reason
    }


@pytest.mark.parametrize(
    "said",
    ["Killed", "an empty log", "gcc: fatal error: no space left on device", "error: 'resize' undeclared", "no modules"],
)
def test_what_names_nothing_of_the_reason_proves_nothing(said: str) -> None:
    assert not any(lab_matrix._agree(reason, said) for reason in REASONS)


def image(folder: Path, *texts: str) -> Image:
    """An image with a layer for each text."""
    oci.create(folder)
    made = []
    for text in texts:
        layer = write_layer([Entry("file", "file", 0o644, text.encode())], folder / "part")
        (folder / "part").rename(oci.blob_path(folder, layer.descriptor.digest))
        made.append(layer)
    return oci.add_image(folder, made, arch=Arch.AMD64, names=["x"], history=texts)


def test_what_cells_share_is_counted_and_no_failure_ends_the_walk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second, excluded, broken = (
        cell_run(Cell.parse(f"570.211.01-{gl}-amd64-cloud"), tmp_path)
        for gl in ("1877.8", "1877.9", "1877.10", "1877.11")
    )
    images = {
        first.cell: image(tmp_path / "1", "base", "user space", "modules"),
        second.cell: image(tmp_path / "2", "base", "user space", "other modules"),
    }

    def verify(run: pipeline.Run) -> SimpleNamespace:
        if run is excluded:
            raise ExcludedError("cell", "is excluded by rules", got="open: no")
        if run is broken:
            raise VerificationError("image", "1 of 9 checks failed")
        return SimpleNamespace(summary="9 of 9 passed")

    monkeypatch.setattr(pipeline, "verify_cell", verify)
    monkeypatch.setattr(pipeline, "image_of", lambda run: images[run.cell])
    known: set[str] = set()
    walked = [lab_matrix._cell(run, known) for run in (first, second, excluded, broken)]
    shared = [layer.descriptor.size for layer in images[first.cell].layers[:2]]
    assert [one.reused for one in walked] == [0, sum(shared), 0, 0]
    assert [one.outcome for one in walked[:3]] == ["9 of 9 passed", "9 of 9 passed", "is excluded by rules"]
    assert [bool(one.problem) for one in walked] == [False, False, False, True]
