import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hdpo_jax.algorithm.state import TrainState, abstract_state, init_state
from hdpo_jax.config import OptimizerConfig
from hdpo_jax.train.checkpoint import (
    Checkpointer,
    SavedRunError,
    StopSignal,
    base_directory,
    find_checkpoint,
    load_metadata,
    load_params,
)
from hdpo_jax.train.optimizer import make_optimizer
from sharding import make_mesh


class Net(nnx.Module):
    """Awkward on purpose: a list of layers, a stacked matrix, two dtypes."""

    def __init__(self, rngs: nnx.Rngs, width: int = 16):
        self.stack = nnx.Param(jax.random.normal(rngs.params(), (3, width, 8)), axes=("embed", "mlp"))
        self.layers = nnx.List([nnx.Linear(width, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)])
        self.scale = nnx.Param(jnp.ones(5, jnp.bfloat16) / 3)


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def params_of(seed: int = 0, width: int = 16):
    return nnx.split(Net(nnx.Rngs(seed), width))[1]


@jax.jit
def advance(state: TrainState) -> TrainState:
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf + 1), state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_restores_bit_for_bit(tmp_path):
    state = advance(init_state(params_of(), OPTIMIZER))
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2, every=1)
    assert checkpointer.restore_latest(abstract_state(params_of(), OPTIMIZER)) is None
    assert checkpointer.save(1, state, {"next_index": 7, "epochs": [1, 2]}, {"name": "run"})
    checkpointer.close()

    again = Checkpointer(tmp_path / "checkpoints", keep=2, every=1)
    restored = again.restore_latest(abstract_state(params_of(seed=1), OPTIMIZER))
    assert restored is not None
    step, found, data_states = restored
    assert (step, data_states) == (1, [{"next_index": 7, "epochs": [1, 2]}])
    same_bits(found, state)
    same_bits(advance(found), advance(state))  # resumed = uninterrupted
    assert load_metadata(tmp_path) == {"name": "run"}
    again.close()


def test_restores_onto_another_mesh(tmp_path):
    """Saved by one device, restored on eight, saved by those, and back."""
    state = init_state(params_of(), OPTIMIZER)
    one = Checkpointer(tmp_path / "one", keep=1, every=1)
    one.save(1, state, {}, {})
    one.wait()
    mesh = make_mesh({"fsdp": 8})
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, P(None, "fsdp") if leaf.ndim == 3 else P()), state.params)
    spread = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state.params, shardings
    )
    restored = one.restore_latest(abstract_state(spread, OPTIMIZER))
    assert restored is not None
    eight = restored[1]
    same_bits(eight, state)
    assert eight.params["stack"][...].addressable_shards[0].data.shape == (3, 2, 8)
    moments = eight.opt_state[1][0].mu["stack"][...]
    assert moments.addressable_shards[0].data.shape == (3, 2, 8)  # a gathered moment would be (3, 16, 8)

    two = Checkpointer(tmp_path / "two", keep=1, every=1)
    two.save(1, eight, {}, {})
    two.wait()
    restored = two.restore_latest(abstract_state(params_of(), OPTIMIZER))
    assert restored is not None
    same_bits(restored[1], state)
    one.close()
    two.close()


def test_the_state_may_be_donated_right_after_a_save(tmp_path):
    """The background write must not see what later steps put into the same buffers."""
    big = {"weight": jnp.arange(2_000_000, dtype=jnp.float32)}
    expected = np.array(big["weight"])
    double = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2 + 1, state), donate_argnums=0)
    state = TrainState(big, (), jnp.int32(0))
    abstract = jax.eval_shape(lambda: state)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=big["weight"].sharding), abstract
    )
    checkpointer = Checkpointer(tmp_path, keep=1, every=1)
    checkpointer.save(1, state, {}, {})
    for _ in range(5):
        state = double(state)
    checkpointer.wait()
    restored = checkpointer.restore_latest(abstract)
    assert restored is not None
    np.testing.assert_array_equal(restored[1].params["weight"], expected)
    checkpointer.close()


