"""What the tests on a node share: one built cell.

``NODE_CELL`` names one whose image and logs are then in the user's own output folder: so ``nox -s "node(<cell>)"``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builds import matrix
from tests.integration.conftest import Built, build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A cell, built, with its image."""
    if named := os.environ.get("NODE_CELL"):
        return build(matrix.find(named), Path(os.environ.get("OUT_DIR") or "out"))
    return build(matrix.select({})[0], tmp_path_factory.mktemp("out"))
