"""Debian's archive, asked through the machine's own apt.

The machine's apt configuration says where the archive is, through which proxy and with which credentials; it keeps
saying so here. Sources, lists, caches, pins and the list of installed packages are the lab's own: what is
resolved depends on the archive and on nothing that the machine has installed.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..cache import disk_errors, file_sha256, remove, write_atomically
from ..errors import BuildError, InfrastructureError
from ..model import Arch
from . import commands

_KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
"""The keyring's names in newer and older versions of its package."""

_NO_SUITE = "does not have a Release file"  # apt's words, in the language of commands.environment()
_NETWORK = "is the network up, and does `apt-get update` work on this machine?"


@dataclass(frozen=True)
class Package:
    """A package of the archive, down to its bytes."""

    name: str
    version: str
    arch: str
    """An architecture, or ``all``."""
    size: int
    """Bytes of the package file."""
    sha256: str
    stanza: str
    """Its entry in the archive's index."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What a key holds of it."""
        return self.name, self.version, self.sha256


def archive_of(targets: str) -> str:
    """Find Debian's archive among the index targets of apt (``ORIGIN|LABEL|REPO_URI`` lines), other vendors' aside.

    Raises InfrastructureError where it is not among them.
    """
    lines = [line.split("|") for line in targets.splitlines()]
    for origin, label, uri in lines:
        if (origin, label) == ("Debian", "Debian"):
            return uri
    raise InfrastructureError(
        "Debian's archive",
        "is not among the sources of this machine's apt",
        got=", ".join(sorted({label for _, label, _ in lines} - {""})) or "no known source",
        hint="on a Debian machine `apt-get update` makes its sources known",
    )


def source_lines(archive: str, suites: Sequence[str], components: Sequence[str], keyring: Path) -> str:
    """The sources: of a release its release pocket alone, and what is named beside it, such as its backports.

    Without updates and security a release stands still between two point releases, and so do the lab's images.
    """
    return "".join(f"deb [signed-by={keyring}] {archive} {suite} {' '.join(components)}\n" for suite in suites)


def configuration(folder: Path, arch: Arch) -> str:
    """What overrides the machine's apt configuration; read after it, so that lists of it can be cleared."""
    return f"""\
#clear APT::Update;
#clear APT::Architectures;
#clear APT::Default-Release;
#clear APT::Install-Recommends;
#clear APT::Install-Suggests;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Invoke;
#clear DPkg::Pre-Install-Pkgs;
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{folder}/state";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Log "{folder}/log";
APT::Architecture "{arch}";
APT::Architectures {{ "{arch}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Update::Error-Mode "any";
APT::Sandbox::User "root";
Acquire::Languages "none";
"""


def simulated(text: str) -> tuple[tuple[str, str], ...]:
    """Names and versions that a simulated installation would install."""
    return tuple(re.findall(r"^Inst (\S+) \((\S+) ", text, re.MULTILINE))


def stanzas(text: str) -> tuple[Package, ...]:
    """The packages of an index, or of what ``apt-cache show`` prints; each once, sorted by name."""
    packages = {}
    for stanza in re.split(r"\n{2,}", text.strip()):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", stanza, re.MULTILINE))
        packages[fields["Package"]] = Package(
            fields["Package"],
            fields["Version"],
            fields["Architecture"],
            int(fields["Size"]),
            fields["SHA256"],
            stanza,
        )
    return tuple(packages[name] for name in sorted(packages))


def flat_index(packages: Iterable[Package]) -> str:
    """The index of a repository that is one folder, with the package files under :func:`file_name`."""
    return "\n".join(
        re.sub(r"(?m)^Filename: .*$", f"Filename: ./{file_name(package)}", package.stanza) + "\n"
        for package in packages
    )


def flat_release(suite: str, index: str) -> str:
    """The release file of that repository: mmdebstrap looks for the essential packages of a suite by its name."""
    data = index.encode()
    return f"Suite: {suite}\nCodename: {suite}\nSHA256:\n {hashlib.sha256(data).hexdigest()} {len(data)} Packages\n"


def file_name(package: Package) -> str:
    """Name of a package's file in the lab's pool: its digest, so that no version needs escaping."""
    return f"{package.sha256}.deb"


