"""Whom root's sessions run as."""

import os
from pathlib import Path

FIRST, COUNT = 0x6000_0000, 0x1000_0000
"""Numbers that no host gives to people or containers."""
NOBODY = 65_534


def spare_user(session: int) -> int | None:
    """A user and group number for a session, its own where there are so many; None where none can be had.

    The kernel counts much by user, and never counts what its root has.
    """
    if os.geteuid() != 0 or Path("/proc/self/setgroups").read_text().strip() != "allow":
        return None
    own = FIRST + session % COUNT
    return next((user for user in (own, NOBODY) if _exists(user, "uid") and _exists(user, "gid")), None)


def _exists(number: int, kind: str) -> bool:
    """Whether this user namespace has it."""
    spans = (map(int, line.split()) for line in Path(f"/proc/self/{kind}_map").read_text().splitlines())
    return any(inside <= number < inside + count for inside, _, count in spans)
