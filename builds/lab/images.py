"""The lab's kmodbuild and base images: Debian's packages, installed by mmdebstrap, as one layer.

mmdebstrap gets its packages from a folder and never sees the network; what it installs is exactly what was
resolved. Same packages, same bytes, wherever the image is made.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import emulation, layers, oci
from ..cache import remove, write_atomically
from ..errors import BuildError, InfrastructureError
from . import commands
from .apt import Package, file_name, flat_index, flat_release
from .recipes import ImageRecipe

COMMANDS = ("setpriv", "unshare", "mmdebstrap", "apt-get", "dpkg", "tar")

LAYER = "layer.tar.zst"
LAYER_FACTS = "layer.json"

_CLEANED = (
    # files with times, paths or host names of the machine that made the image, and caches that are made again
    # (00mmdebstrap is removed by mmdebstrap itself, which insists on finding it)
    'find "$1/etc/apt" "$1/var/lib/apt" "$1/var/cache" "$1/var/log" -type f ! -name 00mmdebstrap -delete',
    'rm -f "$1/etc/hostname" "$1/etc/resolv.conf" "$1/etc/.pwd.lock"',
    'rm -f "$1/etc/passwd-" "$1/etc/group-" "$1/etc/shadow-" "$1/etc/gshadow-"',
    'rm -f "$1/etc/subuid-" "$1/etc/subgid-"',
    'find "$1/var/lib/dpkg" -maxdepth 1 -name "*-old" -delete',
)
"""Commands that mmdebstrap runs when all is installed; ``$1`` is the root of the image."""


_FOREIGN = (
    'mkdir "$1/foreign" && cp {folder}/*.deb "$1/foreign/"',
    'chroot "$1" dpkg --add-architecture {arch}',
    # Headers are files, and unpacked is all they need to be: the compiler that they depend on is another package here,
    # linux-kbuild the image's own, and what their scripts would call is not there.
    'chroot "$1" sh -c "dpkg --force-depends --unpack /foreign/*.deb"',
    'rm -r "$1/foreign"',
)
"""Commands that install packages of another architecture, by the image's own dpkg and into its database."""

_MACHINE = ("No space left on device", "Operation not permitted", "Read-only file system")
"""What a log says where the machine is at fault: full, or without the rights to make namespaces and mounts."""


@dataclass(frozen=True)
class Contents:
    """The very packages that an image is made of."""

    packages: tuple[Package, ...]
    """Of its own architecture: all of them."""
    include: tuple[str, ...]
    """Names of those that are asked for, beside the essential ones."""
    foreign: tuple[Package, ...] = ()
    """Of another architecture, without what they depend on."""

    @property
    def all(self) -> tuple[Package, ...]:
        """All packages there are."""
        return (*self.packages, *self.foreign)


def command(recipe: ImageRecipe, contents: Contents, repository: Path, foreign: Path, target: Path) -> tuple[str, ...]:
    """The command that installs an image's packages from two folders and packs the result as a tar."""
    folder = shlex.quote(str(foreign))
    hooks = [line.format(folder=folder, arch=recipe.arch) for line in _FOREIGN] if contents.foreign else []
    options = [
        "--mode=root",
        "--variant=essential",
        "--format=tar",
        "--verbose",
        f"--architectures={recipe.runs_on}",
        f"--include={','.join(contents.include)}",
        # a runtime makes its own device nodes; the repository below has no signature
        # that programs of another architecture run was found out by running one
        "--skip=output/dev,check/signed-by,check/qemu",
        # the folder is below the cache, where apt's own user may not look
        '--aptopt=APT::Sandbox::User "root"',
    ]
    options += [f"--dpkgopt={line}" for line in recipe.excludes]
    options += [f"--customize-hook={line}" for line in (*hooks, *_CLEANED)]
    # In namespaces of its own: when we are killed, so is all of it, and its mounts are gone with the last process.
    # (mmdebstrap alone, told to stop while nobody reads what it says, leaves proc and sys mounted in the cache.)
    return (
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
        *("mmdebstrap", *options),
        recipe.suite,
        str(target),
        # every file was checked against the archive's signed index when it was downloaded
        f"deb [trusted=yes] copy:{repository} ./",
    )


