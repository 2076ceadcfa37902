"""Every setting in one table: its name, its environment variable, its default, what it does.

Precedence: default < matrix file < environment < ``-- --option`` on the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigurationError


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    """Attribute of :class:`Settings` and, with dashes, the option."""
    variable: str
    default: str
    help: str


SELECTION = (
    Setting("driver_version", "DRIVER_VERSION", "", "driver versions to select, separated by commas, or `all`"),
    Setting("gl_version", "GL_VERSION", "", "Garden Linux releases to select, or `all`, `past`, `lab`"),
    Setting("target_arch", "TARGET_ARCH", "amd64", "architectures to select: `amd64`, `arm64`, or `all`"),
    Setting("kernel_flavor", "KERNEL_FLAVOR", "cloud", "kernel flavours: `cloud`, `baremetal` (or `metal`), or `all`"),
)
"""Settings that select cells; with none of them set, the lab's default cell is selected."""

SETTINGS = (
    Setting(
        "gl_registry",
        "GL_REGISTRY",
        "ghcr.io/gardenlinux/gardenlinux",
        "where `kmodbuild:<arch>-<gl>` and the base image `:<gl>` come from: a registry path, or `oci:<folder>`",
    ),
    Setting(
        "nvidia_base_url",
        "NVIDIA_BASE_URL",
        "https://us.download.nvidia.com/tesla",
        "where driver packages come from: a URL or folder that holds `<version>/<package>`, or one package file",
    ),
    Setting(
        "nvidia_redist_url",
        "NVIDIA_REDIST_URL",
        "https://developer.download.nvidia.com/compute/nvidia-driver/redist",
        "where fabric manager, nvlsm, nscq and imex come from: a URL or folder that holds "
        "`redistrib_<driver version>.json` and the archives that it lists, or `none`",
    ),
    Setting(
        "package_sha256",
        "PACKAGE_SHA256",
        "required",
        "whether a driver package must have a sha256 that the matrix pins or its vendor publishes: `required`, or "
        "`optional`",
    ),
    Setting(
        "image_path",
        "IMAGE_PATH",
        "ghcr.io/gardenlinux/gardenlinux-nvidia-installer/driver",
        "repository that the image's tags belong to",
    ),
    Setting(
        "kernel_image",
        "KERNEL_IMAGE",
        "",
        "where kernels to load the modules into come from, beside kmodbuild images and their package sources: a folder "
        "of Debian packages `linux-image-*.deb`, one such package, or a kernel (`vmlinuz`)",
    ),
    Setting(
        "load_test",
        "LOAD_TEST",
        "optional",
        "whether `push` demands that the modules were loaded in a virtual machine: `required` or `optional`",
    ),
    Setting("cache_dir", "CACHE_DIR", "~/.cache/gardenlinux-nvidia", "parts that cells share, and the lab's inputs"),
    Setting("out_dir", "OUT_DIR", "out", "one folder per cell: plan, modules, image, record, logs"),
    Setting("jobs", "JOBS", "", "compile jobs at once; default: as many as there are cores"),
)

DEFAULTS = {setting.name: setting.default for setting in SETTINGS}

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?/{_PART}(?:/{_PART})*/?")
"""A repository as OCI's distribution specification writes it, behind its registry's host."""


@dataclass(frozen=True)
class Settings:
    """The settings of a run, checked."""

    gl_registry: str
    nvidia_base_url: str
    nvidia_redist_url: str | None
    """None: there are no components."""
    vouched: bool
    """Whether somebody besides a driver package itself must say which bytes it has."""
    image_path: str
    kernel_image: Path | None
    """Where kernels are, beside kmodbuild images and their package sources; None: nowhere else."""
    must_load: bool
    """Whether an image is pushed only if its modules were loaded in a virtual machine."""
    cache_dir: Path
    out_dir: Path
    jobs: int


def resolve(
    matrix: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Work out the settings of a run. ``{cache}`` in a value of the matrix file means the cache folder.

    Raises ConfigurationError for a value that cannot be.
    """
    values = dict(DEFAULTS)
    for setting in SETTINGS:
        if matrix and setting.variable in matrix:
            values[setting.name] = matrix[setting.variable]
        if environ.get(setting.variable):
            values[setting.name] = environ[setting.variable]
        if options and options.get(setting.name):
            values[setting.name] = options[setting.name]
    cache, out = (_folder(name, values[name.lower()]) for name in ("CACHE_DIR", "OUT_DIR"))
    if cache.is_relative_to(out):
        raise ConfigurationError("CACHE_DIR", "must not lie in OUT_DIR, which `clean` empties", got=f"{cache} in {out}")
    if not _REPOSITORY.fullmatch(values["image_path"]):
        raise ConfigurationError(
            "IMAGE_PATH", "must be <registry>/<repository> without tag or digest", got=repr(values["image_path"])
        )
    if values["package_sha256"] not in ("required", "optional"):
        raise ConfigurationError(
            "PACKAGE_SHA256", "must be `required` or `optional`", got=repr(values["package_sha256"])
        )
    if values["load_test"] not in ("required", "optional"):
        raise ConfigurationError("LOAD_TEST", "must be `required` or `optional`", got=repr(values["load_test"]))
    kernels = values["kernel_image"].replace("{cache}", str(cache))
    redist = values["nvidia_redist_url"].replace("{cache}", str(cache)).rstrip("/")
    return Settings(
        gl_registry=values["gl_registry"].replace("{cache}", str(cache)).rstrip("/"),
        nvidia_base_url=values["nvidia_base_url"].replace("{cache}", str(cache)).rstrip("/"),
        nvidia_redist_url=None if redist == "none" else redist,
        vouched=values["package_sha256"] == "required",
        image_path=values["image_path"].rstrip("/"),
        kernel_image=_folder("KERNEL_IMAGE", kernels) if kernels else None,
        must_load=values["load_test"] == "required",
        cache_dir=cache,
        out_dir=out,
        jobs=_jobs(values["jobs"]),
    )


def _folder(variable: str, text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigurationError(variable, "names a home that is not known", got=text) from error


def _jobs(text: str) -> int:
    if not text:
        return len(os.sched_getaffinity(0))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError("JOBS", "must be a whole number, 1 or more", got=repr(text))
    return int(text)
