"""`hdpo serve` from its flags: the policy is loaded, every program compiled, and then requests are answered."""

import contextlib
import signal
from pathlib import Path

from rich.console import Console

from hdpo_jax.config import AgentConfig, Dtype, ModelConfig, RolloutConfig, ToolsConfig
from hdpo_jax.http_server import Guard, serve, token_for
from hdpo_jax.serve.openai_api import make_app
from hdpo_jax.serve.service import Service
from hdpo_jax.tools.system_prompt import system_prompt
from hdpo_jax.tools.toolbox import open_toolbox
from hdpo_jax.train.policy import load_policy
from sharding.mesh import MeshAxes

TOKEN = "HDPO_SERVE_TOKEN"


def run_server(
    model: Path,
    *,
    host: str,
    port: int,
    name: str,
    agent_loop: bool,
    waiting: int,
    body_mb: int,
    drain_seconds: float,
    seed: int,
    dtype: Dtype,
    mesh: MeshAxes,
    agent: AgentConfig,
    tools: ToolsConfig,
    rollout: RolloutConfig,
) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises what ended the engine, where that was not asked for."""
    token = token_for(host, TOKEN)
    console = Console(stderr=True)
    with open_toolbox(tools) if agent_loop else contextlib.nullcontext() as toolbox:
        with console.status(f"loading {model}"):
            policy = load_policy(ModelConfig(path=str(model), dtype=dtype, param_dtype=dtype), mesh)
        service = Service(policy, toolbox, agent=agent, rollout=rollout, seed=seed, waiting=waiting)
        with console.status("compiling"):
            service.start()
        service.watch(lambda: signal.raise_signal(signal.SIGTERM) if service.error else None)
        words = system_prompt(toolbox.schemas) if toolbox else None
        app = make_app(service, name or model.resolve().name, system_prompt=words)
        guard = Guard(app, token=token, requests=waiting + 2 * rollout.slots, body_bytes=body_mb << 20)
        try:
            serve(guard, host=host, port=port, drain_seconds=drain_seconds)
        finally:
            service.stop(seconds=0)
        if service.error:
            raise service.error
