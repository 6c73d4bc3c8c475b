"""Skip where there is no native core; every kernel test runs on every instruction set."""

from __future__ import annotations

import pytest

from retort.ops import native

ISAS = native.supported_isas() if native.available() else []


@pytest.fixture(params=native.ISAS)
def isa(request):
    """Each instruction set of this processor in turn."""
    if request.param not in ISAS:
        pytest.skip(f"no native core for {request.param} here")
    with native.use_isa(request.param):
        yield request.param
