"""What research code does with the package, each in the way it is done there, against plain torch.

The census of imports is in tests/test_api_surface.py; here everything in it is called.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from module_helpers import assert_all_same, assert_same, run_with_grads, scrambled
from torch import nn

import selective_scan_cuda
from mamba_ssm import (
    Mamba,
    MambaLMHeadModel,
    mamba_inner_fn,
    selective_scan_fn,
    selective_state_update,
)
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MixerModel, _init_weights, create_block
from mamba_ssm.modules import mamba_simple
from mamba_ssm.ops.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from mamba_ssm.ops.selective_scan_interface import (
    MambaInnerFn,
    SelectiveScanFn,
    mamba_inner_ref,
    rms_norm_forward,
    selective_scan_ref,
)
from mamba_ssm.ops.triton import layer_norm, layernorm
from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
from mamba_ssm.utils import generation
from mamba_ssm.utils.generation import GenerationMixin, InferenceParams
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from mamba_ssm.utils.torch import custom_bwd, custom_fwd

B, D, N, L, K = 2, 6, 4, 197, 4  # K scan directions, as groups


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scan_tensors(length: int = 21, d: int = D, groups: int = 0) -> dict[str, torch.Tensor]:
    """selective_scan's first eight arguments in order; no groups gives 3-D B and C."""
    shape = (B, groups, N, length) if groups else (B, N, length)
    return {
        "u": torch.randn(B, d, length),
        "delta": 0.5 * torch.rand(B, d, length),
        "A": -torch.rand(d, N) - 0.5,
        "B": torch.randn(shape),
        "C": torch.randn(shape),
        "D": torch.randn(d),
        "z": torch.randn(B, d, length),
        "delta_bias": torch.rand(d) - 4.0,
    }


def gradients(call, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output and the gradients of ``call(*tensors)``."""
    return run_with_grads(nn.Module(), call, *tensors.values())


# --- the scan -------------------------------------------------------------------------------------


def test_all_positions_of_the_scan():
    x = scan_tensors()
    expected = gradients(lambda *t: selective_scan_ref(*t, delta_softplus=True), x)
    for call in (
        lambda *t: selective_scan_fn(*t, True, False),
        lambda *t: selective_scan_fn(*t, True, None),
        lambda *t: SelectiveScanFn.apply(*t, True),
        lambda u, dt, A, B, C, D, z, bias: selective_scan_fn(
            u, dt, A, B, C, D.float(), z=z, delta_bias=bias.float(), delta_softplus=True
        ),
    ):
        assert_all_same(gradients(call, x), expected)
    out, state = selective_scan_fn(*x.values(), True, True)
    assert_same(out, expected["output 0"]) and state.shape == (B, D, N)


class GroupedScan(torch.autograd.Function):
    """A vision repository's own function over the extension module: no z, grouped B and C."""

    @staticmethod
    @custom_fwd
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        ctx.delta_softplus = delta_softplus
        out, x, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    @custom_bwd
    def backward(ctx, dout):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, ddelta_bias, *_ = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, None, delta_bias, dout.contiguous(), x, None, None,
            ctx.delta_softplus, False,
        )  # fmt: skip
        return du, ddelta, dA, dB, dC, dD, ddelta_bias, None


@pytest.mark.parametrize("call", ["selective_scan_fn", "own function"])
def test_four_directions_as_groups_at_an_odd_length(call):
    x = scan_tensors(L, K * D, K)
    del x["z"]

    def grouped(*t):
        if call == "own function":
            return GroupedScan.apply(*t, True)
        return selective_scan_fn(*t[:6], None, t[6], True, return_last_state=False)

    def one_by_one(u, dt, A, B, C, D_, bias):
        parts = []
        for k in range(K):
            c = slice(k * D, (k + 1) * D)
            parts.append(
                selective_scan_ref(
                    u[:, c], dt[:, c], A[c], B[:, k], C[:, k], D_[c], None, bias[c], True
                )
            )
        return torch.cat(parts, 1)

    assert_all_same(gradients(grouped, x), gradients(one_by_one, x))


