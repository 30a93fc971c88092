"""What each process of the distributed tests runs: DDP and FSDP2 against one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from module_helpers import assert_same
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.optim import param_groups

WORLD, STEPS = 2, 3


def build(device: str = "cpu") -> MambaLMHeadModel:
    """The same small model in every process."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=24, ssm_cfg={"d_state": 4})
    return MambaLMHeadModel(config).to(device).train()


def batches(device: str) -> list[torch.Tensor]:
    """The whole batches; each process takes its rows."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 24, (2 * WORLD, 12), generator=generator).to(device) for _ in range(3)]


def train(model: nn.Module, rows: slice, device: str, autocast: bool = False) -> list[float]:
    """STEPS optimizer steps on these rows of every batch; the losses."""
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2)
    losses = []
    for ids in batches(device)[:STEPS]:
        optimizer.zero_grad()
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=autocast):
            loss = model(ids[rows], labels=ids[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _rows(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def _assert_trained_alike(values: dict[str, torch.Tensor], device: str) -> None:
    alone = build(device)
    train(alone, slice(None), device)
    expected = alone.state_dict()
    assert values.keys() == expected.keys(), (sorted(values), sorted(expected))
    # Adam divides by the gradient's size, so a rounding in a tiny gradient is a rounding of the
    # step: half a per cent of the way that the parameters went.
    start = build(device).state_dict()
    for name, value in values.items():
        way = (expected[name] - start[name]).abs().max().item()
        assert way > 1e-3, name
        off = (value.to(device) - expected[name]).abs().max().item()
        assert off <= 5e-3 * way, f"{name}: off by {off:.2e} of {way:.2e}"


def _ddp(rank: int, device: str) -> None:
    for recompute in (False, True):
        model = build(device)
        if recompute:
            model.gradient_checkpointing_enable()
        ids = [rank] if device.startswith("cuda") else None
        wrapped = DistributedDataParallel(model, device_ids=ids)
        train(wrapped, _rows(rank), device)
        _assert_trained_alike(model.state_dict(), device)


def sharded(model: MambaLMHeadModel, **options) -> MambaLMHeadModel:
    """FSDP2: a group for each block, and one for what is left (embedding, last norm, head)."""
    for layer in model.backbone.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _fsdp(rank: int, device: str) -> None:
    full = StateDictOptions(full_state_dict=True)
    for recompute in (False, True):
        model = sharded(build(device))
        if recompute:
            model.gradient_checkpointing_enable()
        decayed = {id(p) for p in param_groups(model, 0.1)[0]["params"]}
        for layer in model.backbone.layers:
            assert id(layer.mixer.A_log) not in decayed and id(layer.mixer.D) not in decayed
            assert id(layer.mixer.in_proj.weight) in decayed
        train(model, _rows(rank), device)
        assert type(model.backbone.layers[0].mixer.A_log.data).__name__ == "DTensor"
        _assert_trained_alike(get_model_state_dict(model, options=full), device)


def _fsdp_in_bf16(rank: int, device: str) -> None:
    """Mixed precision by FSDP's policy and by autocast: both train, near the fp32 losses."""
    exact = train(build(device), slice(None), device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for model, autocast in ((sharded(build(device), mp_policy=policy), False),
                            (sharded(build(device)), True)):  # fmt: skip
        losses = torch.tensor(train(model, _rows(rank), device, autocast), device=device)
        dist.all_reduce(losses)
        expected = torch.tensor(exact, device=device)
        torch.testing.assert_close(losses / WORLD, expected, rtol=0.02, atol=0.0)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def _fsdp_from_meta(rank: int, device: str) -> None:
    """Built on "meta", sharded, then initialised: delta keeps its range and A its decays."""
    with torch.device("meta"):
        model = build("meta")
    model = sharded(model)
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for layer in model.backbone.layers:
        dt = F.softplus(layer.mixer.dt_proj.bias.full_tensor())
        assert ((dt > 0.9e-4) & (dt < 0.11)).all(), dt
        decays = layer.mixer.A_log.full_tensor().exp()
        expected = torch.arange(1.0, 5.0, device=decays.device).expand_as(decays)
        assert_same(decays, expected)
    assert torch.isfinite(torch.tensor(train(model, _rows(rank), device))).all()


PARTS: dict[str, Callable[[int, str], None]] = {
    "ddp": _ddp,
    "fsdp2": _fsdp,
    "fsdp2 in bf16": _fsdp_in_bf16,
    "fsdp2 from meta": _fsdp_from_meta,
}


def worker(rank: int, part: str, folder: str, device_type: str) -> None:
    """One process: join the group, run the part, leave a mark."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    device = "cpu"
    if device_type == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
    )
    try:
        PARTS[part](rank, device)
        dist.barrier()
        Path(folder, f"passed-{rank}").touch()
    finally:
        dist.destroy_process_group()
