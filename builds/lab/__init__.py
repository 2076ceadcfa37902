"""The lab: the pipeline's three inputs, made on the spot from Debian's archive and named as the real ones are."""

from __future__ import annotations

from .inputs import images_root, kernels_root, make, missing, packages_root

__all__ = ["images_root", "kernels_root", "make", "missing", "packages_root"]
