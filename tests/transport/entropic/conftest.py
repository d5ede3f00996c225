"""What tests of transports share."""

import pytest
from transport.entropic.interpreter import interpreter

from lightning_wdefense.transport.entropic.newton import problem as small
from lightning_wdefense.transport.entropic.triton import OLDEST, supported


@pytest.fixture(params=["small", "large"])
def either_way(request, monkeypatch):
    """Once as it comes, small problems by Newton's method, and once as large ones are solved.

    A test that can only see one of the two says so: ``@pytest.mark.parametrize("either_way", ["large"], indirect=True)``.
    """
    if request.param == "large":
        monkeypatch.setattr(small, "SMALL", 0)
    return request.param


@pytest.fixture(scope="session")
def interpreted():
    """Calls a function in a process in which Triton's kernels are interpreted."""
    if not supported():
        pytest.skip(f"needs Triton {OLDEST} or later")
    with interpreter() as call:
        yield call
