"""A policy ready to sample and to learn: the model on its mesh, its parameters as a pytree, its processor."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hdpo_jax.config import AgentConfig, ConfigError, ModelConfig, RolloutConfig
from hdpo_jax.rollout.gate import Gate
from hdpo_jax.rollout.prompts import PromptEncoder
from hdpo_jax.rollout.sampler import Sampler
from hdpo_jax.tools.protocol import Tools
from models.families import load_hf, read_processor
from models.policy import PolicyModel, PolicyProcessor
from sharding import multihost
from sharding.mesh import MeshAxes, make_mesh


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What every program of a run is made from."""

    model: PolicyModel
    """Structure and settings; programs take their parameters apart from it."""
    graphdef: nnx.GraphDef
    params: nnx.State
    processor: PolicyProcessor
    mesh: Mesh

    def sampler(
        self,
        toolbox: Tools | None,
        *,
        agent: AgentConfig,
        rollout: RolloutConfig,
        seed: int,
        encode: PromptEncoder | None = None,
        own: bool = False,
        gate: Gate | None = None,
    ) -> Sampler:
        """What samples from this policy, on its mesh; settings are those of `Sampler`."""
        return Sampler(
            self.model,
            self.processor,
            toolbox,
            mesh=self.mesh,
            agent=agent,
            rollout=rollout,
            seed=seed,
            encode=encode,
            own=own,
            gate=gate,
        )


def require_one_process() -> None:
    """Raises ConfigError in a job of several."""
    multihost.start()
    if jax.process_count() > 1:
        raise ConfigError(f"this job has {jax.process_count()} processes; expected one, with all the devices it drives")


def load_policy(
    config: ModelConfig, axes: MeshAxes, devices: Sequence[Any] | None = None, *, together: bool = False
) -> Policy:
    """The policy in the HF directory `config.path`, its parameters spread over a mesh of `devices` (None: all).

    `together`: what is done with it is shared among the processes of a job; else more than one is refused.
    """
    if together:
        multihost.start()
    else:
        require_one_process()
    mesh = make_mesh(axes, devices)
    processor = read_processor(config.path)
    model = load_hf(
        Path(config.path),
        mesh=mesh,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        remat=config.remat,
    )
    graphdef, params = nnx.split(model)
    return Policy(model=model, graphdef=graphdef, params=params, processor=processor, mesh=mesh)
