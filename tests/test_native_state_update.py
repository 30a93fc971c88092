"""The compiled ``_state_update`` against the reference: layouts, dtypes, states and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_close_to_oracle, to_double

from mamba_ssm.ops import native, schema  # noqa: F401  (schema defines the ops)

OP = torch.ops.mamba_ssm._state_update
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


@pytest.fixture(autouse=True)
def needs_kernel(request):
    device = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    if not native.has_kernel("_state_update", device):
        pytest.skip(f"no native kernel on {device}: {native.status()[device][1]}")


def make_args(b=2, h=2, p=5, n=16, g=1, rows=None, dtypes=(F32,), device="cpu", seed=0, **changes):
    """Random arguments; ``dtypes`` are dealt out to the tensors in turn."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "state": (b if rows is None else rows, h, p, n), "x": (b, h, p), "dt": (b, h, p),
        "A": (h, p, n), "B": (b, g, n), "C": (b, g, n), "D": (h, p), "z": (b, h, p),
        "dt_bias": (h, p),
    }  # fmt: skip
    args = {}
    for (name, shape), dtype in zip(shapes.items(), itertools.cycle(dtypes), strict=False):
        value = torch.randn(shape, generator=generator)
        args[name] = (-value.abs() if name == "A" else value).to(device, dtype)
    args["dt_softplus"] = True
    args["state_batch_indices"] = None
    args.update(changes)
    return args


def copied(args):
    """The same values with the same strides; the state in memory of its own."""
    state = args["state"]
    own = torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=state.device)
    return {**args, "state": own.copy_(state)}


def check(args):
    """Native against reference and fp64 oracle, in the output and in the state."""
    plain, oracle = copied(args), {name: to_double(value) for name, value in args.items()}
    actual = OP.default(*args.values())
    expected = OP.reference(*plain.values())
    exact = OP.reference(*oracle.values())
    assert actual.is_contiguous() and actual.dtype == args["x"].dtype
    assert_close_to_oracle(actual, expected, exact, "out")
    assert_close_to_oracle(args["state"], plain["state"], oracle["state"], "state")


SIZES = [
    {},
    {"b": 1, "h": 1, "p": 1, "n": 1},
    {"n": 3},
    {"n": 17},
    {"n": 64, "h": 1, "p": 65},
    {"n": 256, "p": 3},
    {"n": 300, "p": 2},
    {"h": 1, "p": 130},
    {"h": 6, "g": 3},
    {"h": 4, "g": 4, "p": 1},
    {"b": 5, "h": 3, "p": 7, "n": 2, "g": 3},
    {"n": 0},
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, device):
    check(make_args(device=device, **size))


@pytest.mark.parametrize("size", [{"b": 0}, {"h": 0}, {"p": 0}], ids=str)
def test_empty(size, device):
    args = make_args(device=device, **size)
    assert OP.default(*args.values()).shape == args["x"].shape


@pytest.mark.parametrize(
    "dtypes",
    [(F16,), (BF16,), (F32, BF16), (F16, F32), (F32, F16, BF16), (BF16, BF16, F32, F16)],
    ids=str,
)
@pytest.mark.parametrize("n", [3, 16])
def test_dtype_mixes(dtypes, n, device):
    check(make_args(h=4, g=2, n=n, dtypes=dtypes, device=device))


@pytest.mark.parametrize("state_dtype", [F32, F16, BF16], ids=str)
def test_serving_mix(state_dtype, device):
    """What transformers calls: a state of its own dtype, bf16 activations, fp32 A and dt_bias."""
    args = make_args(dtypes=(BF16,), device=device)
    args["state"] = args["state"].to(state_dtype)
    args["A"], args["dt_bias"] = args["A"].float(), args["dt_bias"].float()
    check(args)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias"])
def test_optional_arguments(absent, device):
    check(make_args(device=device, **{absent: None}))
    check(make_args(device=device, D=None, z=None, dt_bias=None, dt_softplus=False))


def test_expanded_arguments(device):
    """Mamba-2 style calls expand A, dt, D and dt_bias with stride 0."""
    b, h, p, n = 2, 4, 6, 16
    args = make_args(b=b, h=h, p=p, n=n, g=2, device=device)
    args["A"] = args["A"][:, :1, :1].expand(h, p, n)
    args["dt"] = args["dt"][:, :, :1].expand(b, h, p)
    args["D"], args["dt_bias"] = (args[k][:, :1].expand(h, p) for k in ("D", "dt_bias"))
    args["B"] = args["B"][:1].expand(b, 2, n)
    check(args)


