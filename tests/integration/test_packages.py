"""Driver packages as the lab makes them of Debian's: three branches, three forms, each understood to the last field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from builds.model import Arch
from builds.runfile import package_name

from .conftest import ROOT, Built, Cli

FORMS: dict[str, dict[str, Any]] = {
    "470.256.02": {"payload": "xz", "decompressor": False, "module_types": ["proprietary"], "firmware": 1},
    "535.261.03": {"payload": "xz", "decompressor": False, "module_types": ["open", "proprietary"], "firmware": 2},
    "550.163.01": {"payload": "zstd", "decompressor": True, "module_types": ["open", "proprietary"], "firmware": 2},
}


@pytest.mark.parametrize("version", FORMS)
def test_a_package_of_each_branch_is_understood(version: str, built: Built, builds: Cli) -> None:
    done = builds("lab", f"{version}-debian12-amd64-cloud")
    assert done.returncode == 0, done.stderr
    path = built.cache.root / "lab" / "driver" / version / package_name(version, Arch.AMD64)
    done = builds("probe-package", str(path), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {
        "payload": found["payload"],
        "decompressor": found["header"]["decompressor"] is not None,
        "module_types": found["module_types"],
        "firmware": found["types"]["FIRMWARE"],
    } == FORMS[version]
    assert found["checksums"] == {"CRC": "ok", "MD5": "ok"}
    assert (found["problems"], found["missing"], found["unnamed"]) == ([], [], [])
    assert len(found["selected"]) >= 40


def test_a_branch_without_open_modules_is_planned_without_them(builds: Cli) -> None:
    done = builds("plan", "470.256.02-debian12-amd64-cloud", "--json")
    assert done.returncode == 0, done.stderr
    ((of,),) = (plan["sets"] for plan in json.loads(done.stdout))
    assert list(of["modules"]) == ["proprietary"]
    assert "has no kernel-open" in of["absent"]["open"]


def test_the_page_on_the_user_space_is_what_the_package_gives(built: Built, builds: Cli) -> None:
    done = builds("probe-package", str(built.inputs.package), "--differences")
    assert done.returncode == 0, done.stderr
    page = ROOT / "builds" / "userspace.md"
    assert done.stdout == page.read_text(), f"python -m builds probe-package … --differences > {page.name}"
