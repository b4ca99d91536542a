import dataclasses
import json
import math
from pathlib import Path

import pytest

from w2s_jax.errors import InputError
from w2s_jax.models.config_json import config_from_hf, config_to_hf
from w2s_jax.models.load import load_config
from w2s_jax.models.parameters import declared
from w2s_jax.ops.attention import Rope

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}


NEOX = LLAMA | {"model_type": "gpt_neox"}
OPT = LLAMA | {"model_type": "opt", "ffn_dim": 48, "max_position_embeddings": 64}
QWEN = LLAMA | {"model_type": "qwen2", "use_sliding_window": True}
NAN = math.nan
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
ORIGINAL = "original_max_position_embeddings"


def read(**changes):
    return config_from_hf(LLAMA | changes)


def golden(case, name="config.json"):
    return json.loads((GOLDEN / case / name).read_text())


@pytest.mark.parametrize("case", CASES)
def test_both_styles_of_config_json_say_the_same(case):
    assert config_from_hf(golden(case)) == config_from_hf(golden(case, "config_2024.json"))


@pytest.mark.parametrize("case", CASES)
def test_to_hf_is_read_back_as_the_same_config(case):
    config = config_from_hf(golden(case))
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": Rope(theta=5e5)},
        {"rope": Rope(kind="linear", factor=2.0)},
        {"rope": Rope(1e6, "yarn", factor=4.0, original_max_positions=32, truncate=False)},
        {"rope": Rope(1e6, "yarn", factor=4.0, original_max_positions=32, attention_factor=0.5)},
        {"rope": Rope(5e5, "llama3", 8.0, 1.0, 4.0, original_max_positions=32)},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"tied_embeddings": True, "head_width": 6, "kv_heads": 2},
        {"eos_ids": (), "bos_id": None, "pad_id": 3},
        {"eos_ids": (5, 6, 7), "activation": "relu"},
    ],
)
def test_every_kind_of_llama_survives_config_json(changes):
    config = dataclasses.replace(read(), **changes)
    assert config_from_hf(config_to_hf(config)) == config


def test_defaults_of_llama():
    config = read()
    assert (config.kv_heads, config.head_width, config.max_positions) == (4, 8, 2048)
    assert (config.norm_epsilon, config.rope, config.activation) == (1e-6, Rope(), "silu")
    assert (config.tied_embeddings, config.bos_id, config.eos_ids) == (False, 1, (2,))
    assert config.sliding_windows == ()


def test_defaults_of_gpt2():
    config = config_from_hf(GPT2)
    assert (config.mlp_width, config.activation, config.norm) == (128, "gelu_tanh", "layer")
    assert (config.position, config.gated_mlp, config.tied_embeddings) == ("learned", False, True)
    assert config.qkv_bias
    assert config.out_bias
    assert config.mlp_bias
    assert config.eos_ids == (50256,)


def test_defaults_of_mistral():
    config = read(model_type="mistral", num_attention_heads=16)
    assert (config.kv_heads, config.sliding_windows) == (8, (4096,) * 4)
    assert (
        read(model_type="mistral", num_key_value_heads=4, sliding_window=None).sliding_windows == ()
    )


def test_gemma_ties_embeddings_and_means_tanh_by_gelu():
    config = read(model_type="gemma", hidden_act="gelu", hidden_activation=None)
    assert config.tied_embeddings
    assert config.activation == "gelu_tanh"
    assert (config.head_width, config.norm_offset) == (256, 1.0)
    assert config.embedding_multiplier == 32**0.5


def test_gemma2_alternates_windows_from_the_first_layer():
    config = read(model_type="gemma2", sliding_window=7, query_pre_attn_scalar=144)
    assert config.sliding_windows == (7, None, 7, None)
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert config.attention_scale == 144**-0.5
    assert config.norm_placement == "sandwich"


# What config.json of gemma-3-4b says of its text part.
GEMMA3 = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


