"""Verify what is there already: an image that somebody names, or the one that a record tells of.

No image is made for it, except where a record's own is no longer there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from . import components, matrix, oci, pipeline, registry, sources
from .cache import locked, remove
from .console import Reporter, shorten
from .errors import BuildError, ConfigurationError, HarnessError, InfrastructureError, VerificationError
from .matrix import Matrix
from .model import Cell, Flavor
from .oci import Image
from .pipeline import Run
from .record import RECORD, Difference, Record, differences, tool_differences
from .sources import Checksum

_SHOWN = 20  # differences that are printed


def verify_image(reference: str, cell: Cell | None, options: Mapping[str, str], report: Reporter) -> Record:
    """Prove an image right that may come from anywhere; builds nothing.

    ``reference`` is an OCI layout (``oci:<folder>[:<name>]`` or its folder) or an image in a registry; the cell
    comes from its tag where ``cell`` does not say it.
    """
    reference = _spelled_out(reference)
    run = pipeline.start(cell or cell_of(_names(reference)), options, report)
    pipeline.make_inputs([run], refresh=False)
    image = _find(run, reference)
    out = run.settings.out_dir / f"image-{image.digest[7:19]}"
    with locked(out, lambda: report.say(f"  waiting for another run that verifies {image.digest[:19]}")):
        return _verify_found(run, reference, image, out)


def repeat(path: Path, reference: str | None, options: Mapping[str, str], report: Reporter) -> Record:
    """Repeat the verification that a record tells of, from the record alone, and show what differs.

    The image is the one that was verified: what ``--image`` named then or names now (``reference``), or else the
    cell's, built again where it is not there. The new record is in ``out/repeat-<digest>/``. Raises VerificationError
    where anything but times and tools differs, and whatever the verification itself raises.
    """
    old = Record.read(path)
    run = pipeline.start(matrix.find(old.cell), options, report, _settings_of(old))
    out = run.settings.out_dir / f"repeat-{old.digest[7:19]}"
    again = f"nox -s verify -- --record {shlex.quote(str(path))}"
    named = reference or old.reference
    error: HarnessError | None = None
    fresh = out.with_name(out.name + ".part")
    with locked(out):
        remove(fresh)
        pipeline.make_inputs([run], refresh=False)
        try:
            if named:
                named = _spelled_out(named)
                _verify_found(run, named, _find(run, named), fresh)
            else:
                with pipeline.phase(run, "repeat", again):
                    pipeline.verify_built(run, fresh, again)
        except (VerificationError, InfrastructureError) as raised:
            if not (fresh / RECORD).is_file():
                raise
            error = raised
        remove(out)  # not before: it may be an earlier repetition's record that is repeated
        fresh.rename(out)
    new = Record.read(out / RECORD)
    found = differences(old, new)
    _show(found, tool_differences(old, new), report)
    if isinstance(error, InfrastructureError):
        raise error
    if found:
        raise VerificationError(
            f"record {path}",
            f"does not repeat: {len(found)} difference{'s' if len(found) > 1 else ''}",
            got=", ".join(difference.what for difference in found[:3]) + (" …" if len(found) > 3 else ""),
            repeat=again,
        )
    report.say(f"the verdict is that of {path}: same image, same plan, same outcome of {len(new.checks)} checks")
    if error:
        raise error
    return new


def cell_of(names: Iterable[str]) -> Cell:
    """The cell that tags speak of; of cells with one image the one of the oldest release.

    Raises ConfigurationError where they fit none, or more than one.
    """
    tags = [name.rpartition(":")[2] for name in names]
    told = [cells for tag in tags if (cells := _cells_of(tag))]
    common = (set.intersection(*told) or set.union(*told)) if told else set()
    fitting = {matrix.matrix_of(cell).siblings(cell)[0] for cell in common}
    if len(fitting) > 1:  # a release's own name tells it from those whose nodes have the same OS tag
        fitting = {cell for cell in fitting if any(tag.endswith(f"-{_alias(cell)}") for tag in tags)} or fitting
    if len(fitting) != 1:
        raise ConfigurationError(
            "image",
            "its tag does not say which cell it is of",
            got=", ".join(sorted(map(str, fitting))[:_SHOWN]) or ", ".join(tags) or "no tag",
            hint="name the cell: -- --image … --cell <cell id>",
        )
    return fitting.pop()


def _alias(cell: Cell) -> str:
    return matrix.matrix_of(cell).alias.format(gl=cell.gl)


def _cells_of(tag: str) -> set[Cell]:
    """The known cells whose image may bear a tag, with those that they share it with.

    What the matrix expects of kernels counts if any cell fits by it: else the headers had another, or nobody knew.
    """
    fitting = [
        (kernel, cell, of)
        for of in matrix.load_all()
        for cell in of.cells
        if tag.startswith((f"{cell.driver_major}.", f"{cell.driver_major}-"))
        if (kernel := _kernel_in(tag, cell, of))
    ]
    expected = [found for found in fitting if found[0] == _expected(found[1], found[2])]
    return {mate for _, cell, of in expected or fitting for mate in of.siblings(cell)}


def _expected(cell: Cell, of: Matrix) -> str | None:
    """The name that the matrix expects of a cell's kernel."""
    return of.release(cell).kernel_name(cell)