class InnerWithoutProjection(torch.autograd.Function):
    """A repository's fused scan and gate, whose dz goes into its half of xz's gradient."""

    @staticmethod
    def forward(ctx, xz, delta, A, B, C, D, delta_bias):
        x, z = xz.chunk(2, dim=1)
        B, C = B.unsqueeze(1).contiguous(), C.unsqueeze(1).contiguous()
        out, states, out_z = selective_scan_cuda.fwd(x, delta, A, B, C, D, z, delta_bias, True)
        ctx.save_for_backward(xz, delta, A, B, C, D, delta_bias, states, out)
        return out_z

    @staticmethod
    def backward(ctx, dout):
        xz, delta, A, B, C, D, delta_bias, states, out = ctx.saved_tensors
        x, z = xz.chunk(2, dim=1)
        dxz = torch.empty_like(xz)
        dx, dz = dxz.chunk(2, dim=1)
        du, ddelta, dA, dB, dC, dD, dbias, dz, _ = selective_scan_cuda.bwd(
            x, delta, A, B, C, D, z, delta_bias, dout, states, out, dz, True, True
        )
        dx.copy_(du)
        return dxz, ddelta, dA, dB.squeeze(1), dC.squeeze(1), dD, dbias


def test_an_own_inner_function_over_the_extension_module():
    x = scan_tensors()
    xz = {"xz": torch.cat([x.pop("u"), x.pop("z")], 1)} | x

    def plain(xz, dt, A, B, C, D_, bias):
        u, z = xz.chunk(2, dim=1)
        return selective_scan_ref(u, dt, A, B, C, D_, z, bias, True)

    assert_all_same(gradients(InnerWithoutProjection.apply, xz), gradients(plain, xz))


def inner_arguments(rank: int = 2, e: int = 5, length: int = 21) -> list[torch.Tensor]:
    """mamba_inner_fn's first eight positions, without out_proj_bias."""
    return [
        torch.randn(B, length, 2 * D).transpose(1, 2),
        torch.randn(D, 1, 4),
        torch.randn(D),
        torch.randn(rank + 2 * N, D),
        torch.randn(D, rank),
        torch.randn(e, D),
        -torch.rand(D, N) - 0.5,
        torch.randn(D),
        torch.rand(D) - 4.0,
    ]


def test_the_inner_function_by_position_and_keyword():
    def call(function, *t):
        return function(*t[:6], None, t[6], None, None, t[7], delta_bias=t[8], delta_softplus=True)

    inputs = dict(enumerate(inner_arguments()))
    expected = gradients(partial(call, mamba_inner_ref), inputs)
    assert_all_same(gradients(partial(call, mamba_inner_fn), inputs), expected)
    out = MambaInnerFn.apply(*inner_arguments()[:6], None, inputs[6], None, None, inputs[7])
    assert out.shape == (B, 21, 5)


# --- bidirectional use ----------------------------------------------------------------------------


def test_the_inner_function_on_a_flipped_sequence():
    def both(xz, *t):
        def one(xz):
            return mamba_inner_fn(xz, *t[:5], None, t[5], None, None, t[6], delta_bias=t[7])

        return one(xz) + one(xz.flip([-1])).flip([1])

    def plain(xz, *t):
        def one(xz):
            return mamba_inner_ref(xz, *t[:5], None, t[5], None, None, t[6], delta_bias=t[7])

        return one(xz) + one(xz.flip([-1])).flip([1])

    inputs = dict(enumerate(inner_arguments(length=L)))
    assert_all_same(gradients(both, inputs), gradients(plain, inputs))


def test_two_layers_one_of_them_flipped():
    ahead, back = scrambled(Mamba(8), 1), scrambled(Mamba(8), 2)
    x = torch.randn(B, L, 8)
    out = ahead(x) + back(x.flip(1)).flip(1)
    with torch.no_grad():
        early = x.clone()
        early[:, -1] += 1.0
        changed = ahead(early) + back(early.flip(1)).flip(1)
    assert not torch.allclose(changed[:, 0], out[:, 0], atol=1e-6)


