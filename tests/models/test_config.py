"""config.json in both dialects, and back; what can not be run is refused by name."""

import copy

import pytest
import transformers

from models.qwen3_vl import Qwen3VLConfig, VisionConfig
from tests.models.oracles import CONFIGS, hf_config

# As the hub publishes it: a `rope_scaling` beside `rope_theta`, no rotary settings for vision, fields of no bearing.
PUBLISHED = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "bos_token_id": 151643,
        "use_cache": True,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}


def test_published_dialect():
    config = Qwen3VLConfig.from_hf(PUBLISHED)
    assert config.text.rope_theta == 5e6
    assert config.text.mrope_section == (24, 20, 20)
    assert config.vision.rope_theta == 1e4
    assert config.vision.deepstack_visual_indexes == (5, 11, 17)
    assert config.tie_word_embeddings
    hash(config)  # a static argument of jitted functions


def test_both_dialects_say_the_same():
    theirs = transformers.Qwen3VLConfig.from_dict(copy.deepcopy(PUBLISHED)).to_dict()
    assert "rope_parameters" in theirs["text_config"]
    assert Qwen3VLConfig.from_hf(theirs) == Qwen3VLConfig.from_hf(PUBLISHED)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_loads_in_transformers_and_here(name):
    theirs = hf_config(name)
    config = Qwen3VLConfig.from_hf(theirs.to_dict())
    written = config.to_hf()
    assert Qwen3VLConfig.from_hf(written) == config
    loaded = transformers.Qwen3VLConfig.from_dict(copy.deepcopy(written)).to_dict()
    for section in ("text_config", "vision_config"):
        assert loaded[section] == theirs.to_dict()[section]


def test_defaults_are_those_of_transformers():
    bare = {"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}}
    theirs = transformers.Qwen3VLConfig(vision_config={"out_hidden_size": 4096}).to_dict()
    assert Qwen3VLConfig.from_hf(bare) == Qwen3VLConfig.from_hf(theirs)


def test_deepstack_takes_layers_in_their_order_and_ignores_those_there_are_not():
    vision = VisionConfig(depth=6, deepstack_visual_indexes=(4, 1, 9))
    assert vision.deepstack_taps == ((1, 1), (4, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "'qwen2_5_vl'; only 'qwen3_vl'"),
        ({"model_type": "qwen3_vl_moe"}, "only 'qwen3_vl'"),
        ({"text_config": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}}, "rotary scaling 'yarn'"),
        ({"text_config": {"head_dim": 7}}, "head_dim is 7"),
        ({"text_config": {"num_key_value_heads": 3}}, "num_key_value_heads 3"),
        ({"text_config": {"hidden_act": "mish"}}, "'mish'"),
        ({"text_config": {"hidden_size": 64}}, "out_hidden_size 2048 differs from text hidden_size 64"),
        ({"vision_config": {"num_heads": 5}}, "not a multiple of num_heads 5"),
    ],
)
def test_refusals(change, message):
    raw = copy.deepcopy(PUBLISHED)
    for key, value in change.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message) as error:
        Qwen3VLConfig.from_hf(raw)
    assert "\n" not in str(error.value)
