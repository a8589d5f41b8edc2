"""One of the processes that test_watch.py starts: meets the others again and again, and may get into trouble."""

import logging
import os
import sys
import time

import jax
import numpy as np

from sharding import multihost
from sharding.watch import job


def main(trouble: str) -> None:
    logging.basicConfig(format="%(message)s")
    with job():
        print("here", flush=True)
        for number in range(10_000):
            mine = trouble if jax.process_index() == 1 and number == 20 else ""
            if mine == "fails":
                raise OSError("disk full")
            if mine == "aborts":
                os.abort()
            if mine == "is slow":
                time.sleep(35)
            if multihost.agree(np.asarray(trouble == "is slow" and number == 40)).any():
                break
            time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