# --- subclasses and patched modules ---------------------------------------------------------------


class OwnForward(Mamba):
    """A subclass with another forward out of the parent's parts, written with einops."""

    def __init__(self, *args, extra: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = nn.Parameter(torch.zeros(extra))
        A = repeat(
            torch.arange(1, self.d_state + 1, dtype=torch.float32), "n -> d n", d=self.d_inner
        ).contiguous()
        self.A_b_log = nn.Parameter(torch.log(A))
        self.A_b_log._no_weight_decay = True

    def forward(self, hidden_states, inference_params=None):
        _, seqlen, _ = hidden_states.shape
        xz = rearrange(
            self.in_proj.weight @ rearrange(hidden_states, "b l d -> d (b l)"),
            "d (b l) -> b d l",
            l=seqlen,
        )
        if self.in_proj.bias is not None:
            xz = xz + rearrange(self.in_proj.bias.to(dtype=xz.dtype), "d -> d 1")
        A = -torch.exp(self.A_log.float())
        x, z = xz.chunk(2, dim=1)
        if mamba_simple.causal_conv1d_fn is None:
            x = self.act(self.conv1d(x)[..., :seqlen])
        else:
            assert self.activation in ["silu", "swish"]
            x = mamba_simple.causal_conv1d_fn(
                x=x,
                weight=rearrange(self.conv1d.weight, "d 1 w -> d w"),
                bias=self.conv1d.bias,
                activation=self.activation,
            )
        x_dbl = self.x_proj(rearrange(x, "b d l -> (b l) d"))
        dt, B, C = torch.split(x_dbl, [self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = rearrange(self.dt_proj.weight @ dt.t(), "d (b l) -> b d l", l=seqlen)
        B = rearrange(B, "(b l) dstate -> b dstate l", l=seqlen).contiguous()
        C = rearrange(C, "(b l) dstate -> b dstate l", l=seqlen).contiguous()
        y = mamba_simple.selective_scan_fn(
            x, dt, A, B, C, self.D.float(), z=z, delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True, return_last_state=False,
        )  # fmt: skip
        return self.out_proj(rearrange(y, "b d l -> b l d"))


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"conv_bias": False}], ids=str)
@pytest.mark.parametrize("conv", ["op", "None"])
def test_a_subclass_with_its_own_forward(options, conv, monkeypatch):
    own, x = OwnForward(8, **options), torch.randn(B, 33, 8)
    plain = Mamba(8, **options)
    plain.load_state_dict(
        {k: v for k, v in own.state_dict().items() if k not in ("extra", "A_b_log")}
    )
    expected = run_with_grads(plain, plain, x)
    if conv == "None":
        monkeypatch.setattr(mamba_simple, "causal_conv1d_fn", None)
    assert_all_same(run_with_grads(own, own, x), expected)


def test_a_subclass_that_calls_the_fused_path_itself():
    class Fused(Mamba):
        def forward(self, hidden_states, **kwargs):
            xz = self.in_proj(hidden_states).transpose(1, 2)
            return mamba_simple.mamba_inner_fn(
                xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
                self.out_proj.weight, self.out_proj.bias, -torch.exp(self.A_log.float()), None,
                None, self.D.float(), delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            )  # fmt: skip

    layer, x = Fused(8), torch.randn(B, 9, 8)
    expected = run_with_grads(layer, super(Fused, layer).forward, x)
    assert_all_same(run_with_grads(layer, layer, x), expected)

    class Unchanged(Mamba):
        pass

    unchanged = Unchanged(8)
    unchanged.load_state_dict(layer.state_dict())
    assert_all_same(run_with_grads(unchanged, unchanged, x), expected)


