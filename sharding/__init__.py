"""Where arrays live: the device mesh, logical axes on it, and several hosts. Knows JAX only."""

from sharding.mesh import MeshAxes, make_mesh
from sharding.rules import (
    RULES,
    ShardingRules,
    constrain,
    named_sharding,
    on_each_device,
    owners,
    param_shardings,
    replicate,
    shard_batch,
    shards,
    spec,
)

__all__ = [
    "RULES",
    "MeshAxes",
    "ShardingRules",
    "constrain",
    "make_mesh",
    "named_sharding",
    "on_each_device",
    "owners",
    "param_shardings",
    "replicate",
    "shard_batch",
    "shards",
    "spec",
]
