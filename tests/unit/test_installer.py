"""The installer's command line, and what must be right on a node before anything is changed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from builds import paths
from builds.recipes import INSTALLER

from .installer_node import (
    SCRIPT,
    Node,
    one_error,
    refused,
)

# The command line


@pytest.mark.parametrize("arguments", [(), ("install",), ("init", "--fast"), ("load", "init"), ("unload", "")])
def test_unknown_commands_and_arguments_are_usage_errors(node: Node, arguments: tuple[str, ...]) -> None:
    done = node.run(*arguments)
    assert done.returncode == 2
    assert "see nvidia-driver --help" in one_error(done)
    assert node.calls() == []


COMMANDS = ("init", "load", "unload", "reload_nvidia_peermem", "probe_nvidia_peermem")


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("init", "--help")])
def test_help_names_every_command(node: Node, arguments: tuple[str, ...]) -> None:
    done = node.run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {command}" in done.stdout for command in COMMANDS)
    assert node.calls() == []


def test_every_part_is_sourced_and_packed() -> None:
    """The image takes every *.sh of the folder, and the script finds its parts where the image has them."""
    text = SCRIPT.read_text()
    parts = re.search(r"for part in (.+); do", text)
    assert parts
    sourced = {f"{part}.sh" for part in parts[1].split()}
    given_to_the_host = set(re.findall(r"<.\$PARTS/(\S+\.sh)", (INSTALLER / "gvisor.sh").read_text()))
    assert sourced | given_to_the_host == {path.name for path in INSTALLER.rglob("*.sh")}
    assert f"/{paths.INSTALLER}}}" in text
    assert f"HOME_FOLDER=${{INSTALLER_HOME:-/{Path(paths.INSTALLER).parent}}}" in (INSTALLER / "places.sh").read_text()
    assert os.access(SCRIPT, os.X_OK)


# What must be right before anything is changed


def test_root_is_required(node: Node) -> None:
    node.write("uid", "1000\n")
    assert "not running as root" in refused(node)


def test_the_shared_run_folder_is_required(node: Node) -> None:
    node.run_folder.rmdir()
    assert "run is not there or not writable" in refused(node)


def test_tools_of_the_image_are_required(node: Node, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for tool in ("sh", "cat", "id", "awk"):
        (few / tool).symlink_to(f"{tmp_path}/bin/id" if tool == "id" else f"/usr/bin/{tool}")
    assert "this image has no findmnt" in refused(node, PATH=str(few))


def test_facts_of_the_image_are_required(node: Node) -> None:
    (node.home / "installer/release.env").unlink()
    assert "release.env" in refused(node)


@pytest.mark.parametrize("part", ["steps", "places"])
def test_parts_of_the_installer_are_required(node: Node, tmp_path: Path, part: str) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for path in INSTALLER.glob("*.sh"):
        if path.stem != part:
            (parts / path.name).symlink_to(path)
    assert f"{part}.sh" in refused(node, INSTALLER_PARTS=str(parts))


def test_modules_of_the_host_are_refused(node: Node) -> None:
    node.module("nvidia")
    node.module("nvidia_uvm")
    error = refused(node)
    assert "the host has loaded nvidia nvidia-uvm" in error
    assert "driver.enabled" in error


def test_nouveau_is_refused(node: Node) -> None:
    node.module("nouveau")
    assert "the host has loaded nouveau: " in refused(node)


@pytest.mark.parametrize("variable", ["GPU_DIRECT_RDMA_ENABLED"])
def test_a_switch_is_true_or_false(node: Node, variable: str) -> None:
    assert f"{variable} is 'yes': set it to true or false" in refused(node, **{variable: "yes"})
