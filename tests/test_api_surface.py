"""The public surface: names, signatures and defaults that other people's code relies on."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import mamba_ssm
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.ops.causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.layer_norm import RMSNorm, rms_norm_fn
from mamba_ssm.utils.hf import load_state_dict_hf

NORM_REST = (
    "x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, prenorm=False"
)
INNER = (
    "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
    "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, "
    "C_proj_bias=None, delta_softplus=True"
)
SCAN = (
    "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False"
)
CONV = (
    "x, weight, bias=None, initial_states=None, return_final_states=False, final_states_out=None, "
    "activation=None"
)
STATE_UPDATE = (
    "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None"
)
BLOCK = "n_layer, d_intermediate=0, vocab_size, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None"
SAMPLING = "top_k=1, top_p=0.0, min_p=0.0, temperature=1.0"

# module -> name -> the historical part of its signature, with defaults; ours come after it.
SIGNATURES = {
    "ops.selective_scan_interface": {
        "selective_scan_fn": SCAN,
        "selective_scan_ref": SCAN,
        "mamba_inner_fn": INNER
        + ", checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
        "b_c_dt_rms_eps=1e-06",
        "mamba_inner_ref": INNER,
        "rms_norm_forward": "x, weight, bias, eps=1e-06, is_rms_norm=True",
    },
    "ops.triton.selective_state_update": {
        "selective_state_update": STATE_UPDATE,
        "selective_state_update_ref": STATE_UPDATE.replace(", state_batch_indices=None", ""),
    },
    "ops.triton.layer_norm": {
        "layer_norm_fn": f"x, weight, bias, residual=None, {NORM_REST}, residual_in_fp32=False, "
        "is_rms_norm=False, return_dropout_mask=False",
        "rms_norm_fn": f"x, weight, bias, residual=None, {NORM_REST}, residual_in_fp32=False, "
        "return_dropout_mask=False",
        "layer_norm_linear_fn": "x, norm_weight, norm_bias, linear_weight, linear_bias, "
        "residual=None, eps=1e-06, prenorm=False, residual_in_fp32=False, is_rms_norm=False",
        "layer_norm_ref": f"x, weight, bias, residual=None, {NORM_REST}, dropout_mask=None, "
        "dropout_mask1=None, upcast=False",
        "rms_norm_ref": f"x, weight, bias, residual=None, {NORM_REST}, dropout_mask=None, "
        "dropout_mask1=None, upcast=False",
        "RMSNorm": "hidden_size, eps=1e-05, dropout_p=0.0, device=None, dtype=None",
        "RMSNorm.forward": "self, x, residual=None, prenorm=False, residual_in_fp32=False",
    },
    "ops.triton.layernorm": {
        "layer_norm_fn": "x, weight, bias, residual=None, eps=1e-06, prenorm=False, "
        "residual_in_fp32=False, is_rms_norm=False",
        "rms_norm_fn": "x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, "
        "eps=1e-06",
    },
    "ops.causal_conv1d": {
        "causal_conv1d_fn": CONV.replace("bias=None, ", "bias=None, seq_idx=None, "),
        "causal_conv1d_ref": CONV,
        "causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, "
        "cache_seqlens=None, conv_state_indices=None",
        "causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
    },
    "modules.mamba_simple": {
        "Mamba": "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, "
        "dt_max=0.1, dt_init='random', dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, "
        "bias=False, use_fast_path=True, layer_idx=None, device=None, dtype=None",
        "Mamba.forward": "self, hidden_states, inference_params=None",
        "Mamba.step": "self, hidden_states, conv_state, ssm_state",
        "Mamba.allocate_inference_cache": "self, batch_size, max_seqlen, dtype=None",
        "Mamba._get_states_from_cache": "self, inference_params, batch_size, "
        "initialize_states=False",
        "Block": "dim, mixer_cls, mlp_cls=Identity, norm_cls=LayerNorm, fused_add_norm=False, "
        "residual_in_fp32=False",
    },
    "modules.block": {
        "Block.forward": "self, hidden_states, residual=None, inference_params=None",
        "Block.allocate_inference_cache": "self, batch_size, max_seqlen, dtype=None",
    },
    "modules.mlp": {
        "GatedMLP": "in_features, hidden_features=None, out_features=None, activation=silu, "
        "bias=False, multiple_of=128, device=None, dtype=None",
    },
    "modules.mha": {
        "MHA": "embed_dim, num_heads, num_heads_kv=None, head_dim=None, mlp_dim=0, "
        "qkv_proj_bias=True, out_proj_bias=True, softmax_scale=None, causal=False, "
        "layer_idx=None, d_conv=0, rotary_emb_dim=0, rotary_emb_base=10000.0, "
        "rotary_emb_interleaved=False, device=None, dtype=None",
    },
    "models.mixer_seq_simple": {
        "create_block": "d_model, d_intermediate=0, ssm_cfg=None, attn_layer_idx=None, "
        "attn_cfg=None, norm_epsilon=1e-05, rms_norm=False, residual_in_fp32=False, "
        "fused_add_norm=False, layer_idx=None, device=None, dtype=None",
        "_init_weights": "module, n_layer, initializer_range=0.02, "
        "rescale_prenorm_residual=True, n_residuals_per_layer=1",
        "MixerModel.forward": "self, input_ids, inference_params=None",
        "MambaLMHeadModel": "config, initializer_cfg=None, device=None, dtype=None",
        "MambaLMHeadModel.forward": "self, input_ids, position_ids=None, inference_params=None, "
        "num_last_tokens=0",
        "MambaLMHeadModel.from_pretrained": "pretrained_model_name, device=None, dtype=None",
        "MambaLMHeadModel.save_pretrained": "self, save_directory",
        "MambaLMHeadModel.tie_weights": "self",
    },
    "models.config_mamba": {
        "MambaConfig": "d_model=2560, d_intermediate=0, n_layer=64, vocab_size=50277, "
        "ssm_cfg={}, attn_layer_idx=[], attn_cfg={}, rms_norm=True, residual_in_fp32=True, "
        "fused_add_norm=True, pad_vocab_size_multiple=8, tie_embeddings=True",
    },
    "utils.generation": {
        "InferenceParams": "max_seqlen, max_batch_size, seqlen_offset=0, batch_size_offset=0, "
        "key_value_memory_dict={}, lengths_per_sample=None",
        "InferenceParams.reset": "self, max_seqlen, max_batch_size",
        "sample": f"logits, {SAMPLING}",
        "modify_logits_for_min_p_filtering": "logits, min_p",
        "modify_logits_for_top_k_filtering": "logits, top_k",
        "modify_logits_for_top_p_filtering": "logits, top_p",
        "modify_logit_for_repetition_penalty": "logits, prev_output_tokens, repetition_penalty=1.0",
        "decode": f"input_ids, model, max_length, {SAMPLING}, repetition_penalty=1.0, "
        "eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, "
        "enable_timing=False, output_scores=False, streamer=None",
        "GenerationMixin.generate": f"self, input_ids, max_length, {SAMPLING}, "
        "return_dict_in_generate=False, output_scores=False",
        "update_graph_cache": "model, cache, batch_size, seqlen_og, max_seqlen, "
        "decoding_seqlens=(1,), dtype=None, n_warmups=2",
        "capture_graph": "model, inference_params, batch_size, max_seqlen, decoding_seqlen=1, "
        "mempool=None, n_warmups=2",
    },
    "utils.hf": {
        "load_config_hf": "model_name",
        "load_state_dict_hf": "model_name, device=None, dtype=None",
    },
}


def written(parameter: inspect.Parameter) -> str:
    """``name`` or ``name=default``, a class or function by its name, a factory by its value."""
    default = parameter.default
    if default is inspect.Parameter.empty:
        return parameter.name
    if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return f"{parameter.name}=factory"
    return f"{parameter.name}={getattr(default, '__name__', repr(default))}"


CASES = [(module, name) for module, names in SIGNATURES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), CASES)
def test_signature(module, name):
    found = importlib.import_module(f"mamba_ssm.{module}")
    for piece in name.split("."):
        found = getattr(found, piece)
    parameters = list(inspect.signature(found).parameters.values())
    expected = SIGNATURES[module][name].replace("={}", "=factory").replace("=[]", "=factory")
    plain = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert ", ".join(map(written, plain)).startswith(expected)
    count = len(expected.split(", "))
    for extra in plain[count:] + [p for p in parameters if p not in plain]:
        optional = extra.default is not extra.empty or extra.kind is extra.VAR_KEYWORD
        assert optional, f"{extra} is required, but no client passes it"
        assert extra.kind is not extra.VAR_POSITIONAL, "*args hides the real signature"


def test_mixer_model_signature():
    # vocab_size has no default, so with defaults before it the parameters cannot stay positional.
    mixer = importlib.import_module("mamba_ssm.models.mixer_seq_simple").MixerModel
    names = list(inspect.signature(mixer).parameters)
    assert names == [
        "d_model", "n_layer", "d_intermediate", "vocab_size", "ssm_cfg", "attn_layer_idx",
        "attn_cfg", "norm_epsilon", "rms_norm", "initializer_cfg", "fused_add_norm",
        "residual_in_fp32", "device", "dtype",
    ]  # fmt: skip


def test_positional_order_of_the_autograd_functions():
    from mamba_ssm.ops import selective_scan_interface as module

    for function, name in (
        ("SelectiveScanFn", "selective_scan_fn"),
        ("MambaInnerFn", "mamba_inner_fn"),
    ):
        historical = SIGNATURES["ops.selective_scan_interface"][name]
        parameters = list(inspect.signature(getattr(module, function).forward).parameters.values())
        assert ", ".join(map(written, parameters[1:])).startswith(historical)


def test_selective_scan_cuda():
    import selective_scan_cuda

    first = "u, delta, A, B, C, D, z, delta_bias"
    assert ", ".join(inspect.signature(selective_scan_cuda.fwd).parameters) == (
        f"{first}, delta_softplus"
    )
    assert ", ".join(inspect.signature(selective_scan_cuda.bwd).parameters) == (
        f"{first}, dout, x, out, dz, delta_softplus, recompute_out_z"
    )


def test_root_names_and_version():
    for name in ("selective_scan_fn", "mamba_inner_fn", "selective_state_update", "Mamba"):
        assert callable(getattr(mamba_ssm, name)) and name in mamba_ssm.__all__
    assert "MambaLMHeadModel" in mamba_ssm.__all__
    # Clients take 2.0.4 and later to mean that Mamba-2 is there.
    assert mamba_ssm.__version__.split(".")[0] == "1"
    assert importlib.metadata.version("mamba_ssm") == mamba_ssm.__version__


# What the surveyed clients import.
CENSUS = {
    "mamba_ssm": "Mamba MambaLMHeadModel mamba_inner_fn selective_scan_fn selective_state_update",
    "mamba_ssm.modules.mamba_simple": "Mamba Block causal_conv1d_fn causal_conv1d_update "
    "selective_scan_fn mamba_inner_fn selective_state_update RMSNorm layer_norm_fn rms_norm_fn",
    "mamba_ssm.modules.block": "Block",
    "mamba_ssm.modules.mha": "MHA",
    "mamba_ssm.modules.mlp": "GatedMLP",
    "mamba_ssm.models.config_mamba": "MambaConfig",
    "mamba_ssm.models.mixer_seq_simple": "MambaLMHeadModel MixerModel _init_weights create_block",
    "mamba_ssm.ops.selective_scan_interface": "selective_scan_fn selective_scan_ref "
    "mamba_inner_fn mamba_inner_ref SelectiveScanFn MambaInnerFn rms_norm_forward",
    "mamba_ssm.ops.triton.layernorm": "RMSNorm layer_norm_fn rms_norm_fn",
    "mamba_ssm.ops.triton.layer_norm": "RMSNorm layer_norm_fn rms_norm_fn layer_norm_linear_fn",
    "mamba_ssm.ops.triton.selective_state_update": "selective_state_update "
    "selective_state_update_ref",
    "mamba_ssm.ops.causal_conv1d": "causal_conv1d_fn causal_conv1d_update causal_conv1d_ref "
    "causal_conv1d_varlen_states",
    "mamba_ssm.utils.generation": "GenerationMixin InferenceParams DecodingCGCache decode sample "
    "update_graph_cache capture_graph",
    "mamba_ssm.utils.hf": "load_config_hf load_state_dict_hf",
    "mamba_ssm.utils.torch": "custom_fwd custom_bwd custom_amp_decorator",
    "selective_scan_cuda": "fwd bwd",
}


@pytest.mark.parametrize("module", CENSUS)
def test_census_of_imports(module):
    found = importlib.import_module(module)
    for name in CENSUS[module].split():
        assert callable(getattr(found, name)), name


def test_submodules_are_not_hidden_by_functions():
    package = importlib.import_module("mamba_ssm.ops.triton")
    importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    assert inspect.ismodule(package.selective_state_update)


def test_one_function_under_all_its_names():
    from mamba_ssm.modules import mamba_simple
    from mamba_ssm.modules.block import Block
    from mamba_ssm.ops import selective_scan_interface as scan
    from mamba_ssm.ops.triton import layer_norm, layernorm

    assert mamba_ssm.selective_scan_fn is scan.selective_scan_fn is mamba_simple.selective_scan_fn
    assert mamba_ssm.mamba_inner_fn is scan.mamba_inner_fn is mamba_simple.mamba_inner_fn
    assert mamba_ssm.selective_state_update is mamba_simple.selective_state_update
    assert layernorm.RMSNorm is layer_norm.RMSNorm is mamba_simple.RMSNorm
    assert mamba_simple.Block is Block


def test_block_in_the_way_of_version_1():
    from functools import partial

    from mamba_ssm.modules.mamba_simple import Block, Mamba
    from mamba_ssm.ops.triton.layernorm import RMSNorm

    block = Block(
        8, partial(Mamba, layer_idx=0), norm_cls=partial(RMSNorm, eps=1e-5), fused_add_norm=True
    )
    assert [name for name, _ in block.named_children()] == ["norm", "mixer"] and block.mlp is None
    hidden, residual = block(torch.randn(2, 3, 8))
    assert hidden.shape == residual.shape == (2, 3, 8)


def test_state_dict_keys_of_mamba_in_order():
    keys = list(mamba_ssm.Mamba(8, bias=True).state_dict())
    assert keys == [
        "A_log", "D", "in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias",
        "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight", "out_proj.bias",
    ]  # fmt: skip
    assert "in_proj.bias" not in mamba_ssm.Mamba(8).state_dict()


def test_rms_norm_parameters():
    norm = RMSNorm(8, eps=1e-3)
    assert list(norm.state_dict()) == ["weight"] and "bias" in norm._parameters
    assert norm.bias is None and norm.eps == 1e-3 and norm.drop is None
    assert isinstance(RMSNorm(8, dropout_p=0.1).drop, nn.Dropout)


def test_keyword_filter_by_signature_loses_nothing():
    # Clients pass on only the keywords that inspect.signature shows.
    def called(function, *args, **kwargs):
        known = inspect.signature(function).parameters
        return function(*args, **{k: v for k, v in kwargs.items() if k in known})

    u, A, B = torch.randn(1, 4, 5), -torch.rand(4, 3), torch.randn(1, 3, 5)
    D, z, bias = torch.randn(4), torch.randn(1, 4, 5), torch.randn(4)
    options = {"D": D, "z": z, "delta_bias": bias, "delta_softplus": True}
    y = called(mamba_ssm.selective_scan_fn, u, u, A, B, B, **options, use_mambapy=False)
    assert torch.equal(y, mamba_ssm.selective_scan_fn(u, u, A, B, B, D, z, bias, True))
    states = torch.zeros(2, 1, 4, 3)
    step = (u[..., 0], u[..., 0], A, B[..., 0], B[..., 0], D)
    options = {"z": z[..., 0], "dt_bias": bias, "dt_softplus": True}
    y = called(mamba_ssm.selective_state_update, states[0], *step, **options, unknown=1)
    expected = mamba_ssm.selective_state_update(states[1], *step, z[..., 0], bias, True)
    assert torch.equal(y, expected) and torch.equal(states[0], states[1])


# Each known defect of the historical package, and the test that would see it come back.
DEFECTS = {
    "out_proj_bias gradient is 0-d": "test_defect_output_bias_gradient_has_its_shape",
    "norm weights of mamba_inner_fn get no gradient": "test_defect_norm_weights_get_gradients",
    "constant B is left out of the last state": "test_constant_B_reaches_the_last_state",
    "decode step crashes without dt_bias or D": "test_defect_decode_step_without_D_and_dt_bias",
    "min-p filters by the first row": "test_samples_follow_the_filtered_distribution_of_each_row",
    "the loader ignores dtype and device": "test_defect_state_dict_is_converted",
    "init with the wrong residual count": "test_initialisation",
    "graphs reused when the batch shrinks": (
        "test_graphs_serve_changing_batches_lengths_and_weights"
    ),
    "EOS stops only when all rows agree": "test_rows_end_at_their_own_eos",
    "softplus loses small values": "test_small_delta_is_not_lost",
    "offsets overflow 32 bits": "test_defect_offsets_beyond_32_bits",
    "timing needs CUDA": "test_timing_is_printed_without_cuda",
}


def test_every_known_defect_has_a_test():
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    for defect, test in DEFECTS.items():
        assert any(f"def {test}(" in text for text in sources), defect


@pytest.mark.parametrize("absent", [("D",), ("dt_bias",), ("D", "dt_bias")])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_defect_decode_step_without_D_and_dt_bias(absent, backend):
    x, dt, A, B = torch.randn(2, 4), torch.rand(2, 4), -torch.rand(4, 3), torch.randn(2, 3)
    vectors = {"D": torch.randn(4), "dt_bias": torch.randn(4)}
    missing = {name: None if name in absent else value for name, value in vectors.items()}
    zeros = {k: torch.zeros(4) if k in absent else v for k, v in vectors.items()}
    states = torch.randn(2, 4, 3).expand(2, 2, 4, 3).clone()
    with mamba_ssm.backend(backend):
        y = mamba_ssm.selective_state_update(states[0], x, dt, A, B, B, **missing)
        expected = mamba_ssm.selective_state_update(states[1], x, dt, A, B, B, **zeros)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(states[0], states[1])


def test_defect_state_dict_is_converted(tmp_path):
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=16)
    mamba_ssm.MambaLMHeadModel(config).save_pretrained(tmp_path)
    for device in ("cpu", "meta"):
        state = load_state_dict_hf(str(tmp_path), device=device, dtype=torch.bfloat16)
        for name, value in state.items():
            fp32 = name.endswith(("A_log", ".D"))
            assert value.dtype == (torch.float32 if fp32 else torch.bfloat16), name
            assert value.device.type == device, name


def _far_apart(tmp_path, *shape: int) -> torch.Tensor:
    """Random bf16 values in rows 2**31 elements apart; a sparse file, so hardly any memory."""
    apart = 2**31
    path = str(tmp_path / f"sparse{len(list(tmp_path.iterdir()))}")
    size = apart * (shape[0] - 1) + 4096
    base = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
    inner = torch.empty(shape[1:]).stride()
    return base.as_strided(shape, (apart, *inner)).copy_(torch.randn(shape))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_defect_offsets_beyond_32_bits(tmp_path, backend):
    x = _far_apart(tmp_path, 2, 6, 9)
    assert x.stride(0) == 2**31
    A, B, w = -torch.rand(6, 3), torch.randn(2, 3, 9).bfloat16(), torch.randn(6, 4)

    def run(x, state):
        step = mamba_ssm.selective_state_update(
            state, x[..., 0], x[..., 1], A, B[..., 0], B[..., 1]
        )
        return (
            mamba_ssm.selective_scan_fn(x, x, A, B, B, z=x, delta_softplus=True),
            causal_conv1d_fn(x, w, activation="silu"),
            rms_norm_fn(x, torch.ones(9), None),
            step,
            state.clone(),
        )

    state = _far_apart(tmp_path, 2, 6, 3)
    copies = x.clone(memory_format=torch.contiguous_format), state.contiguous()
    assert copies[1].stride(0) == 18
    with mamba_ssm.backend(backend):
        for far, near in zip(run(x, state), run(*copies), strict=True):
            assert torch.equal(far, near)
