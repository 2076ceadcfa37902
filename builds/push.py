"""Push: an image that was proven right goes to its repository, byte for byte, and its moving tags last.

The order is what keeps a half-done push harmless: blobs, their reading back, the manifest by its digest, then the
immutable tag, then the tags that move, the most general one last. So a tag never means anything that was not
verified, whole and read back, and a push that broke off is finished by the same push again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from packaging.version import Version

from . import __version__, oci, recipes, registry, verify
from .console import Reporter, human_size
from .errors import BuildError, HarnessError, InfrastructureError, VerificationError
from .image import PREFIX
from .oci import Image
from .plan import Plan
from .record import Outcome, Record
from .registry import Repository
from .tags import Tag, TagKind


@dataclass(frozen=True)
class Move:
    """A tag of the repository, with the digest that it meant before and the one that it means now."""

    tag: str
    old: str | None
    """None where the repository had no such tag."""
    new: str


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    repository: str
    digest: str
    moves: tuple[Move, ...]
    """All tags of the image, in the order in which they were set."""
    uploaded: int
    """Bytes of the blobs that the repository did not have."""

    def to_json(self) -> dict[str, Any]:
        """The outcome as a JSON document."""
        return asdict(self)


def admit(record: Record, image: Image, verify_it: str, *, must_load: bool = False) -> Plan:
    """The plan that an image was verified against, if a record lets it pass.

    The record must be about exactly this digest, say that every required check passed, and come from the checks that
    are here, or from those of a newer version of this project; if ``must_load``, it must say that the modules were
    loaded into their kernel. ``verify_it`` is the command that verifies the image.
    Raises VerificationError where it is not so.
    """

    def refuse(fact: str, got: str) -> VerificationError:
        return VerificationError(
            f"image {image.digest[:19]}", f"is not pushed: {fact}", got=got, hint=f"verify it: {verify_it}"
        )

    if record.digest != image.digest:
        raise refuse("its record is about another image", record.digest[:19])
    if not record.passed:
        failing = [check.name for check in (*record.of(Outcome.FAILED), *record.missing)]
        raise refuse("its verification did not pass", ", ".join(failing[:3]) or "no check at all")
    if must_load and (why := verify.not_loaded(record)):
        raise refuse("nothing proves that its modules load, which LOAD_TEST demands", why)
    made_by, checks = record.made_by, record.tools["checks"]
    if checks != recipes.CHECKS and made_by <= Version(__version__):
        raise refuse("its record was made by other checks than these", f"those of {made_by}, {checks[:12]}")
    lacking = set(verify.GROUPS) - {check.group for check in record.checks}
    if checks == recipes.CHECKS:
        lacking |= verify.known_checks() - {check.id for check in record.checks}
    if lacking:
        raise refuse("its record lacks checks", ", ".join(sorted(lacking)[:3]))
    try:
        plan = Plan.from_json(record.plan)
    except (AssertionError, AttributeError, HarnessError, KeyError, TypeError, ValueError) as error:
        raise refuse("its record has no readable plan", repr(error)) from error
    if plan.cell.id != record.cell:
        raise refuse("its record has the plan of another cell", plan.cell.id)
    labels = (image.config.get("config") or {}).get("Labels") or {}
    if labels.get(f"{PREFIX}.plan-key") != plan.image:
        raise refuse("its record has the plan of another image", plan.image[:12])
    return plan


def run(image: Image, tags: Sequence[Tag], repository: Repository, *, drop_builds: bool = False) -> Pushed:
    """Put an image into a repository under its tags; whatever is there already is not put again.

    Raises VerificationError where the layout is damaged, the immutable tag means another image, or a tag would no
    longer serve a kernel build that it serves now (unless ``drop_builds``), and InfrastructureError where the registry
    is out of reach, refuses, or gives back other bytes than it was given.
    The protocol has no way to set a tag only if it is free: what a tag means is asked right before it is set, and two
    pushes that ask in the same moment are beyond what a client can tell apart.
    """
    report = repository.report
    try:
        with report.bytes("check layout", image.size) as advance:
            oci.check_blobs(image, advance)
        manifest = oci.read_blob(image.layout, image.digest)
    except BuildError as error:
        raise VerificationError(
            f"image {image.digest[:19]}",
            f"is not pushed: its layout is not what was verified: {error.fact}",
            got=error.got,
            hint="build and verify it again",
        ) from error
    ordered = _in_order(tags)
    meant = {tag: _meaning(image, tag, repository) for tag in ordered}
    proven = image.digest in (digest for tag, digest in meant.items() if not tag.moves)
    if not drop_builds:
        _keep_builds(image, [(tag, digest) for tag, digest in meant.items() if digest and tag.moves], repository)
    uploaded = _blobs(image, repository, proven=proven)
    _manifest(image, manifest, repository)
    moves = tuple(_tag(image, manifest, tag, repository) for tag in ordered)
    return Pushed(str(repository), image.digest, moves, uploaded)


def show(pushed: Pushed, report: Reporter) -> None:
    """Print what a push did: each tag, what it meant and what it means."""
    report.table(
        f"Tags of {pushed.repository}",
        ("tag", "was", "is"),
        (
            (move.tag, (move.old or "new")[:19], "unchanged" if move.old == move.new else move.new[:19])
            for move in pushed.moves
        ),
    )
    report.say(f"{pushed.repository}@{pushed.digest}")


def _meaning(image: Image, tag: Tag, repository: Repository) -> str | None:
    """What a tag means now. Raises VerificationError where it is not free for this image.

    An immutable tag that means this image says that an earlier push has read back all of it.
    """
    digest = registry.digest_of(repository, tag.name)
    if not tag.moves and digest not in (None, image.digest):
        raise VerificationError(
            f"image {image.digest[:19]}",
            f"is not pushed: the immutable tag {tag.name} of {repository} means another image",
            got=str(digest)[:19],
            hint="the same plan gives the same bytes: one of the two was not made by this plan",
        )
    return digest


def _keep_builds(image: Image, meant: Sequence[tuple[Tag, str]], repository: Repository) -> None:
    """See that no tag stops serving nodes that it serves: each kernel build of its present image is in the new one.

    Two releases can ship different builds of one kernel name, and nodes of both follow one tag. Raises
    VerificationError where one of them would find no modules any more.
    """
    new = _builds(image.config)
    for tag, digest in meant if new else ():
        old = _builds(registry.config_of(repository, digest) or {}) if digest != image.digest else {}
        if lost := sorted(old[build] for build in old.keys() - new.keys()):
            raise VerificationError(
                f"image {image.digest[:19]}",
                f"is not pushed: {repository}:{tag.name} has modules for kernel builds that this image lacks",
                got=f"{', '.join(lost)} there, {', '.join(sorted(new.values()))} here",
                hint="name the kernels of both releases in the matrix, then one image has modules for both; "
                "if no node runs the other build any more: -- --drop-builds",
            )


def _builds(config: Mapping[str, Any]) -> dict[str, str]:
    """The kernel builds that an image has modules for, as its labels tell: digest and package."""
    inner = config.get("config")
    labels = inner.get("Labels") if isinstance(inner, Mapping) else None
    told = labels if isinstance(labels, Mapping) else {}  # of somebody else's image that may be anything
    digests, packages = (str(told.get(f"{PREFIX}.kernel-{what}", "")).split(",") for what in ("build", "package"))
    named = packages if len(packages) == len(digests) else digests
    return {digest: name for digest, name in zip(digests, named, strict=True) if digest}


def _in_order(tags: Sequence[Tag]) -> list[Tag]:
    """The tags in the order in which they are set; the one that most nodes follow is the last."""
    order = (TagKind.IMMUTABLE, TagKind.ALIAS, TagKind.VERSION, TagKind.BRANCH)
    return sorted(tags, key=lambda tag: order.index(tag.kind))


def _blobs(image: Image, repository: Repository, *, proven: bool) -> int:
    """Put the blobs that are missing, then read all of them back; how many bytes were put."""
    blobs = {blob.digest: blob for blob in (image.config_descriptor, *(layer.descriptor for layer in image.layers))}
    with repository.report.step("push blobs") as step:
        missing = [blob for blob in blobs.values() if not registry.has_blob(repository, blob)]
        for blob in missing:
            registry.upload_blob(repository, blob, oci.blob_path(image.layout, blob.digest))
        uploaded = sum(blob.size for blob in missing)
        step.note(f"{human_size(uploaded)} in {len(missing)} of {len(blobs)}; the others were there")
    if missing or not proven:
        with repository.report.step("read back blobs") as step:
            for blob in blobs.values():
                registry.prove_blob(repository, blob)
            step.note("every byte as verified")
    return uploaded


def _manifest(image: Image, data: bytes, repository: Repository) -> None:
    if registry.digest_of(repository, image.digest) is None:
        registry.put_manifest(repository, image.digest, data, image.descriptor.media_type)
    try:
        registry.fetch_manifest(repository, image.digest)  # which proves its bytes
    except BuildError as error:
        raise InfrastructureError(error.subject, error.fact, got=error.got, hint="its storage is damaged") from error


def _tag(image: Image, data: bytes, tag: Tag, repository: Repository) -> Move:
    """Let a tag mean the image, if it does not yet."""
    old = _meaning(image, tag, repository)
    if old != image.digest:
        registry.put_manifest(repository, tag.name, data, image.descriptor.media_type)
        found = registry.digest_of(repository, tag.name)
        if found != image.digest:
            raise InfrastructureError(
                f"{repository}:{tag.name}", "the registry did not set the tag", got=str(found), hint="push again"
            )
        repository.report.say(f"  {tag.name}: {old or 'new'} → {image.digest}")
    return Move(tag.name, old, image.digest)
