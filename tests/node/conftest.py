"""What the tests on a node share: one built cell.

``NODE_CELL`` names another one than the default, as ``nox -s "node(<cell>)"`` does.
"""

from __future__ import annotations

import os

import pytest

from builds import matrix
from tests.integration.conftest import Built, build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A cell, built, with its image."""
    named = os.environ.get("NODE_CELL")
    return build(matrix.find(named) if named else matrix.select({})[0], tmp_path_factory.mktemp("out"))