@pytest.mark.parametrize("name", ["mamba_inner_fn", "selective_scan_fn", "causal_conv1d_fn"])
def test_a_patched_global_is_what_runs(name, monkeypatch):
    layer, x = Mamba(8, use_fast_path=name == "mamba_inner_fn"), torch.randn(B, 9, 8)
    expected, calls, original = layer(x), [], getattr(mamba_simple, name)

    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(mamba_simple, name, counted)
    assert torch.equal(layer(x), expected) and calls == [name]


@pytest.mark.parametrize("name", ["causal_conv1d_update", "selective_state_update"])
def test_a_patched_update_is_what_decoding_runs(name, monkeypatch):
    layer, x, calls = Mamba(8), torch.randn(B, 1, 8), []
    original = getattr(mamba_simple, name)
    monkeypatch.setattr(mamba_simple, name, lambda *a, **k: calls.append(name) or original(*a, **k))
    with torch.no_grad():
        out, *_ = layer.step(x, *layer.allocate_inference_cache(B, 1))
    assert_same(out, layer(x).detach()) and calls == [name]


# --- norms and blocks -----------------------------------------------------------------------------


def test_norms_under_their_first_name_and_order():
    x, residual = torch.randn(B, 5, 8), torch.randn(B, 5, 8)
    norm = layernorm.RMSNorm(8, eps=1e-4)
    nn.init.normal_(norm.weight)
    bias = torch.randn(8)

    def summed(t):
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-4) * norm.weight

    old = layernorm.rms_norm_fn(x, norm.weight, None, residual, True, True, 1e-4)
    new = layer_norm.rms_norm_fn(
        x, norm.weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=1e-4
    )
    assert torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])
    assert_same(old[0].detach(), summed(x + residual).detach())
    y, total = layernorm.layer_norm_fn(x, norm.weight, bias, residual, 1e-4, True, True, False)
    expected = F.layer_norm(x + residual, (8,), norm.weight, bias, 1e-4)
    assert_same(y.detach(), expected.detach()) and torch.equal(total, x + residual)
    assert_same(norm(x).detach(), summed(x).detach())
    y = rms_norm_forward(x.flatten(0, 1), norm.weight, None, eps=1e-4)
    assert_same(y.detach(), summed(x.flatten(0, 1)).detach())


@pytest.mark.parametrize("fused", [False, True])
def test_a_backbone_of_blocks_as_vision_code_builds_it(fused):
    def block(i):
        made = mamba_simple.Block(
            8,
            partial(Mamba, layer_idx=i, d_state=N),
            norm_cls=partial(layernorm.RMSNorm, eps=1e-5),
            fused_add_norm=fused,
            residual_in_fp32=True,
        )
        made.layer_idx = i
        return made

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(block(i) for i in range(3))
            self.norm_f = layernorm.RMSNorm(8, eps=1e-5)
            self.apply(partial(_init_weights, n_layer=3))

        def forward(self, x):
            residual = None
            for layer in self.layers:
                x, residual = layer(x, residual, inference_params=None)
            if fused:
                function = (
                    layernorm.rms_norm_fn
                    if isinstance(self.norm_f, layernorm.RMSNorm)
                    else layernorm.layer_norm_fn
                )
                return function(
                    x, self.norm_f.weight, self.norm_f.bias, eps=self.norm_f.eps,
                    residual=residual, prenorm=False, residual_in_fp32=True,
                )  # fmt: skip
            residual = x if residual is None else x + residual
            return self.norm_f(residual.to(dtype=self.norm_f.weight.dtype))

    model, x = Backbone(), torch.randn(B, L, 8)
    results = run_with_grads(model, model, x)
    stream = x
    for layer in model.layers:
        stream = stream + layer.mixer(layer.norm(stream))
    assert_same(results["output 0"], model.norm_f(stream).detach(), scale=4.0)
    assert len(results) == 2 + len(list(model.parameters()))


def test_create_block_and_a_mixer_model_without_its_embedding():
    made = create_block(8, ssm_cfg={"d_state": N}, rms_norm=True, fused_add_norm=True, layer_idx=1)
    assert made.layer_idx == made.mixer.layer_idx == 1
    model = MixerModel(d_model=8, n_layer=2, vocab_size=5, rms_norm=True, fused_add_norm=True)
    model.embedding = nn.Identity()
    with pytest.raises(ValueError, match=r"input_ids must have shape \(b, l\)"):
        model(torch.randn(B, 7, 8))


