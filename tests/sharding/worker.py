"""One process of the two that test_multihost.py starts; prints one JSON line of what it saw."""

import json
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from sharding import make_mesh, multihost, replicate, shard_batch


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    multihost.start()
    multihost.start()  # again: does nothing
    me = jax.process_index()
    mesh = make_mesh({"data": 2, "fsdp": 2})
    seen = {"processes": jax.process_count(), "devices": jax.device_count(), "lead": multihost.is_lead()}

    multihost.barrier("ready")
    big = 2**53 + me  # more than 32 bits
    seen["agreed"] = multihost.agree(np.array([[me, big]])).tolist()
    seen["agreed_scalar"] = multihost.agree(np.asarray(0.1 + me)).tolist()
    seen["gathered"] = multihost.gather({"me": "é" * (1 + me)})
    with multihost.together():
        pass
    try:
        with multihost.together():
            if me:
                raise OSError("disk full")
    except (OSError, multihost.OtherProcessFailed) as error:
        seen["given_up"] = repr(error)

    mine: Any = np.arange(6, dtype=np.float32).reshape(2, 3) + 10 * me
    rows = shard_batch({"rows": mine, "count": np.int32(7)}, mesh)
    seen["global"] = list(rows["rows"].shape)
    seen["sum"] = float(jax.jit(lambda x: x.sum())(rows["rows"]))
    seen["round_trip"] = bool((multihost.local_rows(rows["rows"]) == mine).all())
    seen["count"] = int(rows["count"])

    nested = np.stack([mine, mine + 100])[:, None]
    seen["nested"] = list(shard_batch(nested, mesh, axis=2).shape)
    halves = multihost.host_local_to_global(mine, mesh, P("data"))
    seen["halves"] = [list(halves.shape), multihost.local_rows(halves).tolist() == mine.tolist()]
    same: Any = np.arange(3)
    seen["replicated"] = multihost.local_rows(replicate(same, mesh)).tolist()
    try:
        shard_batch(np.ones((3, 2)), mesh)
    except ValueError as error:
        seen["refused"] = str(error)
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
