"""Installs a wheel into an empty folder and runs its compiled ``_state_update`` there.

    python tools/check_wheel.py dist/mamba_ssm-*-py3-none-linux_x86_64.whl

Prints the versions of what it ran with, one PASS or FAIL line per case, and exits 1 on any FAIL. It
proves that a wheel built on one machine (no GPU, a CPU build of torch) works with the Python, the
torch and the GPU of another. Only torch must be installed already; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path


def install(wheel: Path, target: str) -> None:
    """Unpacks the wheel with pip, which refuses a tag that does not fit this Python or machine."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", target, str(wheel)], check=True)
    sys.path.insert(0, target)


def formula(torch, state, x, dt, A, B, C, D, z, dt_bias):
    """The decode step in fp64, straight from its definition; returns (out, new state)."""
    state, x, dt, A, B, C, D, z, dt_bias = (
        t.double() for t in (state, x, dt, A, B, C, D, z, dt_bias)
    )
    repeats = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(repeats, 1)[:, :, None, :] for t in (B, C))
    dt = torch.nn.functional.softplus(dt + dt_bias)
    state = state * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B
    out = (state * C).sum(-1) + D * x
    return out * torch.nn.functional.silu(z), state


def check_case(torch, device: str, state_dtype, dtype, sizes, A_dtype) -> bool:
    b, h, p, n, g = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    state = random(b, h, p, n, dtype=state_dtype)
    args = (random(b, h, p), random(b, h, p), -random(h, p, n, dtype=A_dtype).abs())
    args += (random(b, g, n), random(b, g, n), random(h, p), random(b, h, p), random(h, p))
    expected, expected_state = formula(torch, state, *args)
    out = torch.ops.mamba_ssm._state_update.default(state, *args, True, None)
    passed = True
    for got, want in ((out, expected), (state, expected_state)):
        # One rounding of the dtype at the largest value, and a few fp32 roundings inside.
        bound = (torch.finfo(got.dtype).eps + 1e-5) * max(1.0, want.abs().max().item())
        passed &= (got.double() - want).abs().max().item() <= bound
    print(
        f"{'PASS' if passed else 'FAIL'} {device} state {state_dtype} inputs {dtype} A {A_dtype} "
        f"(b, h, p, n, g) = {sizes}"
    )
    return passed


def check(torch, devices: list[str]) -> bool:
    from mamba_ssm.ops import native

    passed = True
    for device in devices:
        kind = device.partition(":")[0]
        loaded, reason = native.status()[kind]
        print(f"{device}: {reason}")
        if not (loaded and native.has_kernel("_state_update", kind)):
            print(f"FAIL {device}: no compiled kernel")
            passed = False
            continue
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        for state_dtype in dtypes:
            for dtype in dtypes:
                for sizes in ((2, 1, 1536, 16, 1), (3, 4, 33, 17, 2), (2, 8, 64, 128, 8)):
                    passed &= check_case(torch, device, state_dtype, dtype, sizes, torch.float32)
        passed &= check_case(torch, device, *dtypes[1:], (3, 4, 33, 17, 2), torch.bfloat16)
    return passed


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--devices", help="comma-separated; default: cpu and every CUDA device")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as target:
        install(args.wheel, target)
        import torch

        import mamba_ssm

        assert Path(mamba_ssm.__file__).is_relative_to(target), mamba_ssm.__file__
        print(f"wheel {args.wheel.name}, mamba_ssm {mamba_ssm.__version__}")
        print(f"python {platform.python_version()}, torch {torch.__version__}")
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        for device in cuda:
            print(f"{device}: {torch.cuda.get_device_name(device)}")
        devices = args.devices.split(",") if args.devices else ["cpu", *cuda]
        passed = check(torch, devices)
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
