"""Qwen3, text only, against transformers' own in fp32; its files, and its processor."""

import functools
import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image

from models.families import family_of, load_hf, read_config, read_processor, save_hf
from models.qwen3 import Qwen3, Qwen3Config
from models.qwen3_vl import CheckpointError, KVCache
from models.qwen3_vl.cache import unshared_table
from models.qwen3_vl.decoding import decoding_layout
from models.qwen3_vl.video import Video
from tests.models.text_model import write_qwen3

CORPUS = ("What is 3 + 4? <answer>7</answer>", "system user assistant")
TOLERANCE = 2e-4
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "untied, biased": {"attention_bias": True, "head_dim": 10, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
}


class Pair(NamedTuple):
    hf: Any
    model: Any
    directory: Path


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory) -> Pair:
    directory = tmp_path_factory.mktemp("qwen3")
    hf = write_qwen3(directory, CORPUS, **CONFIGS[request.param])
    return Pair(hf, load_hf(directory, dtype=jnp.float32), directory)


def tokens(pair: Pair, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, pair.model.config.text.vocab_size, length)


def theirs(hf: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return torch.log_softmax(hf(torch.tensor(ids)[None]).logits[0], dim=-1).numpy()


def ours(model: Qwen3, ids: np.ndarray) -> np.ndarray:
    graphdef, params = nnx.split(model)
    logits = jax.jit(lambda params: nnx.merge(graphdef, params)(jnp.asarray(ids)[None]))(params)
    return np.asarray(jax.nn.log_softmax(logits[0]))


def test_logits(pair):
    ids = tokens(pair, 23)
    expected = theirs(pair.hf, ids)
    np.testing.assert_allclose(ours(pair.model, ids), expected, atol=TOLERANCE, rtol=0)
    assert expected.std() > 0.3


def test_greedy_generation_token_for_token(pair):
    ids, new = tokens(pair, 9), 12
    generated = pair.hf.generate(
        torch.tensor(ids)[None], do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
    )
    # min_new_tokens forbids the ends of a turn.
    ends = jnp.asarray(pair.hf.generation_config.eos_token_id)
    graphdef, lay_out = decoding_layout(pair.model, platform="cpu", rows=1)
    stored, params = nnx.split(pair.model)
    table = unshared_table(1, 3)

    @jax.jit
    def generate(params, laid_out):
        cache = KVCache.zeros(pair.model.config, pages=4, page=8, dtype=jnp.float32)
        start = jnp.zeros(1, jnp.int32)
        place = functools.partial(jnp.broadcast_to, shape=(1, 1, 3))
        positions = jnp.broadcast_to(jnp.arange(len(ids))[None, :, None], (1, len(ids), 3))
        model = nnx.merge(stored, params)
        hidden, cache, _ = model.extend(
            jnp.asarray(ids)[None], positions=positions, cache=cache, table=table, start=start
        )

        def likeliest(logits):
            return jnp.argmax(logits.at[:, ends].set(-jnp.inf), -1)

        def step(carry, number):
            cache, token = carry
            model = nnx.merge(graphdef, laid_out)
            at = len(ids) + number
            hidden, cache, _ = model.extend(
                token[:, None], positions=place(at), cache=cache, table=table, start=start + at
            )
            return (cache, likeliest(model.logits(hidden[:, 0]))), token

        first = likeliest(model.logits(hidden[:, -1]))
        return jax.lax.scan(step, (cache, first), jnp.arange(new))[1][:, 0]

    assert generate(params, lay_out(params)).tolist() == generated[0, len(ids) :].tolist()


def test_saved_it_loads_in_transformers_as_it_was(pair, tmp_path):
    save_hf(pair.model, tmp_path / "saved", base=pair.directory)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    again, info = loaded
    assert type(again) is transformers.Qwen3ForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(pair, 7)
    np.testing.assert_array_equal(theirs(again, ids), theirs(pair.hf, ids))
    assert read_config(tmp_path / "saved") == pair.model.config
    # Without a base the config is ours.
    save_hf(pair.model, tmp_path / "alone")
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "alone")
    np.testing.assert_array_equal(theirs(alone, ids), theirs(pair.hf, ids))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; expected one of 'qwen3_vl', 'qwen3_vl_moe', 'qwen3'"),
        ({"use_sliding_window": True}, "sliding windows; only full attention"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn"}}, "rotary scaling 'yarn'"),
        (
            {"num_hidden_layers": 3},
            "tensors do not match config.json; 1[15] missing: model.layers.2.self_attn.q_proj.weight",
        ),
    ],
)
def test_other_models_are_refused_in_one_line(pair, tmp_path, changed, said):
    raw = json.loads((pair.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changed))
    (tmp_path / "model.safetensors").symlink_to(pair.directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=said) as caught:
        load_hf(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_hubs_words_for_the_rotary_base(pair):
    raw = json.loads((pair.directory / "config.json").read_text())
    base = raw.pop("rope_parameters")["rope_theta"]
    assert Qwen3Config.from_hf({**raw, "rope_theta": base, "rope_scaling": None}) == pair.model.config
    assert read_config(pair.directory).text.rope_theta == base


def test_messages(pair):
    processor: Any = pickle.loads(pickle.dumps(read_processor(pair.directory)))
    assert family_of(pair.directory).processor is type(processor)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 3 + 4?"}]},
        {"role": "assistant", "content": "<|im_end|>"},
    ]
    found = processor.encode_messages(messages[:1])
    text = "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(found.token_ids, keep_special=True) == text and found.images == ()
    # What is said is data: the end of a turn that somebody writes ends none.
    spoken = processor.encode_messages(messages, add_generation_prompt=False).token_ids.tolist()
    assert spoken.count(processor.stop_ids[0]) == 2
    turn = processor.observation_turn("7", max_tokens=20)
    shown = "<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n"
    assert processor.decode(turn.token_ids, keep_special=True) == shown
    assert processor.decode(processor.close_turn, keep_special=True) == "<|im_end|>\n"
    known = len(transformers.AutoTokenizer.from_pretrained(pair.directory))
    assert np.flatnonzero(processor.forbidden).tolist() == [known, known + 1, known + 2]


def test_an_image_is_refused_in_one_line(pair):
    processor = read_processor(pair.directory)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    with pytest.raises(ValueError, match="^an image came for a model that reads text only; expected text, or a Q"):
        processor.encode_messages(messages, [Image.new("RGB", (8, 8))])


def test_a_video_is_refused_in_one_line(pair):
    video = Video(source=(Image.new("RGB", (8, 8)),) * 2)
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Who?"}]}
    processor = read_processor(pair.directory)
    said = "^a video came for a model that reads text only; expected text, or a Qwen3-VL$"
    with pytest.raises(ValueError, match=said):
        processor.encode_messages([message], [], [video])
    with pytest.raises(ValueError, match=said):
        processor.user_turn(message, [], [video])