@dataclass(frozen=True)
class Archive:
    """A suite of the archive for one architecture, with lists of our own below ``folder``.

    A package is named as apt does it: ``name``, or ``name/suite`` where it is to come from another suite than the first
    and bring along from there what it needs.
    """

    folder: Path
    suites: tuple[str, ...]
    arch: Arch
    components: tuple[str, ...]

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{' and '.join(self.suites)} for {self.arch}"

    def update(self) -> None:
        """Bring the lists up to date. Raises InfrastructureError where the archive lacks a suite or cannot be asked."""
        commands.require(("apt-get", "apt-cache"))
        targets = commands.output(
            ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"], subject="Debian's archive"
        )
        with disk_errors(self.folder.name, self.folder):
            for name in ("state", "lists/partial", "cache/archives/partial", "log"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "status", "")
            write_atomically(
                self.folder / "sources.list",
                source_lines(archive_of(targets), self.suites, self.components, _keyring()),
            )
            write_atomically(self.folder / "apt.conf", configuration(self.folder, self.arch))
        try:
            self._apt("apt-get", "-qq", "update")
        except InfrastructureError as error:
            if _NO_SUITE not in (error.got or ""):
                raise
            raise InfrastructureError(
                "Debian's archive",
                f"has none of {', '.join(self.suites)}, or not any more",
                got=error.got,
                hint="builds/lab/recipes.yaml names the suites; old releases move to an archive of their own",
            ) from error

    def closure(self, names: Sequence[str]) -> tuple[Package, ...]:
        """Debian's essential packages and the named ones with all that they depend on."""
        # apt takes itself for essential; dpkg, which is, is enough
        essential = "?and(?essential,?not(?exact-name(apt)))"
        plan = self._apt("apt-get", "-s", "-q", "-y", "install", essential, *names)
        return self._show([f"{name}={version}" for name, version in simulated(plan)])

    def named(self, names: Sequence[str]) -> tuple[Package, ...]:
        """The named packages alone, in the version that would be installed."""
        return self._show(names)

    def download(self, packages: Sequence[Package], pool: Path, advance: Callable[[int], None]) -> None:
        """Download packages into a pool, where they are not there yet, under :func:`file_name`.

        ``advance`` is told bytes. Raises InfrastructureError where one cannot be had, BuildError where the archive
        sends other bytes than its index promises.
        """
        wanted = [package for package in packages if not (pool / file_name(package)).is_file()]
        advance(sum(package.size for package in packages) - sum(package.size for package in wanted))
        if not wanted:
            return
        pool.mkdir(parents=True, exist_ok=True)
        part = pool / "part"
        with disk_errors(pool.name, pool):
            remove(part)  # a killed run's
            part.mkdir()
            try:
                with _watched(part, advance):
                    self._apt("apt-get", "-qq", "download", *(f"{p.name}={p.version}" for p in wanted), cwd=part)
                downloaded = {file_sha256(path): path for path in part.glob("*.deb")}
                for package in wanted:
                    if package.sha256 not in downloaded:
                        raise BuildError(
                            f"{package.name} {package.version}",
                            f"the archive sends other bytes than sha256 {package.sha256[:12]}, as its index says",
                            hint="is there a proxy that alters downloads? if not, run it again",
                        )
                    downloaded[package.sha256].rename(pool / file_name(package))
            finally:
                remove(part)

    def _show(self, names: Sequence[str]) -> tuple[Package, ...]:
        return stanzas(self._apt("apt-cache", "show", "--no-all-versions", *names))

    def _apt(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        return commands.output(
            [command, "-c", str(self.folder / "apt.conf"), *arguments],
            subject=f"Debian's archive, {self.title}",
            hint=_NETWORK,
            cwd=cwd,
        )


def _keyring() -> Path:
    for name in _KEYRINGS:
        if (path := Path("/usr/share/keyrings") / name).is_file():
            return path
    raise InfrastructureError(
        "Debian's archive", "its keys are not on this machine", hint="install the package debian-archive-keyring"
    )


@contextmanager
def _watched(folder: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Tell how the files in a folder grow."""
    done = threading.Event()
    seen = 0

    def look() -> None:
        nonlocal seen
        now = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        advance(now - seen)
        seen = now

    def watch() -> None:
        while not done.wait(0.5):
            try:
                look()
            except FileNotFoundError:
                continue  # apt renamed a file just now

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    look()
