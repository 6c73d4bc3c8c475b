"""A saved tiny model, and a server on it for the tests that leave it as it is."""

import pytest

from tests.serve import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A saved tiny chat model."""
    return tiny.save(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def served(folder):
    """A running server of this module's own."""
    with tiny.in_process(folder) as server:
        yield server


@pytest.fixture(scope="module")
def engine(folder):
    """A plain engine on the same model, without speculation."""
    with tiny.load_engine(folder, drafter=None) as engine:
        yield engine
