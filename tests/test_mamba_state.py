"""The Mamba layer's state: chunks, steps, caches, packing and padding, one law each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mamba_cases import OPTIONS, inputs, make, params
from module_helpers import assert_all_same, assert_same, run_with_grads

from mamba_ssm import Mamba
from mamba_ssm.modules.sequence_args import Packing, oldest_input

# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("split", [(3, 6), (1, 8), (2, 0, 3, 4), (1,) * 9])
def test_chunks_equal_one_pass_with_all_gradients(options, split):
    layer, x = make(**options), inputs(2, 9, 6)
    d = layer.d_inner
    conv, ssm = inputs(2, d, layer.d_conv - 1, seed=2), inputs(2, d, layer.d_state, seed=3)

    def whole(x, conv, ssm):
        out, state = layer(x, initial_state=(conv, ssm), return_final_state=True)
        return out, *state

    def chunked(x, conv, ssm):
        state, outs = (conv, ssm), []
        for chunk in x.split(split, dim=1):
            out, state = layer(chunk, initial_state=state, return_final_state=True)
            outs.append(out)
        return torch.cat(outs, 1), *state

    expected = run_with_grads(layer, whole, x, conv, ssm)
    assert_all_same(run_with_grads(layer, chunked, x, conv, ssm), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_equals_forward(options):
    layer, x = make(**options), inputs(3, 8, 6)
    expected, final = layer(x, return_final_state=True)
    with torch.no_grad():
        for sizes in ((1,) * 8, (3, 1, 4), (8,)):
            conv, ssm = layer.allocate_inference_cache(3, 8)
            outs = []
            for chunk in x.split(sizes, dim=1):
                out, new_conv, new_ssm = layer.step(chunk, conv, ssm)
                assert new_conv is conv and new_ssm is ssm
                outs.append(out)
            assert_same(torch.cat(outs, 1), expected.detach())
            assert_same(conv[..., 1:], final[0].detach())
            assert_same(ssm, final[1].detach())


def test_step_is_differentiable():
    layer, x = make(), inputs(2, 6, 6)
    conv, ssm = inputs(2, 12, 4, seed=2), inputs(2, 12, 4, seed=3)

    def whole(x, conv, ssm):
        out, (_, last) = layer(x, initial_state=(conv[..., 1:], ssm), return_final_state=True)
        return out, last

    def stepped(x, conv, ssm):
        outs = []
        for chunk in x.split((1, 2, 1, 2), dim=1):
            out, conv, ssm = layer.step(chunk, conv, ssm)
            outs.append(out)
        return torch.cat(outs, 1), ssm

    expected = run_with_grads(layer, whole, x, conv, ssm)
    assert_all_same(run_with_grads(layer, stepped, x, conv, ssm), expected)


def test_step_with_gradients_still_updates_plain_buffers():
    layer, x = make(), inputs(2, 3, 6)
    conv, ssm = layer.allocate_inference_cache(2, 1)
    leaf = ssm.clone().requires_grad_()
    _, new_conv, new_ssm = layer.step(x, conv, ssm)
    out2, _, _ = layer.step(x, new_conv, new_ssm)
    assert new_ssm.requires_grad and not ssm.requires_grad
    assert_same(conv, new_conv.detach())
    assert_same(ssm, new_ssm.detach())
    out2.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    layer.step(x, conv, leaf)
    assert torch.equal(leaf, torch.zeros_like(leaf))
    with torch.no_grad():
        assert layer.step(x, conv, leaf)[2] is leaf and leaf.any()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert layer.step(x, conv, ssm)[2] is ssm


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_prefill_fills_the_cache_with_the_last_inputs(length):
    layer, x = make(), inputs(2, length, 6)
    cache = params()
    with torch.no_grad():
        out = layer(x, cache)
    assert_same(out, layer(x).detach())
    conv, ssm = cache.key_value_memory_dict[0]
    raw = layer.in_proj(x).transpose(1, 2)[:, :12].detach()
    assert_same(conv, F.pad(raw, (4, 0))[..., -4:])
    assert_same(ssm, layer(x, return_final_state=True)[1][1].detach())


@pytest.mark.parametrize("grad", [True, False])
def test_continuing_from_the_cache_equals_one_pass(grad):
    layer, x = make(), inputs(2, 12, 6)
    expected = layer(x).detach()
    cache = params()
    layer._get_states_from_cache(cache, 2)
    buffers = cache.key_value_memory_dict[0]
    outs = []
    with torch.set_grad_enabled(grad):
        for chunk in x.split((3, 1, 5, 1, 2), dim=1):
            outs.append(layer(chunk, cache))
            cache.seqlen_offset += chunk.shape[1]
    assert_same(torch.cat(outs, 1).detach(), expected)
    assert cache.key_value_memory_dict[0] is buffers and not buffers[0].requires_grad
    assert_same(buffers[0], layer.in_proj(x).transpose(1, 2)[:, :12, -4:].detach())
    if grad:  # nothing that a call read for its gradient was overwritten
        mask = torch.ones(2, 3)
        mask[0, 1] = 0
        outs.append(layer(x[:, :3], cache, attention_mask=mask))
        torch.cat(outs, 1).sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    # A new prefill must not see what was there.
    cache.seqlen_offset = 0
    assert_same(layer(x, cache).detach(), expected)


def test_prefill_from_a_given_state_and_rows_of_a_larger_cache():
    layer, x = make(), inputs(2, 9, 6)
    expected, final = layer(x, return_final_state=True)
    _, state = layer(x[:, :2], return_final_state=True)
    cache = params()
    cache.key_value_memory_dict[0] = layer.allocate_inference_cache(5, 1)
    cache.batch_size_offset = 3
    with torch.no_grad():
        first, again = layer(x[:, 2:5], cache, initial_state=state, return_final_state=True)
        cache.seqlen_offset = 3
        second = layer(x[:, 5:], cache)
    assert_same(torch.cat([first, second], 1), expected[:, 2:].detach())
    conv, ssm = cache.key_value_memory_dict[0]
    assert_same(ssm[3:], final[1].detach())
    assert_same(conv[3:, :, 1:], final[0].detach())
    assert not conv[:3].any() and not ssm[:3].any() and again[1].shape == (2, 12, 4)
    short = params()
    with torch.no_grad():
        layer(x[:, 2:4], short, initial_state=state)
    raw = layer.in_proj(x[:, :4]).transpose(1, 2)[:, :12].detach()
    assert_same(short.key_value_memory_dict[0][0], raw)
    states = layer._get_states_from_cache(cache, 2, initialize_states=True)
    assert not states[0].any() and not ssm.any()


def test_cache_dtypes():
    layer = Mamba(6, layer_idx=0, dtype=torch.bfloat16)
    conv, ssm = layer.allocate_inference_cache(2, 100)
    assert (conv.shape, conv.dtype) == ((2, 12, 4), torch.bfloat16)
    assert (ssm.shape, ssm.dtype) == ((2, 12, 16), torch.bfloat16)
    conv, ssm = layer.allocate_inference_cache(2, 100, dtype=torch.float32)
    assert conv.dtype == ssm.dtype == torch.float32
    x = inputs(2, 5, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        whole = layer(x)
        steps = [layer.step(t, conv, ssm)[0] for t in x.split(1, 1)]
    assert (torch.cat(steps, 1) - whole).abs().max() <= 0.04 * whole.abs().max()


# -- packing and padding ---------------------------------------------------------------------------

LENGTHS = (4, 1, 0, 7, 2)


def _packed_inputs():
    return inputs(1, sum(LENGTHS), 6), inputs(5, 12, 3, seed=2), inputs(5, 12, 4, seed=3)


def _separately(layer):
    def run(x, conv, ssm):
        outs, convs, ssms = [], [], []
        for i, part in enumerate(x.split(LENGTHS, dim=1)):
            out, (c, s) = layer(
                part, initial_state=(conv[i : i + 1], ssm[i : i + 1]), return_final_state=True
            )
            outs.append(out)
            convs.append(c)
            ssms.append(s)
        return torch.cat(outs, 1), torch.cat(convs), torch.cat(ssms)

    return run


@pytest.mark.parametrize("form", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_equal_each_alone(form):
    layer = make()
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    ids = torch.arange(5, dtype=torch.int32).repeat_interleave(torch.tensor(LENGTHS))[None]
    packing = {"cu_seqlens": bounds} if form == "cu_seqlens" else {"seq_idx": ids}

    def packed(x, conv, ssm):
        out, state = layer(x, initial_state=(conv, ssm), return_final_state=True, **packing)
        return out, *state

    leaves = _packed_inputs()
    expected = run_with_grads(layer, _separately(layer), *leaves)
    assert_all_same(run_with_grads(layer, packed, *leaves), expected)

    x = leaves[0]
    alone = [layer(part) for part in x.split(LENGTHS, dim=1)]
    assert_same(layer(x, **packing).detach(), torch.cat(alone, 1).detach())


def test_packed_prefill_fills_one_cache_row_for_each_sequence():
    layer, (x, _, _) = make(), _packed_inputs()
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0)
    cache = params()
    with torch.no_grad():
        layer(x, cache, cu_seqlens=bounds)
        for i, part in enumerate(x.split(LENGTHS, dim=1)):
            alone = params()
            layer(part, alone)
            for kept, expected in zip(
                cache.key_value_memory_dict[0], alone.key_value_memory_dict[0], strict=True
            ):
                assert_same(kept[i : i + 1], expected)


MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [1] * 7, [0, 0, 1, 1, 1, 0, 0]])


def test_padded_equals_unpadded():
    layer, x = make(), inputs(4, 7, 6)
    conv, ssm = inputs(4, 12, 3, seed=2), inputs(4, 12, 4, seed=3)

    def padded(x, conv, ssm):
        out, state = layer(
            x, initial_state=(conv, ssm), return_final_state=True, attention_mask=MASK
        )
        return out[MASK.bool()], *state

    def alone(x, conv, ssm):
        parts = []
        for i in range(4):
            state = (conv[i : i + 1], ssm[i : i + 1])
            row = x[i : i + 1, MASK[i].bool()]
            out, (c, s) = layer(row, initial_state=state, return_final_state=True)
            parts.append((out[0], c, s))
        return tuple(torch.cat(p) for p in zip(*parts, strict=True))

    expected = run_with_grads(layer, alone, x, conv, ssm)
    assert_all_same(run_with_grads(layer, padded, x, conv, ssm), expected)
    poisoned = x.masked_fill(~MASK.bool()[..., None], 1e30)
    out = layer(poisoned, attention_mask=MASK.bool())
    assert_same(out[MASK.bool()].detach(), layer(x, attention_mask=MASK)[MASK.bool()].detach())


@pytest.mark.parametrize("split", [(7,), (2, 5), (1,) * 7])
def test_padded_prompts_leave_the_cache_of_unpadded_ones(split):
    layer, x = make(), inputs(4, 7, 6)
    cache = params()
    with torch.no_grad():
        start = 0
        for size in split:
            part = slice(start, start + size)
            layer(x[:, part], cache, attention_mask=MASK[:, part])
            start = cache.seqlen_offset = start + size
        for i in range(4):
            alone = params()
            layer(x[i : i + 1, MASK[i].bool()], alone)
            for kept, expected in zip(
                cache.key_value_memory_dict[0], alone.key_value_memory_dict[0], strict=True
            ):
                assert_same(kept[i : i + 1], expected)


def test_oldest_input_over_any_packing():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 4):
        ids = torch.randint(-1, 3, (2, 9), generator=generator).sort(dim=1).values
        ids = torch.where((ids >= 0) & (torch.arange(2)[:, None] > 0), ids + 3, ids)
        x, old = inputs(2, 5, 9), inputs(7, 5, width, seed=2)
        actual = oldest_input(x, old, width, Packing(ids.to(torch.int32), 7))
        for row in range(7):
            where = [(b, t) for b in range(2) for t in range(9) if ids[b, t] == row]
            history = [*old[row].unbind(-1), *(x[b, :, t] for b, t in where)]
            assert torch.equal(actual[row], history[-width]), (width, row)
