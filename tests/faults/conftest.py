from __future__ import annotations

from collections.abc import Iterator

import pytest

from fork_server import ForkServer


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Starts command lines in no time, see `fork_server`."""
    with ForkServer() as running:
        yield running