def test_strided_arguments(device):
    args = make_args(h=3, p=5, n=8, device=device)
    for name in ("state", "A", "B", "C"):
        args[name] = args[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    for name in ("x", "dt", "z"):
        args[name] = torch.stack([args[name]] * 3, dim=-1)[..., 1]
    check(args)


def test_state_batch_indices(device):
    indices = torch.tensor([4, -1, 0, 2], dtype=torch.int32, device=device)
    args = make_args(b=4, rows=6, device=device, state_batch_indices=indices)
    before = args["state"].clone()
    check(args)
    untouched = [1, 3, 5]
    assert torch.equal(args["state"][untouched], before[untouched])
    assert not torch.equal(args["state"][4], before[4])
    again = copied(args)
    assert OP.default(*again.values())[1].eq(0).all()
    args["state_batch_indices"] = indices.repeat_interleave(2)[::2]
    check(args)


def test_softplus_range(device):
    """Small results keep their precision, and above 20 softplus is the identity."""
    dt = torch.tensor([-80.0, -40.0, -20.0, -1e-3, 0.0, 1e-3, 5.0, 19.99, 20.01, 60.0])
    args = make_args(b=1, h=1, p=dt.numel(), n=1, device=device, dt_bias=None, z=None, D=None)
    args["dt"] = dt.view(1, 1, -1).to(device)
    args["x"], args["B"], args["C"] = (torch.ones_like(args[k]) for k in ("x", "B", "C"))
    args["A"] = torch.zeros_like(args["A"])
    args["state"] = torch.zeros_like(args["state"])
    out = OP.default(*args.values()).cpu().flatten()
    exact = torch.nn.functional.softplus(dt.double())
    assert ((out.double() - exact).abs() <= 4e-7 * exact).all(), (out, exact)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_16_bit_value_is_read_and_written_exactly(dtype, device):
    state = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).to(device)
    p = state.numel()
    zeros, ones = torch.zeros(1, 1, p, device=device), torch.ones(1, 1, 1, device=device)
    args = {
        "state": state.view(1, 1, p, 1).clone(), "x": zeros, "dt": zeros,
        "A": zeros.view(1, p, 1), "B": ones, "C": ones, "D": None, "z": None, "dt_bias": None,
        "dt_softplus": False, "state_batch_indices": None,
    }  # fmt: skip
    out = OP.default(*args.values())
    torch.testing.assert_close(out.flatten(), state.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(args["state"].flatten(), state, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_rounding_to_16_bits_is_to_nearest_even(dtype, device):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 20, (20000,), generator=generator)
    x = torch.ldexp(torch.randn(20000, generator=generator), exponents)
    ties = torch.ldexp(torch.arange(1.0, 4097), torch.tensor(-26))
    limits = torch.tensor([65504.0, 65519.9, 65520.0, 65536.0, float("inf"), float("nan"), -0.0])
    x = torch.cat([x, ties, -ties, 1 + ties * 2**14, limits]).to(device)
    p = x.numel()
    ones = torch.ones(1, 1, p, device=device)
    args = make_args(b=1, h=1, p=p, n=1, device=device, D=None, z=None, dt_bias=None)
    args |= {"x": x.view(1, 1, p), "dt": ones, "dt_softplus": False, "A": 0 * args["A"]}
    args |= {"B": ones[..., :1], "C": ones[..., :1], "state": (0 * args["state"]).to(dtype)}
    out = OP.default(*args.values())
    torch.testing.assert_close(args["state"].flatten(), x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out.flatten(), x, rtol=0, atol=0, equal_nan=True)


def test_output_uses_the_unrounded_state(device):
    args = make_args(n=1, h=1, p=64, device=device, D=None, z=None)
    args["state"] = args["state"].to(BF16)
    args["C"] = torch.ones_like(args["C"])
    out = OP.default(*args.values())
    assert not torch.equal(out.flatten(), args["state"].float().flatten())
    assert torch.equal(out.to(BF16).flatten(), args["state"].flatten())


def test_same_bits_every_time_and_for_any_number_of_threads(device):
    args = make_args(b=3, h=2, p=700, n=33, device=device)
    results = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run = copied(args)
            results.append((OP.default(*run.values()), run["state"]))
        finally:
            torch.set_num_threads(before)
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(state, results[0][1])


def test_opcheck(device):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OP.default, tuple(make_args(device=device).values()), test_utils=checks)


BAD_CALLS = [
    ({"state": torch.zeros(2, 5, 16)}, r"state must have 4 dimensions .* got shape \(2, 5, 16\)"),
    ({"x": torch.zeros(2, 5)}, r"x must have 3 dimensions"),
    ({"B": torch.zeros(2, 16)}, r"B must have 3 dimensions"),
    ({"dt": torch.zeros(2, 2, 4)}, r"dt must have shape \(2, 2, 5\), got \(2, 2, 4\)"),
    ({"A": torch.zeros(2, 5, 15)}, r"A must have shape \(2, 5, 16\), got \(2, 5, 15\)"),
    ({"C": torch.zeros(2, 2, 16)}, r"C must have shape \(2, 1, 16\)"),
    ({"D": torch.zeros(5)}, r"D must have shape \(2, 5\), got \(5\)"),
    ({"B": torch.zeros(2, 3, 16)}, r"number of heads, 2, must be a multiple of .* groups .* 3"),
    ({"z": torch.zeros(2, 2, 5).double()}, r"z must be float32, float16 or bfloat16, got Double"),
    ({"state": torch.zeros(3, 2, 5, 16)}, r"state has 3 rows but x has 2"),
    ({"state": torch.zeros(1, 2, 5, 16).expand(2, 2, 5, 16)}, r"state .* must not be expanded"),
    ({"state_batch_indices": torch.tensor([0, 1])}, r"must be int32, got Long"),
    ({"state_batch_indices": torch.tensor([0], dtype=torch.int32)}, r"must have shape \(2\)"),
    ({"state_batch_indices": torch.tensor([0, 2], dtype=torch.int32)}, r"\[1\] is 2 .* 2 rows"),
    ({"state_batch_indices": torch.tensor([1, 1], dtype=torch.int32)}, r"row 1 more than once"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CALLS)
def test_bad_call_says_what_is_wrong_and_writes_nothing(changes, message):
    args = make_args()
    args.update(changes)
    before = args["state"].clone()
    with pytest.raises(RuntimeError, match=message):
        OP.default(*args.values())
    assert torch.equal(args["state"], before)
