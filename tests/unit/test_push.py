"""What the labels of an image in a registry tell before its tags move; whoever made it."""

from __future__ import annotations

from typing import Any

import pytest

from builds import push
from builds.image import PREFIX

BUILD, PACKAGE = f"{PREFIX}.kernel-build", f"{PREFIX}.kernel-package"


@pytest.mark.parametrize(
    ("labels", "builds"),
    [
        ({BUILD: "d1", PACKAGE: "6.12.60-3gl0"}, {"d1": "6.12.60-3gl0"}),
        ({BUILD: "d1,d2", PACKAGE: "a,b"}, {"d1": "a", "d2": "b"}),
        ({BUILD: "d1,d2", PACKAGE: "a"}, {"d1": "d1", "d2": "d2"}),
        ({BUILD: 5}, {"5": ""}),
        ({}, {}),
        ([], {}),
        ("none", {}),
        (None, {}),
    ],
)
def test_kernel_builds_are_read_from_labels_of_any_kind(labels: object, builds: dict[str, str]) -> None:
    assert push._builds({"config": {"Labels": labels}}) == builds


@pytest.mark.parametrize("config", [{}, {"config": None}, {"config": []}, {"config": "x"}])
def test_an_image_without_labels_has_no_kernel_builds(config: dict[str, Any]) -> None:
    assert push._builds(config) == {}
