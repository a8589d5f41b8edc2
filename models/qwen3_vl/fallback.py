"""Where a kernel does not take what it is given: that is computed without it, and said once."""

import logging
from functools import lru_cache

log = logging.getLogger(__name__)


@lru_cache(maxsize=256)
def say_once(line: str) -> None:
    log.warning("%s", line)