def build(
    recipe: ImageRecipe,
    contents: Contents,
    pool: Path,
    folder: Path,
    log: Path,
    progress: Callable[[int], None],
) -> None:
    """Install the packages and write the image's layer and its facts to ``folder``.

    ``progress`` is told packages as they are set up.
    Raises BuildError with the end of the log where the installation fails, InfrastructureError where the log says that
    the machine is at fault, or where it does not run the image's programs.
    """
    subject = f"lab {recipe.kind} image {recipe.arch}-{recipe.gl}"
    if os.geteuid() != 0:
        raise InfrastructureError(subject, "making it needs root", got=f"uid {os.geteuid()}")
    if not emulation.host_runs(recipe.runs_on):
        raise InfrastructureError(
            subject,
            f"making it runs programs for {recipe.runs_on}",
            got=f"a machine of {os.uname().machine} that does not",
            hint=emulation.hint(recipe.runs_on),
        )
    repository, other, temporary, tar = (folder / name for name in ("repository", "foreign", "tmp", "root.tar"))
    for place, held in ((repository, contents.packages), (other, contents.foreign)):
        place.mkdir()
        for package in held:
            (place / file_name(package)).hardlink_to(pool / file_name(package))
    temporary.mkdir()
    index = flat_index(contents.packages)
    (repository / "Packages").write_text(index)
    (repository / "Release").write_text(flat_release(recipe.suite, index))
    _run(command(recipe, contents, repository, other, tar), temporary, log, subject, progress)
    layer = layers.layer_from_tar(tar, folder / LAYER)
    tar.unlink()
    temporary.rmdir()
    for place in (repository, other):
        remove(place)
    facts = {**layer.descriptor.to_json(), "diff_id": layer.diff_id}
    write_atomically(folder / LAYER_FACTS, json.dumps(facts, indent=2) + "\n")


def add(folder: Path, recipe: ImageRecipe, layout: Path, name: str) -> oci.Image:
    """Name the image that was built in ``folder`` in a layout; what the name meant before moves away."""
    facts = json.loads((folder / LAYER_FACTS).read_bytes())
    layer = oci.Layer(oci.Descriptor.from_json(facts), facts["diff_id"])
    made = (
        f"mmdebstrap --variant=essential --include={','.join(recipe.packages)} {recipe.suite}",
        *(f"dpkg --unpack {name}:{recipe.arch}" for name in recipe.headers),
    )
    oci.create(layout)
    oci.add_layer(layout, layer, folder / LAYER)
    return oci.add_image(
        layout,
        [layer],
        arch=recipe.runs_on,
        names=[name],
        config={"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/sh"]},
        history=["; ".join(made)],  # one entry a layer, or engines refuse the image
    )


def _run(arguments: Sequence[str], temporary: Path, log: Path, subject: str, progress: Callable[[int], None]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as out,
        subprocess.Popen(
            arguments,
            env=commands.environment(TMPDIR=str(temporary), SOURCE_DATE_EPOCH=str(oci.EPOCH), TZ="UTC"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            umask=0o022,
        ) as process,
    ):
        assert process.stdout
        out.write(f"{shlex.join(arguments)}\n")
        try:
            for line in process.stdout:
                out.write(line)
                if line.startswith("Setting up "):
                    progress(1)
        except BaseException:
            process.kill()
            raise
    status = process.returncode
    if status:
        said = log.read_text(errors="replace")
        fact = f"mmdebstrap failed with status {status}"
        # the packages are proven, so what is left to blame is the machine, or packages that do not go together
        if any(sign in said for sign in _MACHINE):
            raise commands.failure(subject, fact, said, f"all it said is in {log}")
        raise BuildError(
            subject,
            fact,
            got=commands.tail(said),
            hint=f"all it said is in {log}",
            repeat="nox -s lab",
        )
