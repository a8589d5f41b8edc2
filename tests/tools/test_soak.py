"""Hundreds of sessions, several at a time, crashes and timeouts among them: nothing of them is left."""

import pytest

from tests.bench.soak import soak


@pytest.mark.slow
@pytest.mark.requires_bwrap
def test_nothing_is_left_of_sessions():
    outcome = soak(400)
    assert not outcome.wrong, outcome.wrong[:5]
    for name in ("processes", "threads", "descriptors", "server_descriptors", "sockets", "files"):
        assert outcome.grown(name) <= 0, name
    # A session that left a page behind would make these 1.6 MB, one that left its pictures or output far more.
    assert outcome.grown("memory") < 16 << 20
    assert outcome.grown("server_memory") < 1 << 20
