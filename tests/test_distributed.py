"""DDP and FSDP2 with two processes: training as one process does."""

from __future__ import annotations

import distributed_helpers
import pytest
import torch
import torch.multiprocessing as mp


@pytest.mark.slow
@pytest.mark.parametrize("part", distributed_helpers.PARTS)
def test_two_processes_train_as_one(part, device, tmp_path):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"two CUDA devices are needed, there are {torch.cuda.device_count()}")
    mp.spawn(distributed_helpers.worker, (part, str(tmp_path), device), nprocs=2)
    assert (tmp_path / "passed-0").exists() and (tmp_path / "passed-1").exists()
