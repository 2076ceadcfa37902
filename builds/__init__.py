"""Compile, pack, prove and ship NVIDIA kernel modules for Garden Linux, one matrix cell at a time."""

__version__ = "0.1.0"
