"""torch.export of the forward and of the decode step, saved, loaded and run; AOTInductor."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from module_helpers import assert_same, scrambled
from torch import nn
from torch.export import Dim
from torch.torch_version import TorchVersion

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams

SHAPES = ((2, 9), (1, 1), (3, 33), (1, 200), (5, 2))


def model_on(device: str, dtype: torch.dtype = torch.float32) -> MambaLMHeadModel:
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=24, ssm_cfg={"d_state": 4})
    return scrambled(MambaLMHeadModel(config)).to(device, dtype).eval()


def random_ids(*shape: int, device: str) -> torch.Tensor:
    return torch.randint(0, 24, shape, generator=torch.Generator().manual_seed(1)).to(device)


class Logits(nn.Module):
    """A model whose result is one tensor."""

    def __init__(self, model: MambaLMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids).logits


class Step(nn.Module):
    """The decode step as a function of ids (b, 1) and the layers' caches, changed in place."""

    def __init__(self, model: MambaLMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids, caches):
        cache = InferenceParams(max_seqlen=1, max_batch_size=input_ids.shape[0], seqlen_offset=1)
        cache.key_value_memory_dict = dict(enumerate(caches))
        return self.model(input_ids, inference_params=cache).logits[:, -1]


def saved_and_loaded(program: torch.export.ExportedProgram) -> nn.Module:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def run_python(code: str, folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """The code in a new process with this package and the tests importable."""
    tests = Path(__file__).resolve().parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests))),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_forward_of_any_batch_and_length(strict, backend, device):
    model = model_on(device)
    model(random_ids(2, 9, device=device))  # a backend that does not serve it says so here
    program = torch.export.export(
        model,
        (random_ids(2, 9, device=device),),
        dynamic_shapes={"input_ids": {0: Dim("batch"), 1: Dim("length")}},
        strict=strict,
    )
    loaded = saved_and_loaded(program)
    for shape in SHAPES:
        ids = random_ids(*shape, device=device)
        result = loaded(ids)
        assert type(result).__name__ == "CausalLMOutput"
        assert_same(result.logits, model(ids).logits)


@torch.no_grad()
def test_decode_step(device):
    model = model_on(device)
    ids = random_ids(2, 9, device=device)
    caches = list(model.allocate_inference_cache(2, 9).values())
    batch = Dim("batch")
    program = torch.export.export(
        Step(model),
        (ids[:, :1], caches),
        dynamic_shapes=({0: batch}, [({0: batch}, {0: batch}) for _ in caches]),
    )
    loaded = saved_and_loaded(program)
    for rows in (1, 2, 4):
        ids = random_ids(rows, 9, device=device)
        caches = list(model.allocate_inference_cache(rows, 9).values())
        logits = torch.stack([loaded(ids[:, t : t + 1], caches) for t in range(9)], 1)
        assert_same(logits, model(ids).logits)


@torch.no_grad()
def test_chunks_with_a_state(device):
    model = model_on(device)

    class Chunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, state):
            out = self.model(input_ids, initial_state=state, return_final_state=True)
            return out.logits, out.final_state

    ids = random_ids(2, 60, device=device)
    caches = model.allocate_inference_cache(2, 0).values()
    state = [(conv[..., 1:].clone(), ssm) for conv, ssm in caches]
    length = Dim("length", min=4)
    program = torch.export.export(
        Chunk(),
        (ids[:, :9].contiguous(), state),
        dynamic_shapes=({1: length}, [(None, None) for _ in state]),
    )
    loaded, outs = saved_and_loaded(program), []
    for chunk in ids.split([7, 40, 13], 1):
        logits, state = loaded(chunk, state)
        outs.append(logits)
    assert_same(torch.cat(outs, 1), model(ids).logits)


@torch.no_grad()
def test_a_fresh_process_runs_it_after_importing_the_package(tmp_path):
    model, ids = model_on("cpu"), random_ids(2, 9, device="cpu")
    torch.export.save(torch.export.export(model, (ids,)), tmp_path / "model.pt2")
    torch.save((ids, model(ids).logits), tmp_path / "expected.pt")
    code = (
        "import torch, mamba_ssm.models.mixer_seq_simple\n"
        "ids, logits = torch.load('expected.pt')\n"
        "loaded = torch.export.load('model.pt2').module()\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(loaded(ids).logits, logits)\n"
    )
    result = run_python(code, tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


def packaged_and_run(folder: str, device: str, dtype: torch.dtype) -> None:
    """Makes an AOTInductor package of a model, loads it, and compares: what the child runs."""
    model = model_on(device, dtype)
    with torch.no_grad():
        program = torch.export.export(
            Logits(model),
            (random_ids(2, 9, device=device),),
            dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},),
        )
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        loaded = torch._inductor.aoti_load_package(path)
        for shape in SHAPES:
            ids = random_ids(*shape, device=device)
            logits, expected = loaded(ids), model(ids).logits
            if dtype == torch.float32:
                assert_same(logits, expected)
            else:  # generated code rounds to bf16 in other places
                assert logits.dtype == dtype
                assert (logits - expected).norm() <= 2.0**-6 * expected.norm(), shape


def links_the_shared_library(compiler: str, folder: Path) -> bool:
    """Whether what the compiler links takes the C++ library that torch has loaded already.

    torch's packages parse their device with std::regex. With another C++ library inside, that ends
    in a segmentation fault when a package is loaded, whatever the model.
    """
    source, output = folder / "probe.cpp", folder / "probe.so"
    source.write_text('#include <regex>\nstd::regex probe() { return std::regex("[a-z]"); }\n')
    command = [compiler, "-shared", "-fPIC", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode == 0 and any(
        name in output.read_bytes() for name in (b"libstdc++.so", b"libc++.so", b"libc++.1.dylib")
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aot_inductor_package(tmp_path, dtype, device, monkeypatch):
    """In a process of its own: a fault in a package's code would end this one."""
    if dtype == torch.bfloat16 and torch.__version__ < TorchVersion("2.13"):
        # Measured: 2.11 fails, 2.13 does not.
        pytest.skip(f"AOTInductor of torch {torch.__version__} hands float32 to an op as float64")
    named = [os.environ[name] for name in ("CXX",) if name in os.environ]
    compilers = [name for name in (*named, "g++", "clang++") if shutil.which(name)]
    fitting = [name for name in compilers if links_the_shared_library(name, tmp_path)]
    if not fitting:
        pytest.skip(f"none of {compilers} links the shared C++ library, which packages need")
    monkeypatch.setenv("CXX", fitting[0])
    code = (
        "import torch, test_export\n"
        f"test_export.packaged_and_run({str(tmp_path)!r}, {device!r}, {dtype})\n"
    )
    result = run_python(code, tmp_path, timeout=240)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-6000:]}"