def _kernel_in(tag: str, cell: Cell, of: Matrix) -> str | None:
    """The kernel's name in a tag, if the tag can be one of a cell's."""
    versions = [cell.driver, cell.driver_major] if of.owns_branch(cell) else [cell.driver]
    ends = [of.release(cell).os_tag, of.alias.format(gl=cell.gl), *re.findall(r"-([0-9a-f]{12})$", tag)]
    for version, end in product(versions, ends):
        if tag.startswith(f"{version}-") and tag.endswith(f"-{end}"):
            kernel = tag[len(version) + 1 : -len(end) - 1]
            parts = kernel.split("-")
            if parts[-1] == cell.arch and ("cloud" in parts) == (cell.flavor is Flavor.CLOUD):
                return kernel
    return None


def _verify_found(run: Run, reference: str, image: Image, out: Path) -> Record:
    """Verify an image that the user named."""
    made, inputs = pipeline.plan(run)
    if not reference.startswith("oci:") and "@" not in reference:
        reference += f"@{image.digest}"
    # A layout's own names are all it has; a name that somebody gave is one of several.
    names = _names(reference)
    complete = reference.startswith("oci:") and any("/" in name for name in names)
    return pipeline.hold(
        run,
        made,
        inputs,
        image,
        out,
        f"nox -s verify -- --image {shlex.quote(reference)} --cell {run.cell}",
        modules=pipeline.compiled(run, made),
        names=None if complete else names,
        reference=reference,
    )


def _show(found: Sequence[Difference], tools: Sequence[Difference], report: Reporter) -> None:
    """Print where a repeated verification differs."""
    if found or tools:
        report.table(
            "Differences",
            ("what", "record", "now"),
            [
                *((one.what, shorten(one.old), shorten(one.new)) for one in found[:_SHOWN]),
                *((f"{one.what} (does not count)", shorten(one.old), shorten(one.new)) for one in tools),
            ],
        )
        if len(found) > _SHOWN:
            report.say(f"… {len(found) - _SHOWN} more; the new record has them all")


def _settings_of(record: Record) -> dict[str, str]:
    """The settings that a record's plan was made with, as far as it tells: folders are its machine's own."""
    settings = {"IMAGE_PATH": record.plan.get("image_path")}
    base = record.plan.get("base")
    reference = str(base.get("reference", "")) if isinstance(base, dict) else ""
    if not reference.startswith("oci:"):
        settings["GL_REGISTRY"] = reference.rpartition(":")[0]
    package, absent = record.plan.get("package"), record.plan.get("components_absent")
    if isinstance(package, dict) and package.get("checksum") == Checksum.OWN:
        settings["PACKAGE_SHA256"] = "optional"  # the plan's key has its bytes: another package is another image
    if isinstance(absent, dict) and components.NO_SOURCE in list(absent.values()):
        settings["NVIDIA_REDIST_URL"] = "none"
    return {name: value for name, value in settings.items() if value}


def _spelled_out(reference: str) -> str:
    """A reference that says what it is, from wherever it is read: a folder becomes ``oci:<absolute folder>``."""
    is_layout = "/" not in reference or (Path(reference) / "oci-layout").is_file()
    if not is_layout and not reference.startswith("oci:"):
        return reference
    folder, name = sources.split_layout(reference.removeprefix("oci:"))
    return f"oci:{folder}" + (f":{name}" if name else "")


def _find(run: Run, reference: str) -> Image:
    """The image of a reference; of whatever architecture if it is the only one: that is for a check to judge.

    Raises VerificationError where it is damaged: what cannot be read cannot be right.
    """
    with _readable(reference):
        try:
            return sources.image(reference, None, run.cache, run.report)
        except ConfigurationError:  # none, or one for each of several architectures
            return sources.image(reference, run.cell.arch, run.cache, run.report)


def _names(reference: str) -> tuple[str, ...]:
    """The full names that a reference gives an image."""
    if not reference.startswith("oci:"):
        registry.Reference.parse(reference)
        return (reference.partition("@")[0],)
    folder, name = sources.split_layout(reference.removeprefix("oci:"))
    with _readable(reference):
        return oci.full_names_of(folder, oci.find_entry(folder, name).digest)


@contextmanager
def _readable(reference: str) -> Iterator[None]:
    """Turn what is wrong with an image that is to be verified into a failed verification."""
    try:
        yield
    except BuildError as error:
        raise VerificationError(
            f"image {reference}", f"layers.blobs: {error.subject} {error.fact}", got=error.got
        ) from error
