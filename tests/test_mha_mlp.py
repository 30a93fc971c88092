"""Attention, the gated MLP and the residual block: meaning, states, packing, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from module_helpers import assert_all_same, assert_same, run_with_grads, scrambled
from torch import nn

from mamba_ssm.modules import block as block_module
from mamba_ssm.modules.block import Block
from mamba_ssm.modules.mha import MHA
from mamba_ssm.modules.mlp import GatedMLP
from mamba_ssm.modules.rotary import apply_rotary
from mamba_ssm.ops.layer_norm import RMSNorm

DIM = 8
OPTIONS = {
    "plain": {"num_heads": 2},
    "grouped": {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6},
    "rotary": {"num_heads": 2, "rotary_emb_dim": 4},
    "rotary interleaved": {
        "num_heads": 2,
        "rotary_emb_dim": 2,
        "rotary_emb_interleaved": True,
        "rotary_emb_base": 100.0,
    },
    "everything": {
        "num_heads": 4,
        "num_heads_kv": 1,
        "head_dim": 4,
        "d_conv": 3,
        "mlp_dim": 10,
        "rotary_emb_dim": 4,
        "softmax_scale": 0.3,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
    },
    "width 1": {"num_heads": 2, "d_conv": 1},
}
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(causal: bool = True, dtype=torch.float64, **options) -> MHA:
    torch.manual_seed(0)
    return scrambled(MHA(DIM, causal=causal, layer_idx=0, **options)).to(dtype)


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def params(max_seqlen: int, batch: int):
    return SimpleNamespace(
        seqlen_offset=0,
        key_value_memory_dict={},
        batch_size_offset=0,
        max_seqlen=max_seqlen,
        max_batch_size=batch,
    )


def written_out(layer: MHA, x: torch.Tensor) -> torch.Tensor:
    """The layer as loops over rows, heads and positions."""
    nh, nkv, hd = layer.num_heads, layer.num_heads_kv, layer.head_dim
    mlp, qkv = layer.in_proj(x).split([layer.mlp_dim, hd * (nh + 2 * nkv)], -1)
    length = x.shape[1]
    if layer.d_conv:
        qkv = layer.conv1d(qkv.transpose(1, 2))[..., :length].transpose(1, 2)
    heads = qkv.unflatten(-1, (-1, hd))
    half = layer.rotary_emb_dim // 2
    rows = []
    for row in heads:
        vectors = []
        for t in range(length):
            vector = [list(head.unbind()) for head in row[t]]
            for head in vector[: nh + nkv]:
                for i in range(half):
                    a, b = (2 * i, 2 * i + 1) if layer.rotary_emb_interleaved else (i, i + half)
                    angle = torch.tensor(float(t)) * layer.rotary_emb_base ** (-i / half)
                    cos, sin, first, second = angle.cos(), angle.sin(), head[a], head[b]
                    head[a], head[b] = first * cos - second * sin, first * sin + second * cos
            vectors.append(torch.stack([torch.stack(head) for head in vector]))
        q, k, v = torch.stack(vectors).split([nh, nkv, nkv], 1)
        scale = layer.softmax_scale or hd**-0.5
        outs = []
        for t in range(length):
            seen = slice(0, t + 1) if layer.causal else slice(None)
            for h in range(nh):
                g = h // (nh // nkv)
                weights = torch.softmax(scale * (k[seen, g] @ q[t, h]), 0)
                outs.append(weights @ v[seen, g])
        rows.append(torch.stack(outs).view(length, nh * hd))
    context = torch.stack(rows)
    if layer.mlp_dim:
        up, gate = mlp.chunk(2, -1)
        context = torch.cat([context, up * F.silu(gate)], -1)
    return layer.out_proj(context)


@EVERY
@pytest.mark.parametrize("causal", [True, False])
def test_attention_means_what_it_says(options, causal):
    layer, x = make(causal, **options), inputs(2, 5, DIM)
    actual = run_with_grads(layer, layer, x)
    expected = run_with_grads(layer, lambda t: written_out(layer, t), x)
    for name in expected:  # the rotation is computed in fp32 on purpose
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    for name, _ in layer.named_parameters():
        assert actual[f"grad of {name}"].abs().sum() > 0, name


def test_parameters():
    layer = MHA(DIM, 4, num_heads_kv=2, head_dim=3, mlp_dim=300, d_conv=2)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (3 * 8 + 512, DIM),
        "in_proj.bias": (3 * 8 + 512,),
        "conv1d.weight": (24, 1, 2),
        "conv1d.bias": (24,),
        "out_proj.weight": (DIM, 12 + 256),
        "out_proj.bias": (DIM,),
    }
    kv, conv, lengths = layer.allocate_inference_cache(3, 7, dtype=torch.bfloat16)
    assert kv.shape == (3, 7, 2, 2, 3) and kv.dtype == torch.bfloat16
    assert conv.shape == (3, 24, 2) and lengths.shape == (3,)
    assert MHA(DIM, 2).allocate_inference_cache(1, 5)[1] is None


def test_rotation_depends_on_relative_position_only():
    q, k = inputs(1, 1, 1, 8), inputs(1, 1, 1, 8, seed=2)
    for interleaved in (True, False):

        def score(i, j, interleaved=interleaved):
            positions = (torch.tensor([i]), torch.tensor([j]))
            a, b = (
                apply_rotary(t, p, 6, 50.0, interleaved)
                for t, p in zip((q, k), positions, strict=True)
            )
            return (a * b).sum()

        torch.testing.assert_close(score(5, 3), score(12, 10), rtol=1e-5, atol=1e-5)
        assert abs(score(5, 3) - score(5, 4)) > 1e-3


@EVERY
@pytest.mark.parametrize("split", [(4, 5), (1, 8), (3, 0, 1, 5), (1,) * 9])
def test_chunks_equal_one_pass_with_all_gradients(options, split):
    layer, x = make(**options), inputs(2, 9, DIM)

    def whole(x):
        out, (kv, _, _) = layer(x, return_final_state=True)
        return out, kv

    def chunked(x):
        state, outs = None, []
        for chunk in x.split(split, 1):
            out, state = layer(chunk, initial_state=state, return_final_state=True)
            outs.append(out)
        return torch.cat(outs, 1), state[0]

    expected = run_with_grads(layer, whole, x)
    assert_all_same(run_with_grads(layer, chunked, x), expected)
    assert_same(expected["output 0"], layer(x).detach())


@EVERY
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("split", [(4, 5), (3, 1, 4, 1), (1,) * 9])
def test_decoding_from_the_cache_equals_one_pass(options, split, grad):
    layer, x = make(**options), inputs(2, 9, DIM)
    cache = params(9, 2)
    outs = []
    with torch.set_grad_enabled(grad):
        for chunk in x.split(split, 1):
            outs.append(layer(chunk, cache))
            cache.seqlen_offset += chunk.shape[1]
        assert_same(torch.cat(outs, 1).detach(), layer(x).detach())
        if grad:  # nothing that a call read for its gradient was overwritten
            torch.cat(outs, 1).sum().backward()
        kv, _, lengths = cache.key_value_memory_dict[0]
        assert not kv.requires_grad and lengths.tolist() == [9, 9]
        with pytest.raises(ValueError, match="has 9 slots"):
            layer(x[:, :1], cache)
        cache.seqlen_offset = 0
        assert_same(layer(x[:, :3], cache).detach(), layer(x)[:, :3].detach())


def test_a_historical_cache_of_two_tensors_works():
    layer, x = make(num_heads=2), inputs(2, 5, DIM)
    cache = params(9, 2)
    cache.key_value_memory_dict[0] = layer.allocate_inference_cache(2, 9)[:2]
    with torch.no_grad():
        first = layer(x[:, :3], cache)
        cache.seqlen_offset = 3
        cache.key_value_memory_dict[0] = cache.key_value_memory_dict[0][:2]
        second = layer(x[:, 3:], cache)
        assert_same(torch.cat([first, second], 1), layer(x))


def test_prefill_from_a_given_state():
    layer, x = make(**OPTIONS["everything"]), inputs(2, 9, DIM)
    cache = params(6, 2)
    with torch.no_grad():
        _, state = layer(x[:, :3], return_final_state=True)
        first = layer(x[:, 3:8], cache, initial_state=state)
        cache.seqlen_offset = 5
        second = layer(x[:, 8:], cache)
        assert_same(torch.cat([first, second], 1), layer(x)[:, 3:])


MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [1] * 7, [0, 0, 1, 1, 1, 0, 0]])


@EVERY
def test_padded_equals_unpadded(options):
    layer, x = make(**options), inputs(4, 7, DIM)

    def padded(x):
        return layer(x, attention_mask=MASK)[MASK.bool()]

    def alone(x):
        return torch.cat([layer(x[i : i + 1, MASK[i].bool()])[0] for i in range(4)])

    assert_all_same(run_with_grads(layer, padded, x), run_with_grads(layer, alone, x))


@EVERY
@pytest.mark.parametrize("split", [(7,), (2, 5), (1,) * 7])
def test_padded_prompts_then_decoding(options, split):
    layer, x, more = make(**options), inputs(4, 7, DIM), inputs(4, 3, DIM, seed=5)
    cache = params(10, 4)
    with torch.no_grad():
        for part, mask in zip(x.split(split, 1), MASK.split(split, 1), strict=True):
            layer(part, cache, attention_mask=mask)
            cache.seqlen_offset += part.shape[1]
        outs = []
        for token in more.split((1, 2), 1):
            outs.append(layer(token, cache))
            cache.seqlen_offset += token.shape[1]
        _, state = layer(x, attention_mask=MASK, return_final_state=True)
        continued = layer(more, initial_state=state)
        for i in range(4):
            row = torch.cat([x[i : i + 1, MASK[i].bool()], more[i : i + 1]], 1)
            expected = layer(row)[:, -3:]
            assert_same(torch.cat(outs, 1)[i : i + 1], expected)
            assert_same(continued[i : i + 1], expected)


@EVERY
@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_separate(options, causal):
    layer, x, lengths = make(causal, **options), inputs(1, 9, DIM), (4, 1, 0, 3, 1)
    bounds = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    # Ids that come back mean a new sequence, as for the scan.
    alternating = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0, 1]])

    def separate(x):
        return torch.cat([layer(part) for part in x.split(lengths, 1) if part.shape[1]], 1)

    expected = run_with_grads(layer, separate, x)
    for packing in ({"cu_seqlens": bounds}, {"seq_idx": alternating}):
        actual = run_with_grads(layer, lambda t, p=packing: layer(t, **p), x)
        assert_all_same(actual, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(num_heads=2)(inputs(2, 3, 5)), "embed_dim=8"),
        (lambda: make(False, num_heads=2)(inputs(1, 3, DIM), params(4, 1)), "causal=True"),
        (
            lambda: make(num_heads=2)(
                inputs(1, 3, DIM), cu_seqlens=torch.tensor([0, 3]), return_final_state=True
            ),
            "pass attention_mask",
        ),
        (lambda: MHA(DIM, 3), "pass head_dim"),
        (lambda: MHA(DIM, 4, num_heads_kv=3), "multiple of num_heads_kv"),
        (lambda: MHA(DIM, 2, rotary_emb_dim=3), "even"),
        (lambda: MHA(DIM, 2, rotary_emb_dim=6), "head_dim=4"),
        (lambda: MHA(DIM, 2, d_conv=-1), "not negative"),
        (
            lambda: make(num_heads=2)(
                inputs(2, 3, DIM), initial_state=(torch.ones(1, 3, 2, 2, 4), None)
            ),
            "kv must have shape",
        ),
        (
            lambda: make(num_heads=2, d_conv=2)(
                inputs(2, 3, DIM), initial_state=(torch.ones(2, 3, 2, 2, 4), None)
            ),
            "None exactly when",
        ),
        (lambda: GatedMLP(0), "in_features"),
        (lambda: GatedMLP(4, multiple_of=0), "multiple_of"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gated_mlp():
    layer = scrambled(GatedMLP(6, bias=True, multiple_of=8)).double()
    assert layer.fc1.weight.shape == (32, 6) and layer.fc2.weight.shape == (6, 16)
    assert GatedMLP(48).fc2.weight.shape == (48, 128)
    assert GatedMLP(6, 10, 4, multiple_of=5).fc2.weight.shape == (4, 10)
    x = inputs(2, 3, 6)
    results = run_with_grads(layer, layer, x)
    y, gate = layer.fc1(x).split(16, -1)
    assert_same(results["output 0"], layer.fc2(y * F.silu(gate)).detach())
    assert all(results[f"grad of {name}"].abs().sum() > 0 for name, _ in layer.named_parameters())


# -- the residual block ----------------------------------------------------------------------------


class Echo(nn.Linear):
    """A mixer that records what it is called with."""

    def __init__(self, dim, dtype=torch.float64):
        super().__init__(dim, dim, dtype=dtype)

    def forward(self, x, inference_params=None, return_final_state=False):
        out = super().forward(x)
        return (out, "state") if return_final_state else out


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
def test_fused_and_unfused_blocks_agree(norm_cls, mlp, fp32):
    def build(fused):
        torch.manual_seed(0)
        kwargs = {"mlp_cls": lambda d: GatedMLP(d, multiple_of=4)} if mlp else {}
        block = Block(
            6,
            lambda d: Echo(d, torch.float32),
            norm_cls=norm_cls,
            fused_add_norm=fused,
            residual_in_fp32=fp32,
            **kwargs,
        )
        assert (block.mlp is not None) is mlp and hasattr(block, "norm2") is mlp
        return scrambled(block)

    hidden, residual = inputs(2, 3, 6).float(), inputs(2, 3, 6, seed=2).float()
    first, second = build(True), build(False)
    for args in ((hidden,), (hidden, residual)):
        expected = run_with_grads(second, second, *args)
        assert_all_same(run_with_grads(first, first, *args), expected)
        hooked = build(True)
        fired = []
        hooked.norm.register_forward_hook(lambda *_, fired=fired: fired.append(1))
        assert_all_same(run_with_grads(hooked, hooked, *args), expected)
        assert fired
    assert first(hidden, return_final_state=True)[2] == "state"


def test_residual_dtypes():
    for fused in (True, False):
        for fp32 in (True, False):
            block = Block(
                6,
                lambda d: Echo(d, torch.bfloat16),
                norm_cls=lambda d: RMSNorm(d, dtype=torch.bfloat16),
                fused_add_norm=fused,
                residual_in_fp32=fp32,
            )
            hidden = inputs(1, 2, 6).bfloat16()
            out, residual = block(hidden)
            assert out.dtype == torch.bfloat16
            assert residual.dtype == (torch.float32 if fp32 else torch.bfloat16)
            out, residual = block(out, residual)
            assert residual.dtype == (torch.float32 if fp32 else torch.bfloat16)


def test_block_options(monkeypatch):
    with pytest.raises(ValueError, match="fused_add_norm=False"):
        Block(6, Echo, norm_cls=nn.Identity, fused_add_norm=True)
    plain = Block(6, Echo, norm_cls=nn.Identity)
    assert_same(plain(inputs(1, 2, 6))[1], inputs(1, 2, 6))
    block = Block(6, lambda d: Echo(d, torch.float32), fused_add_norm=True)
    x = inputs(1, 2, 6).float()
    expected = block(x)
    monkeypatch.setattr(block_module, "layer_norm_fn", None)
    assert_same(block(x), expected)
