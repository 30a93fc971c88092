"""What training code does around a model: accelerate, AMP, recomputation, copies, EMA, AdamW.

Distributed training is in tests/test_distributed.py.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from module_helpers import assert_all_same, run_with_grads, scrambled
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from mamba_ssm import Mamba, MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.cuda_graph import DecodingCGCache
from mamba_ssm.utils.optim import param_groups

HYBRID = {"attn_layer_idx": [1], "attn_cfg": {"causal": True, "num_heads": 2}}


def build(device: str = "cpu", **options) -> MambaLMHeadModel:
    torch.manual_seed(0)
    config = MambaConfig(
        **{"d_model": 16, "n_layer": 2, "vocab_size": 24, "ssm_cfg": {"d_state": 4}} | options
    )
    return scrambled(MambaLMHeadModel(config)).to(device).train()


def random_ids(*shape: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randint(0, 24, shape, generator=generator).to(device)


def cyclic_rows(count: int, length: int = 24, device: str = "cpu") -> torch.Tensor:
    """Rows that count upwards from a random start: easily learnt."""
    starts = torch.randint(0, 24, (count, 1), generator=torch.Generator().manual_seed(0))
    return ((starts + torch.arange(length)) % 24).to(device)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerate_loop_learns(precision, recompute, device):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=device == "cpu", mixed_precision=precision)
    assert accelerator.device.type == device
    model = build()
    if recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2)
    loader = DataLoader(TensorDataset(cyclic_rows(240)), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for (ids,) in loader:
        with accelerator.accumulate(model):
            loss = model(ids, labels=ids).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2.5 and losses[-1] < 0.5, losses
    plain = accelerator.unwrap_model(model)
    assert isinstance(plain, MambaLMHeadModel)
    assert all(p.dtype == torch.float32 for p in plain.parameters())


@pytest.mark.parametrize("options", [{}, {"d_intermediate": 32}, HYBRID], ids=str)
def test_recomputation_gives_the_same_gradients(options, device):
    model, ids = build(device, **options), random_ids(2, 11, device=device)
    bounds = torch.tensor([0, 7, 22], dtype=torch.int32, device=device)
    calls = {
        "plain": lambda: model(ids, labels=ids).loss,
        "packed": lambda: model(ids.view(1, -1), labels=ids.view(1, -1), cu_seqlens=bounds).loss,
        "state": lambda: _with_state(model, ids),
        "bf16": lambda: _under_autocast(model, ids),
    }
    if options == HYBRID:
        del calls["state"]
    for name, call in calls.items():
        model.gradient_checkpointing_disable()
        expected = run_with_grads(model, call)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for key, value in run_with_grads(model, call).items():
            assert torch.equal(value, expected[key]), (name, key)


def _with_state(model, ids):
    first = model(ids[:, :5], return_final_state=True)
    return model(ids[:, 5:], initial_state=first.final_state).logits


def _under_autocast(model, ids):
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(ids, labels=ids).loss


def test_recomputation_keeps_less():
    def saved_bytes(recompute):
        model = build(n_layer=8)
        model._set_gradient_checkpointing(recompute)
        kept: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model.backbone(random_ids(4, 256)).sum()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        loss.backward()
        return sum(size for pointer, size in kept.items() if pointer not in parameters)

    assert saved_bytes(True) < 0.25 * saved_bytes(False)


def test_recomputation_is_for_training_only(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "mamba_ssm.models.recompute.checkpoint",
        lambda block, *args, **kwargs: calls.append(1) or block(*args),
    )
    model, ids = build(), random_ids(2, 5)
    model.gradient_checkpointing_enable()
    assert model.backbone.gradient_checkpointing
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert not calls
    model.train()(ids)
    assert len(calls) == 2
    model.gradient_checkpointing_disable()
    model(ids)
    assert len(calls) == 2


@pytest.mark.parametrize("wrong", [{"use_reentrant": True}, {"every": 2}])
def test_unknown_ways_of_recomputing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"only use_reentrant=False, the default here"):
        build().gradient_checkpointing_enable(wrong)


def assert_twins(twin: MambaLMHeadModel, model: MambaLMHeadModel, ids: torch.Tensor) -> None:
    """Equal and independent; tied within itself, marked for the optimizer."""
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.lm_head.weight is twin.backbone.embedding.weight
    assert twin.lm_head.weight is not model.lm_head.weight
    groups = [[tuple(p.shape) for p in g["params"]] for g in param_groups(twin, 0.1)]
    assert groups == [[tuple(p.shape) for p in g["params"]] for g in param_groups(model, 0.1)]
    assert twin.backbone.layers[0].mixer.dt_proj.bias._no_reinit
    with torch.no_grad():
        assert torch.equal(twin.generate(ids, max_length=14), model.generate(ids, max_length=14))
    before = model(ids).logits
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["mamba", "hybrid"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a step"])
def test_copies_pickles_and_whole_modules_in_files(options, used, device):
    model, ids = build(device, **options), random_ids(2, 9, device=device)
    if used:
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.eval().generate(ids, max_length=12)
        model.train()
        # Captured graphs stay behind, here in the place of a GPU's.
        model._decoding_cache = getattr(model, "_decoding_cache", DecodingCGCache(run=lambda: 1))
        assert model._decoding_cache.run is not None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert not used or twin._decoding_cache.run is None
        assert_twins(twin, model, ids)


def test_a_whole_module_opens_in_another_process(tmp_path):
    model, ids = build(), random_ids(2, 9)
    torch.save((model, ids, model(ids).logits.detach()), tmp_path / "model.pt")
    code = (
        "import torch\n"
        "model, ids, logits = torch.load('model.pt', weights_only=False)\n"
        "assert torch.equal(model(ids).logits, logits)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_exponential_moving_average(device):
    model, ids = build(device), random_ids(4, 12, device=device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2)
    expected = None
    for _ in range(4):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        average.update_parameters(model)
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        if expected is None:
            expected = now
        else:
            expected = {name: 0.9 * expected[name] + 0.1 * p for name, p in now.items()}
    averaged = average.module
    assert averaged.lm_head.weight is averaged.backbone.embedding.weight
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7)
    plain = build(device)
    plain.load_state_dict(expected | {"lm_head.weight": expected["backbone.embedding.weight"]})
    torch.testing.assert_close(average(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert averaged.eval().generate(ids, max_length=14).shape == (4, 14)


def test_fused_adamw_with_parameter_groups(device):
    models = build(device), build(device)
    ids = random_ids(4, 12, device=device)
    for model, fused in zip(models, (False, True), strict=True):
        groups = param_groups(model, 0.5)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=fused)
        for _ in range(5):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    for (name, plain), fused in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5, msg=name)


def test_sharded_or_replaced_parameters_are_still_not_decayed():
    """A framework that makes new parameters loses the marks, not the exemption."""
    layer = Mamba(8)
    for name in ("A_log", "D"):
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().clone()))
    assert not hasattr(layer.A_log, "_no_weight_decay")
    decayed, exempt = (group["params"] for group in param_groups(layer, 0.1))
    assert any(p is layer.A_log for p in exempt) and any(p is layer.D for p in exempt)
    assert all(p.dim() == 2 or p.dim() == 3 for p in decayed)

    class Vision(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Mamba(8)

        def no_weight_decay(self):  # timm's way
            return {"pos_embed"}

    assert len(param_groups(Vision(), 0.1)[1]["params"]) == len(exempt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_gradient_scaler(dtype, device):
    model, rows = build(device), cyclic_rows(160, device=device)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    losses = []
    for ids in rows.split(8):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[0] > 2.5 and losses[-1] < 0.7 * losses[0], losses


def test_recomputed_blocks_equal_wrapped_ones():
    """torch's own wrapper around each block does the same as the method."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    model, ids = build(), random_ids(2, 9)
    expected = run_with_grads(model, lambda: model(ids, labels=ids).loss)
    keys = list(model.state_dict())
    layers = model.backbone.layers
    for i, layer in enumerate(layers):
        layers[i] = wrapper.checkpoint_wrapper(layer)
    assert list(model.state_dict()) == keys
    actual = run_with_grads(model, lambda: model(ids, labels=ids).loss)
    actual = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in actual.items()}
    assert_all_same(actual, expected)
