"""`hdpo plan` on a small slice, through the TPU's own compiler."""

import dataclasses
import json
from pathlib import Path

import pytest

from hdpo_jax.commands import run_command
from hdpo_jax.config import ConfigError, RLConfig
from hdpo_jax.config_files import load_config
from hdpo_jax.plan import command
from hdpo_jax.plan.estimate import Estimate, loop_trips, sizes_of, tokens_of
from hdpo_jax.plan.programs import Setting, learning_programs
from hdpo_jax.plan.topology import Topology
from hdpo_jax.plan.workload import Workload
from models.qwen3_vl import Qwen3VLConfig, TextConfig, VisionConfig

# Small, with the head sizes of the published models: 128 and 72.
SIZES = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
    ),
    vision=VisionConfig(
        depth=2,
        hidden_size=144,
        num_heads=2,
        intermediate_size=256,
        out_hidden_size=256,
        deepstack_visual_indexes=(0,),
    ),
)
CONFIG = """
from hdpo_jax.config import AgentConfig, DataConfig, ModelConfig, RLConfig, RLTrainConfig, RolloutConfig
from sharding import MeshAxes


def get_config():
    return RLConfig(
        output="unused",
        topology="v5e:2x2",
        model=ModelConfig(path={model!r}),
        data=DataConfig(path="unused"),
        mesh=MeshAxes(fsdp=2, context=2),
        agent=AgentConfig(max_response_tokens=256, max_observation_tokens=128),
        rollout=RolloutConfig(
            slots=16, capacity=1024, patches=512, page=128, chunk=8, shapes=((4, 128, 256), (4, 512, 512)),
            parameters="gathered",
        ),
        train=RLTrainConfig(
            prompts_per_step=4, group_size=4, row_tokens=1024, row_patches=512, micro_batch_rows=2, max_rows=2
        ),
    )
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.json").write_text(json.dumps(SIZES.to_hf()))
    file = folder / "small.py"
    file.write_text(CONFIG.format(model=str(folder)))
    return str(file)


def plan(config: str, *flags: str) -> None:
    run_command("plan", [config, *flags])


@pytest.mark.slow
def test_figures_are_counted_kept_and_told(config, tmp_path, monkeypatch, capsys):
    """A supervised step, with the attention kernels of decoder and vision tower, forward and backward."""
    monkeypatch.setattr(command, "PLANS", tmp_path / "plans")
    monkeypatch.setattr(command, "programs_of", lambda setting: {"sft_step": learning_programs(setting)["sft_step"]})
    plan(config, "--json")
    captured = capsys.readouterr()
    assert "compiling sft_step (1/1) for v5e:2x2" in captured.err
    assert "counted once" not in captured.err
    found = json.loads(captured.out)
    assert (found["topology"], found["chips"], found["fits"]) == ("v5e:2x2", 4, True)
    program = found["programs"]["sft_step"]
    assert 0 < program["hbm_bytes_per_chip"] < program["hbm_limit_bytes"] == 16 * 2**30
    assert program["flops_per_chip"] > program["model_flops_per_chip"] > 0  # layers are computed again
    assert program["collective_bytes_per_chip"] > 0 and program["roofline_seconds"] > 0

    plan(config, "--json")
    captured = capsys.readouterr()
    assert "compiling" not in captured.err
    assert json.loads(captured.out) == found


def test_a_supervised_step_computes_all_rows_at_once_and_an_update_by_mini_batches(config):
    asked = load_config(config, RLConfig)
    asked = dataclasses.replace(asked, train=dataclasses.replace(asked.train, max_rows=12, mini_batches=2))
    sizes = sizes_of(asked)
    setting = Setting.of(asked, sizes, Topology(asked.topology).devices())
    trips = {name: loop_trips(name, setting, Workload.of(asked, sizes)) for name in ("sft_step", "update")}
    assert (trips["sft_step"]["micro_batches"], trips["update"]["micro_batches"]) == (6, 3)


def test_a_verdict_adds_up_a_step_of_full_rows(config):
    """16 rollouts for two rows of 768 + 256 tokens; a prefill computes four rows of 512, one a lane."""

    asked = load_config(config, RLConfig)
    topology = Topology(asked.topology)
    setting = Setting.of(asked, sizes_of(asked), topology.devices())

    def taking(name: str, seconds: float) -> Estimate:
        known = {field.name: 0.0 for field in dataclasses.fields(Estimate)}
        found = {"tokens": tokens_of(name, setting), "seconds": seconds, "collectives": {"all-gather": 3e9}}
        return Estimate(**{**known, **found, "unknown_loops": ()})

    seconds = {"prefill": 6_000, "decode": 0.5, "update": 10_000}
    programs = {name: taking(name, each) for name, each in seconds.items()}
    rate, step, sent = command.verdict(asked, topology, programs)
    assert rate == "at the roofline: 256 sampled tokens/s"  # 16 slots, 8 tokens, half a second
    # Four prompts of 768 tokens are 1.5 times the 4 x 512 that a prefill computes; 512 tokens are sampled.
    assert step == (
        "a step of 16 rollouts, 32 sampled tokens each: 9,000 s of prefill, 2 s of decoding, 10,000 s of update, "
        "21.1 chip-hours"  # 19,002 s on four chips
    )
    assert sent == "all-gather, GB a chip: prefill 3.00, decode 3.00, update 3.00"


def test_a_plan_says_what_it_misses(config, tmp_path):
    with pytest.raises(ConfigError, match=r"^topology is not set; expected the slice that the run is for"):
        plan(config, "--topology", "")
    with pytest.raises(ConfigError, match=r"^topology is 'v9:4'; expected a chip of v5e, v5p, v6e, tpu7x"):
        plan(config, "--topology", "v9:4")
    with pytest.raises(ConfigError, match=r"^train.max_rows is 0; expected the rows of a step"):
        plan(config, "--train.max-rows", "0")
    with pytest.raises(ConfigError, match=r"^model.path '.*nowhere' is not here; expected model.size beside it"):
        plan(config, "--model.path", str(Path(tmp_path) / "nowhere"))
