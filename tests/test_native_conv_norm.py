"""The compiled convolution and norms beyond their op tests: instruction sets, threads, pieces."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_oracle, to_double

from mamba_ssm.ops import native, schema  # noqa: F401  (schema defines the ops)
from mamba_ssm.ops.layout import is_channel_last

OPS = torch.ops.mamba_ssm
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ISAS = native.available_cpu_isas() if native.status()["cpu"][0] else []


@pytest.fixture(autouse=True)
def needs_kernels():
    for name in ("_causal_conv1d_fwd", "_add_norm_fwd"):
        if not native.has_kernel(name, "cpu"):
            pytest.skip(f"no native {name} on the CPU: {native.status()['cpu'][1]}")


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that this machine has, in turn."""
    native.force_cpu_isa(request.param)
    yield request.param
    native.force_cpu_isa("auto")


def laid_out(x, layout):
    """x (b,d,l) with the same values in other memory."""
    if layout == "channel last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part of channel last":
        return (
            torch.cat([x, x], dim=1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]]
        )
    if layout == "every other step":
        return x.repeat_interleave(2, dim=2)[..., ::2]
    return x.contiguous()


def conv_args(b=2, d=37, l=45, w=4, dtype=F32, weight_dtype=F32, layout="contiguous", packed=False,
              states=True, bias=True, silu=True):  # fmt: skip
    """Arguments of _causal_conv1d_fwd; ``packed`` with the sequence numbers PACKED."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    seq_idx, num_states = None, b
    if packed:
        seq_idx = torch.tensor(PACKED, dtype=torch.int32)
        (b, l), num_states = seq_idx.shape, int(seq_idx.max().clamp(min=0)) + 2
    return (
        laid_out(rand(b, d, l), layout),
        rand(d, w, dtype=weight_dtype),
        rand(d, dtype=weight_dtype) if bias else None,
        rand(num_states, d, w - 1) if states else None,
        seq_idx,
        num_states,
        silu,
    )


def strides(t):
    """Those that matter: of dimensions longer than 1."""
    return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def compare(op, args):
    """Native against reference and oracle; strides too. Returns the native results."""
    doubles = tuple(map(to_double, args))
    actual, expected, exact = op.default(*args), op.reference(*args), op.reference(*doubles)
    if isinstance(actual, torch.Tensor):
        actual, expected, exact = (actual,), (expected,), (exact,)
    for i, (got, plain, oracle) in enumerate(zip(actual, expected, exact, strict=True)):
        assert strides(got) == strides(plain), f"result {i} of {op}"
        assert_close_to_oracle(got, plain, oracle, f"result {i} of {op}")
    return actual


def compare_conv(args, dout=None):
    x = args[0]
    _, final = compare(OPS._causal_conv1d_fwd, args)
    generator = torch.Generator().manual_seed(1)
    if dout is None:
        dout = laid_out(torch.randn(x.shape, generator=generator).to(x.dtype), "channel last")
    dfinal = torch.randn(final.shape, generator=generator).to(x.dtype)
    for more in (dfinal, None):
        compare(OPS._causal_conv1d_bwd, (dout, more, *args))


# Long enough for several pieces of time and blocks of channels, short runs and padding in between.
PACKED = [
    [0] * 150 + [-1] * 2 + [0] * 3 + [-1] * 140 + [0, -1, 0] + [1] * 2 + [-1, 1] + [2] + [0] * 30,
    [4] * 129 + [5] * 128 + [-1] + [5] + [6] * 66 + [9] * 6 + [0] * 2,
]
CONV_ROWS = (
    [{"w": w, "layout": layout} for w in (1, 2, 3, 4, 5)
     for layout in ("contiguous", "channel last")]
    + [{"layout": "part of channel last"}, {"layout": "every other step"}]
    + [{"dtype": dtype, "layout": layout, "w": 3, "weight_dtype": weight_dtype}
       for dtype, weight_dtype in ((F16, F32), (BF16, BF16), (F16, BF16))
       for layout in ("contiguous", "channel last")]
    + [{"b": 1, "d": 2, "l": 2100}, {"b": 1, "d": 270, "l": 260, "layout": "channel last"}]
    + [{"l": l, "layout": layout, "d": 20} for l in (1, 2, 3, 129)
       for layout in ("contiguous", "channel last")]
    + [{"packed": True, "d": 19, "layout": layout, "dtype": dtype}
       for dtype in (F32, BF16) for layout in ("contiguous", "channel last")]
    + [{"packed": True, "d": 19, "layout": "channel last", "states": False, "bias": False,
        "silu": False, "w": 2}]
)  # fmt: skip


@pytest.mark.parametrize("row", CONV_ROWS, ids=str)
def test_convolution(row, isa):
    compare_conv(conv_args(**row))


@pytest.mark.parametrize("layout", ["contiguous", "channel last"])
def test_gradients_of_any_layout_and_dtype_come_in(layout):
    args = conv_args(dtype=BF16, layout=layout)
    shape = args[0].shape
    for dout in (
        torch.randn(shape),
        torch.ones(1, dtype=BF16).expand(shape),
        torch.randn(shape[::-1]).bfloat16().permute(2, 1, 0),
    ):
        compare_conv(args, dout)


@pytest.mark.parametrize("columns,ring", [(4, False), (3, False), (6, False), (6, True), (3, True)])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, BF16)], ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_update(columns, ring, dtypes, length, isa):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    for d in (1, 6, 131):
        indices = torch.tensor([5, -1, 0], dtype=torch.int64)
        start = torch.tensor([2, 7, 101], dtype=torch.int16) if ring else None
        x, weight, bias = (
            rand(3, d, length, dtype=dtypes[0]),
            rand(d, 4, dtype=dtypes[1]),
            rand(d, dtype=F32),
        )
        state = rand(6, d, columns, dtype=dtypes[0])
        states = [state.clone(), state.clone(), state.double()]
        args = [(weight, bias, True, start, indices)] * 2
        args.append((weight.double(), bias.double(), True, start, indices))
        native_out, plain, exact = (
            op(to_double(x) if s.dtype == torch.float64 else x, s, *rest)
            for op, s, rest in zip(
                (OPS._causal_conv1d_update.default, *[OPS._causal_conv1d_update.reference] * 2),
                states,
                args,
                strict=True,
            )
        )
        assert native_out[1].eq(0).all() and native_out.is_contiguous()
        assert_close_to_oracle(native_out, plain, exact, "out")
        assert torch.equal(states[0], states[1])


def norm_args(rows=70, d=133, dtype=F32, residual=F32, weight_dtype=F32, bias=True, rms=False,
              residual_dtype=F32):  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def rand(*shape, dtype):
        return (torch.randn(shape, generator=generator) + 0.5).to(dtype)

    return (
        rand(rows, d, dtype=dtype),
        None if residual is None else rand(rows, 2 * d, dtype=residual)[:, ::2],
        rand(d, dtype=weight_dtype),
        rand(d, dtype=weight_dtype) if bias else None,
        1e-5,
        rms,
        residual_dtype,
    )


NORM_ROWS = (
    [{"d": d} for d in (1, 15, 16, 17, 64, 768)]
    + [{"rows": rows, "d": 33} for rows in (1, 31, 32, 33, 200)]
    + [{"dtype": dtype, "residual": residual, "residual_dtype": residual, "weight_dtype": BF16}
       for dtype in (F16, BF16) for residual in (F32, F16, BF16)]
    + [{"residual": None, "residual_dtype": None, "bias": False}]
)  # fmt: skip


@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("row", NORM_ROWS, ids=str)
def test_norm(row, rms, isa):
    args = norm_args(**row, rms=rms)
    x, residual, weight, bias = args[:4]
    doubles = tuple(map(to_double, args))
    exact = OPS._add_norm_fwd.reference(*doubles)
    plain = OPS._add_norm_fwd.reference(*args)
    actual = OPS._add_norm_fwd.default(*args)
    for i, (got, expected, oracle) in enumerate(zip(actual, plain, exact, strict=True)):
        assert strides(got) == strides(expected)
        assert_close_to_oracle(got, expected, oracle, f"result {i}")
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    for dtotal in (None, dy.to(BF16), dy.t().contiguous().t()):
        inputs = (dy, dtotal, x, residual, weight, bias)
        dtypes = (x.dtype, None if dtotal is None else torch.float32)
        got = OPS._add_norm_bwd.default(*inputs, *actual[2:], rms, *dtypes)
        expected = OPS._add_norm_bwd.reference(*inputs, *plain[2:], rms, *dtypes)
        dtypes = (None, None if dtotal is None else torch.float64)
        oracle = OPS._add_norm_bwd.reference(*map(to_double, inputs), *exact[2:], rms, *dtypes)
        if row.get("d") == 1 and not rms and dtotal is None:
            assert got[0].eq(0).all()  # a row of one is always normed to zero
            continue
        names = ("dx", "other", "dweight", "dbias")
        for name, *values in zip(names, got, expected, oracle, strict=True):
            assert_close_to_oracle(*values, name)


def bits(result):
    return [t.contiguous().view(torch.uint8) for t in result]


@pytest.mark.parametrize("layout", ["contiguous", "channel last"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_number_of_threads_changes_no_bit(layout, packed):
    conv = conv_args(d=300, l=600, layout=layout, packed=packed)
    dfinal = torch.randn(conv[3].shape)
    norm = norm_args(rows=300, d=768)

    def run():
        y, _, mean, rstd = OPS._add_norm_fwd.default(*norm)
        state = torch.ones(2, 300, 4)
        update = OPS._causal_conv1d_update.default(conv[0][..., :9], state, *conv[1:3], True, None,
                                                   torch.tensor([1, 0]))  # fmt: skip
        return (
            *bits(OPS._causal_conv1d_fwd.default(*conv)),
            *bits(OPS._causal_conv1d_bwd.default(conv[0], dfinal, *conv)),
            *bits((update, state, y, mean, rstd)),
            *bits(OPS._add_norm_bwd.default(y, None, *norm[:4], mean, rstd, False, BF16, None)),
        )

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


VIEWS = {
    "contiguous": lambda: torch.randn(2, 4, 5),
    "channel last": lambda: torch.randn(2, 5, 4).transpose(1, 2),
    "one step": lambda: torch.randn(2, 1, 4).transpose(1, 2),
    "one channel": lambda: torch.randn(2, 5, 1).transpose(1, 2),
    "sliced channels": lambda: torch.randn(2, 5, 8).transpose(1, 2)[:, :4],
    "every other channel": lambda: torch.randn(2, 5, 8).transpose(1, 2)[:, ::2],
    "one step repeated": lambda: torch.randn(2, 1, 4).transpose(1, 2).expand(2, 4, 5),
    "no steps": lambda: torch.randn(2, 0, 4).transpose(1, 2),
    "batch last": lambda: torch.randn(4, 5, 2).permute(2, 0, 1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_layout_rule_is_the_same_everywhere(view):
    x = VIEWS[view]()
    rest = (torch.randn(x.shape[1], 4), None, None, None, x.shape[0], True)
    forward, backward = OPS._causal_conv1d_fwd, OPS._causal_conv1d_bwd
    out, dx = forward.default(x, *rest)[0], backward.default(x, None, x, *rest)[0]
    expected = torch.empty(x.shape)
    if is_channel_last(x):
        expected = torch.empty(x.transpose(1, 2).shape).transpose(1, 2)
    assert out.stride() == dx.stride() == expected.stride()
    torch.testing.assert_close(out, forward.reference(x, *rest)[0])
    checks = ("test_schema", "test_faketensor")
    for overload in ("default", "reference"):
        torch.library.opcheck(getattr(forward, overload), (x, *rest), test_utils=checks)
        arguments = (x, None, x, *rest)
        torch.library.opcheck(getattr(backward, overload), arguments, test_utils=checks)


X, W, STATE = torch.zeros(2, 4, 5), torch.zeros(4, 3), torch.zeros(2, 4, 3)
IDS = torch.zeros(2, 5, dtype=torch.int32)
WRONG_CONVS = [
    ((X[0], W, None, None, None, 2), r"x must have 3 dimensions"),
    ((X, W[0], None, None, None, 2), r"weight must have 2 dimensions"),
    ((X, W[:, :0], None, None, None, 2), r"width of at least 1"),
    ((X, W[:3], None, None, None, 2), r"weight must have shape \(4, 3\), got \(3, 3\)"),
    ((X, W.double(), None, None, None, 2), r"weight must be float32, float16 or bfloat16"),
    ((X, W, W[:3, 0], None, None, 2), r"bias must have shape \(4\)"),
    ((X, W, None, STATE, None, 2), r"initial_states must have shape \(2, 4, 2\)"),
    ((X, W, None, None, None, 3), r"num_states must be the batch size 2 .* got 3"),
    ((X, W, None, None, IDS, -1), r"num_states"),
    ((X, W, None, None, IDS.long(), 2), r"seq_idx must be int32"),
    ((X, W, None, None, IDS[:, :4], 2), r"seq_idx must have shape \(2, 5\)"),
]


@pytest.mark.parametrize(("args", "message"), WRONG_CONVS, ids=lambda v: str(v)[-40:])
def test_wrong_convolutions(args, message):
    with pytest.raises(RuntimeError, match=message):
        OPS._causal_conv1d_fwd.default(*args, True)
    with pytest.raises(RuntimeError, match=message):
        OPS._causal_conv1d_bwd.default(args[0], None, *args, True)


WRONG_UPDATES = [
    ({"conv_state": STATE[:1]}, r"conv_state has 1 rows but x has 2"),
    ({"conv_state": STATE[..., :1]}, r"conv_state has 1 columns, .* at least 2"),
    ({"conv_state": STATE[:1].expand(2, 4, 3)}, r"must not be expanded"),
    ({"conv_state_indices": torch.tensor([0, 2])}, r"\[1\] is 2 .* 2 rows"),
    ({"conv_state_indices": torch.tensor([1, 1])}, r"row 1 more than once"),
    ({"conv_state_indices": torch.tensor([1.0, 0.0])}, r"must hold integers, got Float"),
    ({"cache_seqlens": torch.tensor([1])}, r"cache_seqlens must have shape \(2\)"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_UPDATES)
def test_wrong_updates_write_nothing(changes, message):
    args = {"x": X + 1, "conv_state": STATE.clone(), "weight": W, "bias": None, "silu": True,
            "cache_seqlens": None, "conv_state_indices": None} | changes  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        OPS._causal_conv1d_update.default(*args.values())
    assert args["conv_state"].eq(0).all()


ROWS = torch.zeros(2, 4)
WRONG_NORMS = [
    ((X, None, ROWS[0], None, 1e-5, True, None), r"x must have 2 dimensions"),
    ((ROWS, None, ROWS[0, :3], None, 1e-5, True, None), r"weight must have shape \(4\)"),
    ((ROWS, ROWS[:1], ROWS[0], None, 1e-5, True, None), r"residual must have shape \(2, 4\)"),
    ((ROWS, None, ROWS[0], None, 1e-5, True, torch.float64), r"residual_dtype .* got Double"),
]


@pytest.mark.parametrize(("args", "message"), WRONG_NORMS, ids=lambda v: str(v)[-40:])
def test_wrong_norms(args, message):
    with pytest.raises(RuntimeError, match=message):
        OPS._add_norm_fwd.default(*args)