def test_keeps_the_newest_and_saves_when_due(tmp_path):
    state = init_state(params_of(), OPTIMIZER)
    checkpointer = Checkpointer(tmp_path, keep=2, every=5)
    saved = [step for step in range(1, 18) if checkpointer.save(step, state, {}, {})]
    assert saved == [5, 10, 15]
    assert checkpointer.save(17, state, {}, {}, force=True)
    assert not checkpointer.save(17, state, {}, {}, force=True)  # there already: nothing is written over
    checkpointer.close()
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.name.isdecimal()) == ["15", "17"]
    assert find_checkpoint(tmp_path).name == "17"


def test_half_written_checkpoints_do_not_count(tmp_path):
    state = init_state(params_of(), OPTIMIZER)
    checkpointer = Checkpointer(tmp_path, keep=3, every=1)
    checkpointer.save(1, state, {"at": 1}, {})
    checkpointer.close()
    # What a process killed in the middle of a save leaves.
    half = tmp_path / "2.orbax-checkpoint-tmp"
    (half / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    assert find_checkpoint(tmp_path).name == "1"
    again = Checkpointer(tmp_path, keep=3, every=1)
    restored = again.restore_latest(abstract_state(params_of(), OPTIMIZER))
    assert restored is not None
    assert (restored[0], restored[2]) == (1, [{"at": 1}])
    assert again.save(2, state, {"at": 2}, {})
    again.close()
    assert not half.exists()


def test_other_models_are_refused_in_one_line(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1, every=1)
    checkpointer.save(3, init_state(params_of(), OPTIMIZER), {}, {})
    checkpointer.wait()
    with pytest.raises(
        SavedRunError, match=r"holds float32\[16, 8\] for layers.0.kernel; expected float32\[24, 8\]"
    ) as e:
        checkpointer.restore_latest(abstract_state(params_of(width=24), OPTIMIZER))
    assert "\n" not in str(e.value)
    with pytest.raises(SavedRunError, match="another model or optimizer"):
        checkpointer.restore_latest(abstract_state(params_of(), optax.sgd(0.1, momentum=0.9)))
    checkpointer.close()


def test_moments_of_another_dtype_are_refused_in_one_line(tmp_path):
    params, config = params_of(), OptimizerConfig(b2=0.99)
    one, other = (make_optimizer(replace(config, moments=dtype), 10, params) for dtype in ("bfloat16", "float32"))
    checkpointer = Checkpointer(tmp_path, keep=1, every=1)
    checkpointer.save(1, init_state(params, one), {}, {})
    checkpointer.wait()
    refusal = r"holds bfloat16\[8\] for .*mu.*; expected float32\[8\] .*another model.param_dtype or optimizer.moments"
    with pytest.raises(SavedRunError, match=refusal) as e:
        checkpointer.restore_latest(abstract_state(params, other))
    assert "\n" not in str(e.value)
    assert checkpointer.restore_latest(abstract_state(params, one)) is not None
    checkpointer.close()


def test_exports_by_itself(tmp_path):
    """Parameters alone, and the files an export needs, from a run directory, its checkpoints, or one step."""
    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "pytorch_model.bin"):
        (hf / name).write_text(name)
    (hf / "model.safetensors.index.json").write_text("{}")
    run = tmp_path / "run"
    state = init_state(params_of(), OPTIMIZER)
    checkpointer = Checkpointer(run / "checkpoints", keep=2, every=1)
    checkpointer.keep_base(hf)
    (hf / "config.json").write_text("changed since")
    checkpointer.keep_base(hf)
    checkpointer.save(1, init_state(params_of(seed=1), OPTIMIZER), {}, {})
    checkpointer.save(2, state, {}, {})
    checkpointer.close()

    assert sorted(file.name for file in (run / "base").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
    ]
    assert (run / "base" / "config.json").read_text() == "config.json"
    for place in (run, run / "checkpoints", run / "checkpoints" / "2"):
        same_bits(load_params(place, params_of(seed=5)), state.params)
        assert base_directory(place) == run / "base"
    same_bits(load_params(run / "checkpoints" / "1", params_of()), params_of(seed=1))
    for place, found in ((hf, "no checkpoint"), (hf / "config.json", "a file"), (tmp_path / "none", "nothing")):
        with pytest.raises(SavedRunError, match=f"holds {found}; expected a run directory"):
            load_params(place, params_of())


def test_stop_signal():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
