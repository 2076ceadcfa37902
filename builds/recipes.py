"""The version of our own code behind each step's output: which files make it, and which tools' bytes end up in it."""

from __future__ import annotations

from pathlib import Path

from . import layers
from .cache import recipe

HERE = Path(__file__).parent
INSTALLER = HERE / "installer"
INSTALLER_PARTS = tuple(sorted(path for path in INSTALLER.rglob("*") if path.suffix in ("", ".sh") and path.is_file()))
"""What an image gets of the installer: the entry point, and the parts that it sources."""

DRIVER_TREE = recipe(HERE / "runfile.py", HERE / "tars.py")
CONFTEST = recipe(HERE / "compile.sh")
MODULES = recipe(HERE / "compile.py", HERE / "compile.sh", HERE / "model.py")
LAYER = recipe(HERE / "layers.py", HERE / "oci.py", compressor=layers.COMPRESSOR)
USER_SPACE = recipe(
    *(HERE / name for name in ("userspace.py", "manifest.py", "runfile.py", "tars.py", "paths.py", "model.py")),
    HERE / "components.py",
    layer=LAYER,
)
MODULE_LAYER = recipe(HERE / "image.py", HERE / "paths.py", HERE / "model.py", layer=LAYER)
CHECKS = recipe(
    *sorted(path for path in (HERE.parent / "tests" / "image").glob("*") if path.suffix in (".py", ".ini")),
    *(HERE / f"{name}.py" for name in ("kernel", "kmod", "rootfs", "oci", "layers", "tars", "runfile", "manifest")),
    *(HERE / f"{name}.py" for name in ("userspace", "components", "image", "kernel_image", "loading", "machine")),
    *(HERE / f"{name}.py" for name in ("model", "paths", "plan", "cache", "emulation", "engine", "record", "verify")),
    *INSTALLER_PARTS,
    *sorted(path for path in (HERE / "guest").iterdir() if path.is_file()),
)
"""The checks of an image, and what they and their expectations are read with."""
IMAGE = recipe(
    HERE / "image.py",
    HERE / "paths.py",
    HERE / "model.py",
    *INSTALLER_PARTS,
    layer=LAYER,
)
