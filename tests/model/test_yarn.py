"""YaRN: published configurations against transformers' own functions, tables against the definition in float64."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from nmoe.model.rope import frequencies, rotate_halves, rotate_interleaved, table
from nmoe.registry.attention import Gqa, LocalGqa, LocalWindow, Mla
from nmoe.registry.rope import Yarn

CPU = torch.device("cpu")
MLA = {"num_heads": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 128, "v_head_dim": 8}
GQA = {"num_heads": 1, "num_kv_heads": 1}


def mla(theta, **scaling):
    return Mla(qk_rope_head_dim=64, rope_theta=theta, rope_scaling=Yarn(**scaling), **MLA)


def gqa(head_dim, theta, **scaling):
    return Gqa(head_dim=head_dim, rope_theta=theta, rope_scaling=Yarn(**scaling), **GQA)


# name: (our attention, what its config.json has under rope_scaling, tokens of its context)
PUBLISHED = {
    "DeepSeek-V2": (
        mla(1e4, factor=40.0, original_context=4096, mscale=0.707, mscale_all_dim=0.707),
        {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
         "original_max_position_embeddings": 4096}, 163840,
    ),
    "DeepSeek-V3": (
        mla(1e4, factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0),
        {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
         "original_max_position_embeddings": 4096}, 163840,
    ),
    "Kimi-K2": (
        mla(5e4, factor=32.0, original_context=4096, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
        {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
         "original_max_position_embeddings": 4096}, 131072,
    ),
    "Qwen3": (
        gqa(128, 1e6, factor=4.0, original_context=32768),
        {"factor": 4.0, "original_max_position_embeddings": 32768}, 131072,
    ),
    "GPT-OSS": (
        gqa(64, 1.5e5, factor=32.0, original_context=4096, truncate=False),
        {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
         "original_max_position_embeddings": 4096}, 131072,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_other_kernels(monkeypatch):
    """The library looks for a distribution called kernels, and must not find the folder of that name."""
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != root])


def library_rotary(name):
    """The library's rotary module of a published model, and its config."""
    from transformers import DeepseekV3Config, GptOssConfig, Qwen3MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    ours, scaling, context = PUBLISHED[name]
    said = {"rope_type": "yarn", "rope_theta": ours.rope_theta, **scaling}
    if name == "Qwen3":
        config = Qwen3MoeConfig(rope_parameters=said, head_dim=128, max_position_embeddings=context)
        return Qwen3MoeRotaryEmbedding(config), config
    if name == "GPT-OSS":
        config = GptOssConfig(rope_parameters=said, max_position_embeddings=context)
        return GptOssRotaryEmbedding(config), config
    config = DeepseekV3Config(rope_parameters=said, max_position_embeddings=context)
    return DeepseekV3RotaryEmbedding(config), config


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_factors_are_the_library_s(name):
    """Its frequencies are float32: the relative difference is a few of 2^-24."""
    ours, _, _ = PUBLISHED[name]
    rotary, _ = library_rotary(name)
    found = frequencies(ours.rotary_dim, ours.rope_theta, ours.build_rope_scaling())
    plain = frequencies(ours.rotary_dim, ours.rope_theta, None)
    assert ((found - rotary.inv_freq.double()).abs() / found).max() < 5e-7
    assert ours.rope_scaling.rotary_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    assert found[0] == plain[0]
    assert found[-1] == pytest.approx(plain[-1].item() / ours.rope_scaling.factor, rel=1e-12)


@pytest.mark.parametrize("truncate", [True, False])
def test_frequencies_of_many_sizes_are_the_library_s(truncate):
    """Also where the ramp begins before the first pair or ends behind the last."""
    from transformers import Qwen3MoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    before = behind = 0
    sizes = itertools.product((8, 16, 64), (50.0, 1e4), (64, 2048, 32768), ((32.0, 1.0), (4.0, 4.0), (8.0, 0.25)))
    for dim, theta, original, (fast, slow) in sizes:
        spec = Yarn(factor=6.5, original_context=original, beta_fast=fast, beta_slow=slow, truncate=truncate)
        if list(spec.owner_problems("", rotary_dim=dim, theta=theta, mla=False)):
            continue
        said = {
            "rope_type": "yarn", "rope_theta": theta, "factor": 6.5, "original_max_position_embeddings": original,
            "beta_fast": fast, "beta_slow": slow, "truncate": truncate,
        }  # fmt: skip
        config = Qwen3MoeConfig(rope_parameters=said, head_dim=dim, max_position_embeddings=original)
        wanted, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        found = frequencies(dim, theta, spec.build(rotary_dim=dim, theta=theta))
        assert ((found - wanted.double()).abs() / found).max() < 1e-6, said
        assert spec.rotary_factor == pytest.approx(factor, rel=1e-12)
        low, high = spec.ramp(dim, theta)
        before, behind = before + (low == 0), behind + (high > dim / 2 - 1)
    assert before >= 5 and behind >= 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_cosines_and_sines_are_the_library_s_to_the_end_of_the_context(name):
    """Its angles are float32, so an angle a is off by a few of a * 2^-24, and with it cosine and sine."""
    ours, scaling, context = PUBLISHED[name]
    original = scaling["original_max_position_embeddings"]
    rotary, _ = library_rotary(name)
    positions = torch.tensor([0, 1, 1000, original - 1, original, original + 1, 3 * original + 17, context - 1])
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions[None])
    found = table(context, ours.rotary_dim, ours.rope_theta, ours.build_rope_scaling(), CPU)[positions]
    factor = ours.rope_scaling.rotary_factor
    angle = positions[:, None] * frequencies(ours.rotary_dim, ours.rope_theta, ours.build_rope_scaling())
    bound = factor * (angle * 4 * 2.0**-24 + 4 * 2.0**-24)
    pairs = found.shape[1]
    assert bool(((found.real - cos[0, :, :pairs]).abs() <= bound).all())
    assert bool(((found.imag - sin[0, :, :pairs]).abs() <= bound).all())


