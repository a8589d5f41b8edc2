"""Whom root's sessions run as."""

import os
from pathlib import Path

OWN = range(0x6000_0000, 0x7000_0000)
"""Numbers that no host gives to people or containers."""
NOBODY = range(65_534, 65_535)


def spare_users() -> range | None:
    """User and group numbers for sessions, one for each where there are so many; None where none can be had.

    The kernel counts much by user, and never counts what its root has.
    """
    if os.geteuid() != 0 or Path("/proc/self/setgroups").read_text().strip() != "allow":
        return None
    return next((users for users in (OWN, NOBODY) if _exist(users, "uid") and _exist(users, "gid")), None)


def _exist(users: range, kind: str) -> bool:
    """Whether this user namespace has them."""
    spans = (map(int, line.split()) for line in Path(f"/proc/self/{kind}_map").read_text().splitlines())
    return any(inside <= users[0] and users[-1] < inside + count for inside, _, count in spans)