def test_gemma3_is_its_text_part_with_positions_as_they_are_after_the_scaling():
    config = config_from_hf(GEMMA3)
    assert (config.architecture, config.eos_ids) == ("gemma3_text", (1, 106))
    assert (config.heads, config.kv_heads, config.vocab_size) == (8, 4, 262208)
    assert config.sliding_windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert config.rope == Rope(1e6, "linear", factor=8.0)
    assert (config.sliding_rope, config.max_positions) == (Rope(1e4), 131072)
    assert config_from_hf(config_to_hf(config)) == config


def test_ropes_and_windows_that_follow_from_the_number_of_a_layer():
    olmo = read(model_type="olmo3", rope_scaling=YARN | {ORIGINAL: 512})
    assert olmo.sliding_windows == (4096,) * 3 + (None,)
    assert (olmo.rope.kind, olmo.sliding_rope) == ("yarn", Rope(5e5))
    assert read(model_type="olmo3").sliding_rope is None
    smol = read(model_type="smollm3", use_sliding_window=True, sliding_window=7)
    assert (smol.rope_layers, smol.sliding_windows) == ((True,) * 3 + (False,), (None,) * 3 + (7,))
    assert read(model_type="smollm3", no_rope_layers=[1] * 6).rope_layers == ()


def sizes(kind, width, mlp, layers, heads, kv_heads, vocabulary, tied=False, **other):
    return other | {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# Sizes in config.json, and how many numbers the safetensors hold.
PUBLISHED = {
    "Qwen1.5-0.5B": (sizes("qwen2", 1024, 2816, 24, 16, 16, 151936, True), 463_987_712),
    "DeepSeek-R1-Distill-Qwen-1.5B": (sizes("qwen2", 1536, 8960, 28, 12, 2, 151936), 1_777_088_000),
    "DeepSeek-R1-Distill-Llama-8B": (
        sizes("llama", 4096, 14336, 32, 32, 8, 128256, rope_scaling=LLAMA3 | {ORIGINAL: 8192}),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (sizes("llama", 2048, 8192, 16, 32, 8, 128256, True), 1_235_814_400),
    "TinyLlama-1.1B": (sizes("llama", 2048, 5632, 22, 32, 4, 32000), 1_100_048_384),
    "Yi-6B": (sizes("llama", 4096, 11008, 32, 32, 4, 64000), 6_061_035_520),
    "deepseek-llm-7b": (sizes("llama", 4096, 11008, 30, 32, 32, 102400), 6_910_365_696),
    "gemma-3-270m": (sizes("gemma3_text", 640, 2048, 18, 4, 1, 262144, True), 268_098_176),
    "OLMo-1B": (sizes("olmo", 2048, 8192, 16, 16, 16, 50304, True), 1_176_764_416),
    "OLMo-2-1B": (sizes("olmo2", 2048, 8192, 16, 16, 16, 100352), 1_484_916_736),
    "Olmo-3-7B": (sizes("olmo3", 4096, 11008, 32, 32, 32, 100278), 7_298_011_136),
    "SmolLM3-3B": (sizes("smollm3", 2048, 11008, 36, 16, 4, 128256, True), 3_075_098_624),
    "granite-3.0-2b": (sizes("granite", 2048, 8192, 40, 32, 8, 49155, True), 2_533_531_648),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters(name):
    hf, numbers = PUBLISHED[name]
    shapes = [shape for shape, _ in declared(config_from_hf(hf)).values()]
    assert sum(map(math.prod, shapes)) == numbers


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_windows_begin_after_the_full_layers(architecture):
    windowed = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    assert read(model_type=architecture, **windowed).sliding_windows == (None, None, None, 9)
    kinds = ["full_attention", "sliding_attention"] * 2
    explicit = read(model_type=architecture, **windowed, layer_types=kinds)
    assert explicit.sliding_windows == (None, 9, None, 9)
    off = read(model_type=architecture, **windowed | {"use_sliding_window": False})
    assert off.sliding_windows == ()


def test_qwen2_has_biases_and_qwen3_query_key_norms():
    assert (read(model_type="qwen2").qkv_bias, read(model_type="qwen2").out_bias) == (True, False)
    assert read(model_type="qwen3").query_key_norm == "head"
    assert read(model_type="qwen3").head_width == 128


def test_end_of_sequence_ids_are_merged_with_the_generation_config():
    config = config_from_hf(LLAMA | {"eos_token_id": 9}, {"eos_token_id": [7, 9]})
    assert config.eos_ids == (9, 7)
    assert config_from_hf(LLAMA | {"eos_token_id": [3, 4]}).eos_ids == (3, 4)
    assert read(pad_token_id=-1).pad_id is None


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scaling_under_both_names_of_its_kind(key):
    config = read(rope_theta=500.0, rope_scaling={key: "linear", "factor": 3})
    assert config.rope == Rope(500.0, "linear", 3.0)


def scaled(kind, *, rope_theta=1e4, **fields):
    """LLAMA with a rope of this kind, sound but for these fields."""
    sound = {"linear": {"factor": 2.0}, "llama3": LLAMA3, "yarn": YARN, "longrope": {}}[kind]
    return LLAMA | {"rope_theta": rope_theta, "rope_scaling": {"type": kind} | sound | fields}


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 64),
        (YARN | {ORIGINAL: 64}, 256),
        (YARN | {ORIGINAL: 8}, 64),
        (YARN, 256),
        ({"rope_type": "yarn", ORIGINAL: 16}, 64),
        ({"type": "linear", "factor": 2.5}, 160),
        ({"type": "linear", "factor": 4.0, ORIGINAL: 16}, 64),
        (LLAMA3 | {ORIGINAL: 64}, 512),
        (LLAMA3 | {ORIGINAL: 8}, 64),
        ({"type": "dynamic", "factor": 4.0}, 64),
        ({"type": "dynamic", "factor": 4.0, ORIGINAL: 32}, 32),
    ],
)
def test_positions_are_those_that_the_scaled_rope_reaches(scaling, positions):
    config = read(max_position_embeddings=64, rope_scaling=scaling)
    assert config.max_positions == positions
    # Written again, the file says the same: positions are not stretched twice.
    assert config_from_hf(config_to_hf(config)) == config


