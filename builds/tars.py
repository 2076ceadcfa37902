"""Unpacking archives of others without letting them out of their folder."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path, PurePosixPath


def extract(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Unpack one member below a folder. Raises tarfile.TarError for a device, or a path that leads out of it.

    Python's own filter does it where there is one: Debian 12's Python is from before it.
    """
    if hasattr(tarfile, "data_filter"):
        archive.extract(member, target, filter="data")
        return
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        raise tarfile.ExtractError(f"{member.name} is neither a file nor a folder nor a link")
    for name in (member.name, member.linkname):
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise tarfile.ExtractError(f"{member.name} leads out of its folder")
    member.mode &= 0o755  # nobody else may write, and nothing is setuid
    member.uid, member.gid = os.getuid(), os.getgid()
    archive.extract(member, target)
