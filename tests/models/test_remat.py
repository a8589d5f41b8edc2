"""What the backward pass computes anew changes its memory, and nothing else."""

from typing import Any, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hdpo_jax.config import ModelConfig
from models.qwen3_vl import Qwen3VL, Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.layers import Remat
from sharding import make_mesh, param_shardings
from tests.models.oracles import IMAGE, VISION_START, Batch, batch, row

REMATS = get_args(Remat)
CONFIG = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=192,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mrope_section=(3, 3, 2),
    ),
    vision=VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        patch_size=4,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=(1,),
    ),
    image_token_id=IMAGE,
    vision_start_token_id=VISION_START,
)
TEXT = batch(CONFIG, [row(CONFIG, [], text=122, seed=seed) for seed in range(2)], length=128)
WITH_IMAGES = batch(CONFIG, [row(CONFIG, [(2, 3)])])


class Pass(NamedTuple):
    gradients: Any
    bytes: int


def gradient(remat: Remat, inputs: Batch):
    """The gradient of a sum of squares as a function of the parameters, and their shapes."""

    def build() -> Qwen3VL:
        return Qwen3VL(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, remat=remat)

    graphdef, params = nnx.split(nnx.eval_shape(build))

    def loss(params):
        token_ids, positions, segment_ids, images = jax.tree.map(jnp.asarray, inputs)
        model = nnx.merge(graphdef, params)
        hidden = model.hidden_states(token_ids, positions=positions, segment_ids=segment_ids, images=images)
        return jnp.where(segment_ids[..., None] > 0, jnp.square(hidden + 1), 0).sum()

    return jax.grad(loss), params


def random_params(params):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.15).astype(np.float32), params)


@pytest.fixture(scope="module")
def passes() -> dict[str, Pass]:
    def compiled(remat: Remat) -> Pass:
        function, params = gradient(remat, TEXT)
        program = jax.jit(function).lower(params).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return Pass(program(random_params(params)), memory.temp_size_in_bytes)

    return {remat: compiled(remat) for remat in REMATS}


def assert_close(found, expected) -> None:
    for (path, one), (_, other) in zip(nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True):
        scale = np.abs(other[...]).max()
        np.testing.assert_allclose(one[...], other[...], atol=1e-5 * scale, rtol=0, err_msg=str(path))


@pytest.mark.parametrize("remat", REMATS)
def test_gradients_are_the_same(passes, remat):
    assert_close(passes[remat].gradients, passes["nothing"].gradients)


def test_memory(passes):
    """full keeps the inputs of 24 layers, of 256 tokens; save_attention what attention gives besides."""
    nothing, full, save_attention = (passes[name].bytes for name in ("nothing", "full", "save_attention"))
    inputs, attended = 24 * 256 * 32 * 4, 24 * 256 * 64 * 4
    assert full > inputs
    assert full + 0.5 * attended < save_attention < full + 1.5 * attended
    assert save_attention < nothing / 3
    # A CPU's own memory is the host's.
    assert passes["offload"].bytes <= 1.05 * full


@pytest.mark.parametrize("remat", REMATS)
def test_only_offload_sends_to_the_host_what_the_layers_keep(remat):
    """What a TPU is told to do with the inputs of the decoder's layers and of the vision tower's."""
    function, params = gradient(remat, WITH_IMAGES)
    lowered = jax.jit(function).trace(params).lower(lowering_platforms=("tpu",)).as_text()
    places = ("pinned_host", "device")
    sent, fetched = (lowered.count(f'_xla_buffer_placement = "{place}"') for place in places)
    assert (sent, fetched) == ((2, 2) if remat == "offload" else (0, 0))


def test_offloading_on_eight_devices(passes):
    function, params = gradient("offload", TEXT)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        found = jax.jit(function)(jax.device_put(random_params(params), param_shardings(params, mesh)))
    assert_close(found, passes["nothing"].gradients)


def test_a_config_takes_the_models_policies():
    assert get_args(get_type_hints(ModelConfig)["remat"]) == REMATS
