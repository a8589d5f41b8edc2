"""config.json in both dialects, and back; what can not be run is refused by name."""

import copy

import pytest
import transformers

from models.qwen3_vl import MoEConfig, Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.config import LayerRun
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

MOE = {"model_type": "qwen3_vl_moe"}


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
    loaded = type(theirs).from_dict(copy.deepcopy(written)).to_dict()
    for section in ("text_config", "vision_config"):
        assert loaded[section] == theirs.to_dict()[section]


def test_defaults_are_those_of_transformers():
    bare = {"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}}
    theirs = transformers.Qwen3VLConfig(vision_config={"out_hidden_size": 4096}).to_dict()
    assert Qwen3VLConfig.from_hf(bare) == Qwen3VLConfig.from_hf(theirs)


def test_experts_in_both_dialects():
    """The hub counts `num_experts`, transformers 5 `num_local_experts`; what both leave out has other defaults."""
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [2, 3]}
    published = {**PUBLISHED, **MOE, "text_config": PUBLISHED["text_config"] | experts | {"norm_topk_prob": True}}
    config = Qwen3VLConfig.from_hf(published)
    assert config.text.moe == MoEConfig(
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=(2, 3)
    )
    theirs = transformers.Qwen3VLMoeConfig.from_dict(copy.deepcopy(published)).to_dict()
    assert "num_experts" not in theirs["text_config"]
    assert Qwen3VLConfig.from_hf(theirs) == config
    bare = {**MOE, "vision_config": {"out_hidden_size": 2048}}
    theirs = transformers.Qwen3VLMoeConfig(vision_config={"out_hidden_size": 2048}).to_dict()
    assert Qwen3VLConfig.from_hf(bare) == Qwen3VLConfig.from_hf(theirs)


def test_layers_of_one_kind_are_one_run():
    moe = MoEConfig(decoder_sparse_step=2, mlp_only_layers=(3,))
    runs = TextConfig(num_hidden_layers=7, moe=moe).layer_runs
    assert [(list(run.layers), run.moe) for run in runs] == [
        ([0], None),
        ([1], moe),  # "every second" counts from one
        ([2, 3, 4], None),
        ([5], moe),
        ([6], None),
    ]
    assert TextConfig(num_hidden_layers=3).layer_runs == (LayerRun(range(3), None),)


def test_deepstack_takes_layers_in_their_order_and_ignores_those_there_are_not():
    vision = VisionConfig(depth=6, deepstack_visual_indexes=(4, 1, 9))
    assert vision.deepstack_taps == ((1, 1), (4, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "'qwen2_5_vl'; only 'qwen3_vl'"),
        ({"model_type": "qwen3_moe"}, "only 'qwen3_vl' and 'qwen3_vl_moe'"),
        ({**MOE, "text_config": {"norm_topk_prob": False}}, "norm_topk_prob false"),
        ({**MOE, "text_config": {"num_experts_per_tok": 61}}, "num_experts_per_tok 61 is not between 1 and num_exp"),
        ({**MOE, "text_config": {"decoder_sparse_step": 0}}, "decoder_sparse_step is 0"),
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