@pytest.mark.parametrize("name", ["DeepSeek-V2", "DeepSeek-V3", "Kimi-K2"])
def test_the_scale_of_scores_is_the_library_s(name):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    ours, _, _ = PUBLISHED[name]
    _, config = library_rotary(name)
    with torch.device("meta"):
        theirs = DeepseekV3Attention(config, layer_idx=0)
        built = ours.build(hidden_size=64, norm_eps=1e-6, window=None, sinks=False)
    assert built.score_scale == pytest.approx(theirs.scaling, rel=1e-12)


def angle_of(position, pair, *, dim, theta, factor, original, fast, slow):
    """The definition for one pair: its angle at a position, in Python's float64."""
    frequency = theta ** (-2 * pair / dim)
    ends = [dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow)]
    keep = 1 - min(max((pair - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0)
    return position * ((1 - keep) * frequency / factor + keep * frequency)


@pytest.mark.parametrize("convention", ["interleaved", "halves"])
def test_a_rotation_and_its_gradient_are_the_definition_s(convention):
    """Every pair at 300 positions, of which 64 were trained on."""
    dim, theta = 16, 300.0
    spec = Yarn(factor=6.0, original_context=64, beta_fast=5.0, beta_slow=0.7, truncate=False, attention_factor=1.3)
    x = torch.randn(2, 300, 3, dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dy = torch.randn(2, 300, 3, dim, generator=torch.Generator().manual_seed(2))
    rotate = {"interleaved": rotate_interleaved, "halves": rotate_halves}[convention]
    y = rotate(x, theta, spec.build(rotary_dim=dim, theta=theta))
    (dx,) = torch.autograd.grad(y, x, dy)

    sizes = {"dim": dim, "theta": theta, "factor": 6.0, "original": 64, "fast": 5.0, "slow": 0.7}
    angles = [[angle_of(p, j, **sizes) for j in range(dim // 2)] for p in range(300)]
    angle = torch.tensor(angles, dtype=torch.float64)
    x64 = x.detach().double().requires_grad_()
    split = (-1, 2) if convention == "interleaved" else (2, -1)
    axis = -1 if convention == "interleaved" else -2
    a, b = x64.unflatten(-1, split).unbind(axis)
    cos, sin = 1.3 * angle.cos()[:, None], 1.3 * angle.sin()[:, None]
    expected = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=axis).flatten(-2)
    (expected_dx,) = torch.autograd.grad(expected, x64, dy.double())
    # float32 tables and products: a few of 2^-24 of values up to 5.
    assert (y - expected).abs().max() < 2e-6 and (dx - expected_dx).abs().max() < 2e-6


def test_tables_are_float64_rounded_once():
    """Far out float32 angles would be wrong in the third digit."""
    position, spec = 150_000, PUBLISHED["DeepSeek-V3"][0]
    row = table(position + 1, 64, 1e4, spec.build_rope_scaling(), CPU)[position]
    low, high = spec.rope_scaling.ramp(64, 1e4)
    for j in (0, 5, 11, 17, 23, 31):
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        frequency = 1e4 ** (-2 * j / 64)
        angle = position * (frequency * (1 - ramp) + frequency / 40 * ramp)
        assert abs(complex(row[j]) - complex(math.cos(angle), math.sin(angle))) < 1e-7


def test_it_belongs_to_the_attention_that_names_it(make_spec, build_model):
    """A window shares the global layers' scaling; local layers with sizes of their own have their own or none."""
    scaling, sizes = Yarn(factor=4.0, original_context=16), {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    own = Yarn(factor=2.0, original_context=32, truncate=False)
    for local, expected in (
        (LocalWindow(window=7, global_every=2), scaling),
        (LocalGqa(window=7, global_every=2, **sizes), None),
        (LocalGqa(window=7, global_every=2, rope_scaling=own, **sizes), own),
    ):
        model = build_model(make_spec(Gqa(rope_scaling=scaling, local=local, **sizes)))
        for index, layer in enumerate(model.layers):
            spec = scaling if index in (1, 2) else expected  # the second, and the last
            built = None if spec is None else spec.build(rotary_dim=16, theta=1e4)
            assert layer.attention.rope_scaling == built