def test_dynamic_scaling_is_the_plain_rope_within_its_positions():
    scaling = {"type": "dynamic", "factor": 4.0}
    assert read(rope_theta=5e5, rope_scaling=scaling).rope == Rope(5e5)


def test_yarn_takes_its_attention_factor_from_mscale():
    scaling = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5}
    rope = read(rope_scaling=scaling, original_max_position_embeddings=64).rope
    assert rope.attention_factor == pytest.approx(1.3688879 / 1.1844440)
    assert rope.original_max_positions == 64


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (LLAMA | {"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gpt2, "),
        ({}, "model_type None is not supported"),
        (LLAMA | {"hidden_act": "mish"}, "activation 'mish' is not supported; supported: silu"),
        (
            LLAMA | {"rope_scaling": {"type": "wavy", "factor": 2.0}},
            "rope kind 'wavy' is not supported; supported: default, linear, llama3, yarn, longrope",
        ),
        (scaled("longrope", factor=2.0), "rope_scaling.short_factor is None; it must be a list"),
        (
            scaled("longrope", factor=2.0, short_factor=[1.0], long_factor=[2.0]),
            "longrope has 1 short and 1 long factors; 8 entries of a head are rotated, which take",
        ),
        (NEOX | {"rotary_pct": 0.4}, "3 of 8 entries of a head are rotated; it must be an even"),
        (OPT | {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is set"),
        (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is off"),
        (OPT | {"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0; it must be a positive"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "factor is None; it must be a number"),
        (
            LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters differs by layer",
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"hidden_size": "32"}, "hidden_size is '32'; it must be a positive whole number"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (LLAMA | {"rms_norm_eps": None}, "rms_norm_eps is None; it must be a number"),
        (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be one token id"),
        ({"model_type": "llama", "vocab_size": 3}, "hidden_size is missing"),
        (LLAMA | {"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads"),
        (LLAMA | {"head_dim": 5}, "even width, not 5"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config is set"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention is set"),
        ({"model_type": "gemma3"}, "a gemma3 with no text_config is not supported"),
        (GEMMA3 | {"text_config": LLAMA}, "a text_config of 'llama' is not supported"),
        (LLAMA | {"clip_qkv": 8.0}, "clip_qkv is set"),
        (LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 2, 1, 1]}, "a list of 0 or 1 for"),
        (LLAMA | {"model_type": "granite", "logits_scaling": 0}, "logit_divisor is 0.0; it must"),
        (GPT2 | {"n_head": 5}, "n_embd is 32, not a multiple of n_head, 5"),
        (LLAMA | {"rope_theta": 0}, "rope_theta is 0; it must be a number above 0"),
        (LLAMA | {"rope_theta": NAN}, "rope_theta is nan; it must be a number above 0"),
        (scaled("yarn", factor=2, rope_theta=1), "rope_theta is 1; it must be a number above 1"),
        (LLAMA | {"rope_scaling": "x"}, "rope_scaling is 'x'; it must be a mapping such as {"),
        (LLAMA | {"rope_parameters": [2.0]}, "rope_parameters is [2.0]; it must be a mapping"),
        *(
            (scaled(kind, factor=factor), f"rope_scaling.factor is {factor}; it must be a number")
            for kind in ("linear", "llama3", "yarn")
            for factor in (NAN, math.inf, -4, 0, 0.5)
        ),
        (
            scaled("llama3", high_freq_factor=1),
            "high_freq_factor is 1; it must be a number above",
        ),
        (scaled("yarn", beta_slow=0), "rope_scaling.beta_slow is 0; it must be a number above 0"),
        (scaled("yarn", attention_factor=NAN), "attention_factor is nan; it must be a number abov"),
        (scaled("yarn", **{ORIGINAL: -3}), f"rope_scaling.{ORIGINAL} is -3; it must be a positive"),
        (LLAMA | {"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a number of at least 0"),
        (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        (GPT2 | {"layer_norm_epsilon": NAN}, "layer_norm_epsilon is nan; it must be a number of"),
        (LLAMA | {"num_attention_heads": -4}, "num_attention_heads is -4; it must be a positive"),
        (LLAMA | {"vocab_size": "100"}, "vocab_size is '100'; it must be a positive whole number"),
        (LLAMA | {"hidden_act": ["silu"]}, "activation ['silu'] is not supported; supported: silu"),
        (LLAMA | {"tie_word_embeddings": "false"}, "is 'false'; it must be true or false"),
        (LLAMA | {"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1; it must"),
        (QWEN | {"max_window_layers": "2"}, "max_window_layers is '2'; it must be a whole number"),
        (QWEN | {"layer_types": 4}, "layer_types is 4; it must be a list that names one of full"),
        (
            LLAMA | {"model_type": "gemma2", "final_logit_softcapping": 0},
            "final_logit_softcapping is 0; it must be a number above 0",
        ),
        (
            LLAMA | {"model_type": "gemma2", "layer_types": ["full_attention"]},
            "a list that names one of full_attention, sliding_attention for each of 4 layers",
        ),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(hf, message):
    with pytest.raises(InputError) as error:
        config_from_hf(hf)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"sliding_windows": (4, None, None, None)}, "sliding_windows"),
        ({"query_key_norm": "head"}, "query_key_norm"),
        ({"attention_scale": 1.0, "final_softcap": 5.0}, "attention_scale, final_softcap"),
        ({"qkv_bias": True}, "out_bias"),
    ],
)
def test_what_config_json_cannot_express_is_named(changes, fields):
    with pytest.raises(InputError, match=f"llama cannot express this model's {fields}"):
        config_to_hf(dataclasses.replace(read(), **changes))


def test_an_architecture_of_ones_own_has_no_config_json():
    with pytest.raises(InputError, match="architecture 'mine' has no config.json"):
        config_to_hf(dataclasses.replace(read(), architecture="mine"))


def test_windows_come_one_per_layer():
    with pytest.raises(InputError, match="2 sliding windows for 4 layers"):
        dataclasses.replace(read(), sliding_windows=(4, None))


def test_windows_that_are_all_open_are_none():
    assert dataclasses.replace(read(), sliding_windows=(None,) * 4) == read()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": "x"},
        {"hidden_act": ["silu"]},
        {"num_attention_heads": 64, "num_key_value_heads": 64},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 0},
    ],
)
def test_fields_of_the_wrong_type_or_size_are_one_line(tmp_path, changes):
    hf = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4} | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(InputError, match=r"config\.json") as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)
