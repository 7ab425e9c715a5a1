import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from buddy_kernels import RotaryScaling, apply_rotary, apply_rotary_reference, rotary_cos_sin, rotary_inv_freq
from tolerances import assert_close, assert_far

ORIGINAL = 8192
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
YARN = {"original_max_position_embeddings": ORIGINAL}
PUBLISHED = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    {"rope_type": "llama3", "factor": 32.0, **LLAMA3 | {"low_freq_factor": 1.5, "high_freq_factor": 6.0}},
    {"rope_type": "yarn", "factor": 4.0, **YARN},
    {"rope_type": "yarn", "factor": 1.0, **YARN},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, **YARN},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, **YARN},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, **YARN},
    {"rope_type": "yarn", "factor": 16.0, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, **YARN},
]


def llama_config(head_dim: int, theta: float, rope: dict[str, object]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **rope},
    )


def scaling_of(rope: dict[str, object]) -> RotaryScaling:
    renamed = {"rope_type": "kind", "original_max_position_embeddings": "original_max_position"}
    return RotaryScaling(**{renamed.get(name, name): value for name, value in rope.items()})


@pytest.mark.parametrize("rope", PUBLISHED, ids=lambda rope: f"{rope['rope_type']}-{len(rope)}-{rope['factor']:g}")
@pytest.mark.parametrize(("head_dim", "theta"), [(32, 10_000.0), (64, 500_000.0), (128, 1_000_000.0)])
def test_scaled_frequencies_equal_those_of_transformers(rope, head_dim, theta):
    want, want_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](llama_config(head_dim, theta, rope))
    got, got_factor = rotary_inv_freq(head_dim, theta, scaling_of(rope))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert got_factor == want_factor


def test_plain_frequencies_and_angles_equal_those_of_transformers():
    inv_freq, factor = rotary_inv_freq(64, 10_000.0)
    rotary = LlamaRotaryEmbedding(llama_config(64, 10_000.0, {"rope_type": "default"}))
    positions = torch.tensor([0, 1, 62, 256, 8191])
    want_cos, want_sin = rotary(torch.zeros(1), positions[None])
    cos, sin = rotary_cos_sin(positions, inv_freq, factor)
    assert torch.equal(inv_freq, rotary.inv_freq)
    assert cos.shape == (5, 32)
    assert_close(torch.cat((cos, cos), -1), want_cos[0], width=1)
    assert_close(torch.cat((sin, sin), -1), want_sin[0], width=1)
    next_cos, _ = rotary_cos_sin(positions + 1, inv_freq, factor)
    assert_far(next_cos, cos, width=1)


@pytest.mark.parametrize("apply", [apply_rotary, apply_rotary_reference], ids=["dispatched", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 63, 257])
def test_rotation_matches_llama(apply, dtype, num_rows):
    torch.manual_seed(num_rows)
    x = torch.randn(num_rows, 3, 32).to(dtype)
    inv_freq, factor = rotary_inv_freq(32, 10_000.0, scaling_of(PUBLISHED[3]))
    cos, sin = rotary_cos_sin(torch.randint(0, 4096, (num_rows,)), inv_freq, factor)
    got = apply(x, cos, sin)
    doubled = (torch.cat((table, table), -1) for table in (cos, sin))  # [N, Dh], as transformers keeps them
    want, _ = apply_rotary_pos_emb(x.float(), x.float(), *doubled, unsqueeze_dim=1)
    assert_close(got, want.to(dtype), width=2)
    assert_far(apply(x, cos, -sin), want.to(dtype), width=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "longrope", "factor": 2.0}, "kind is 'longrope', allowed are linear, llama3, yarn"),
        ({"kind": "linear", "factor": 0.0}, "factor is 0.0, allowed is more than 0"),
        ({"kind": "yarn", "factor": 2.0}, "original_max_position is None, allowed for 'yarn' is 1 or more"),
        (
            {"kind": "llama3", "factor": 2.0, "original_max_position": 9, "low_freq_factor": 4.0},
            "are 4.0, 4.0",
        ),
        ({"kind": "yarn", "factor": 2.0, "original_max_position": 9, "beta_slow": 64.0}, "are 64.0, 32.0"),
    ],
)
def test_bad_scaling_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RotaryScaling(**fields)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="head_dim is 7, allowed is a positive even number"):
        rotary_inv_freq(7, 10_000.0)
    with pytest.raises(ValueError, match="theta is 1, allowed is more than 1"):
        rotary_inv_freq(8, 1)
    with pytest.raises(ValueError, match=r"cos has shape \[2, 8\], allowed is \[2, 4\]"):
        apply_rotary(torch.zeros(2, 1, 8), torch.zeros(2, 8), torch.zeros(2, 8))
