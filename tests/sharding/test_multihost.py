"""Two real processes over loopback (gloo collectives), and what one process alone does."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding import make_mesh, multihost, shard_batch
from tests.processes import SCHEDULERS, run_job


@pytest.fixture
def alone(monkeypatch):
    """An environment in which nothing hints at other processes."""
    for name in list(os.environ):
        if name.startswith(SCHEDULERS) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **found: calls.append(found))
    calls: list[dict] = []
    return calls


@pytest.mark.slow
def test_two_processes():
    outcomes = run_job([str(Path(__file__).with_name("worker.py"))])
    for index, (status, output, errors) in enumerate(outcomes):
        assert status == 0, errors[-3000:]
        assert json.loads(output.splitlines()[-1]) == {
            "processes": 2,
            "devices": 4,
            "lead": index == 0,
            # 64-bit values come through whole; sent as JAX arrays they would be cut to 32 bits.
            "agreed": [[[0, 2**53]], [[1, 2**53 + 1]]],
            "agreed_scalar": [0.1, 1.1],
            "gathered": [{"me": "é"}, {"me": "éé"}],
            "given_up": ["OtherProcessFailed('process 1 gave up: OSError: disk full')", "OSError('disk full')"][index],
            "global": [4, 3],
            "sum": 15.0 + 75.0,
            "round_trip": True,
            "count": 7,
            "nested": [2, 1, 4, 3],
            "halves": [[4, 3], True],
            "replicated": [0, 1, 2],
            "refused": "3 rows a process on mesh {'data': 2, 'fsdp': 2, 'tensor': 1, 'context': 1}: "
            "expected rows that the devices of a process divide",
        }


def test_one_process_alone(alone):
    multihost.start()
    assert alone == []
    assert multihost.is_lead()
    multihost.barrier("nobody else")
    np.testing.assert_array_equal(multihost.agree(np.array([3, 4])), [[3, 4]])
    mesh = make_mesh({"data": 2, "fsdp": 4})
    rows: Any = np.arange(16).reshape(8, 2)
    np.testing.assert_array_equal(multihost.local_rows(shard_batch(rows, mesh)), rows)
    np.testing.assert_array_equal(multihost.host_local_to_global(rows, mesh, P("data")), rows)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_LOCALID": "0", "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"JAX_PLATFORMS": "", "MEGASCALE_COORDINATOR_ADDRESS": "a"},
    ],
)
def test_a_job_of_several_is_found(alone, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    multihost.start()
    assert alone == [{}]


@pytest.mark.parametrize(
    "environment",
    [{"SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "a,b"}, {"OMPI_COMM_WORLD_SIZE": "1"}],
)
def test_one_task_or_a_cpu_run_starts_alone(alone, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    multihost.start()
    assert alone == []


def test_explicit_coordinator(alone, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is None; expected a number beside JAX_COORDINATOR_ADDRESS"):
        multihost.start()
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    multihost.start()
    assert alone == [{"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}]