# --- decoding -------------------------------------------------------------------------------------


def test_a_hand_written_decoding_step():
    x = scan_tensors(5)
    conv_weight, conv_bias = torch.randn(D, 4), torch.randn(D)
    inputs = torch.randn(B, D, 5)
    conv_state, state, outs = torch.zeros(B, D, 4), torch.zeros(B, D, N), []
    twin = torch.zeros(B, D, N)
    for t in range(5):
        u = causal_conv1d_update(inputs[..., t], conv_state, conv_weight, conv_bias, "silu")
        step = (u, x["delta"][..., t], x["A"], x["B"][..., t], x["C"][..., t], x["D"])
        more = {"z": x["z"][..., t], "dt_bias": x["delta_bias"], "dt_softplus": True}
        outs.append(selective_state_update(state, *step, **more))
        assert_same(outs[-1], selective_state_update_ref(twin, *step, **more))
    u = causal_conv1d_fn(inputs, conv_weight, conv_bias, "silu")
    assert_same(u, causal_conv1d_ref(inputs, conv_weight, conv_bias, activation="silu"))
    whole, last = selective_scan_fn(
        u, *list(x.values())[1:], delta_softplus=True, return_last_state=True
    )
    assert_same(torch.stack(outs, -1), whole)
    assert_same(state, last)
    assert torch.equal(conv_state, inputs[..., 1:])
    bounds = torch.tensor([0, 2, 5])
    tails = causal_conv1d_varlen_states(inputs[0].t(), bounds, 3)
    assert_same(tails[1], inputs[0, :, 2:])


class OwnLanguageModel(nn.Module, GenerationMixin):
    """A client's model that generates through the mixin."""

    def __init__(self):
        super().__init__()
        self.backbone = MixerModel(d_model=8, n_layer=2, vocab_size=24, rms_norm=True)
        self.lm_head = nn.Linear(8, 24, bias=False)

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        from collections import namedtuple

        hidden = self.backbone(input_ids, inference_params=inference_params)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return namedtuple("CausalLMOutput", ["logits"])(logits=self.lm_head(hidden))


def test_a_model_of_ones_own_generates():
    model = scrambled(OwnLanguageModel()).eval()
    ids = torch.randint(0, 24, (B, 4))
    out = model.generate(
        input_ids=ids, max_length=9, return_dict_in_generate=True, output_scores=True
    )
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(out.sequences, expected) and len(out.scores) == 5

        params = InferenceParams(max_seqlen=9, max_batch_size=B)
        prefill = model(ids, inference_params=params).logits[:, -1]
        params.seqlen_offset += 4
        following = model(prefill.argmax(-1, keepdim=True), inference_params=params).logits[:, 0]
    assert torch.equal(prefill.argmax(-1), expected[:, 4])
    assert torch.equal(following.argmax(-1), expected[:, 5])
    assert torch.equal(generation.sample(prefill, top_k=1), expected[:, 4])


# --- configurations and checkpoints ---------------------------------------------------------------


def test_weights_put_into_a_model_by_hand(tmp_path):
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=24)
    source = scrambled(MambaLMHeadModel(config))
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        json.dumps({"d_model": 8, "n_layer": 2, "vocab_size": 24})
    )
    config = MambaConfig(**load_config_hf(str(tmp_path)))
    model = MambaLMHeadModel(config, device="cpu", dtype=torch.float32)
    model.load_state_dict(load_state_dict_hf(str(tmp_path), device="cpu", dtype=torch.float32))
    ids = torch.randint(0, 24, (B, 7))
    assert torch.equal(model(ids).logits, source(ids).logits)
    model.backbone.load_state_dict(
        {
            name.removeprefix("backbone."): value
            for name, value in source.state_dict().items()
            if name.startswith("backbone.")
        },
        strict=True,
    )
