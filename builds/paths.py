"""Where things are in an image: what packing puts there, what the installer uses and what the checks look at."""

DRIVER_ROOT = "opt/nvidia/driver"
"""User space. The installer bind-mounts it at /run/nvidia/driver, where the node's other containers look."""

MODULES = "opt/nvidia/modules"
"""One folder per kernel build: ``release`` and ``package`` say which one, ``open/`` and ``proprietary/`` hold the
modules, ``<type>.absent`` holds the reason where a rule leaves a type out."""

INSTALLER = "opt/nvidia/installer"
"""The installer's parts, and ``release.env`` with the facts of the image that they need."""

ENTRYPOINT = "usr/local/bin/nvidia-driver"
"""What the GPU Operator starts."""
