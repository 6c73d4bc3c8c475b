"""What several test files of this folder start from."""

import pytest

from tests.distill import captures


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a small capture; copy it before changing it."""
    return captures.make(tmp_path_factory.mktemp("c") / "one")
