"""What ``selective_scan_fn`` accepts: checked before any work, with the remedy named."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_STATE_SIZE = 256
_ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape_error(name: str, value: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name} must have shape {expected}, but has {tuple(value.shape)}")


def check_projection_shape(name: str, x: Tensor, A: Tensor, u_shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless x, B or C, is (d, n), (b, n, l) or (b, g, n, l) with g dividing d.

    With complex A the last size is 2 l; a constant x then has to be complex too (TypeError).
    """
    b, d, length = u_shape
    n = A.shape[1]
    last = 2 * length if A.is_complex() else length
    if x.dim() == 2:
        if tuple(x.shape) != (d, n):
            raise _shape_error(f"{name} (constant)", x, f"(d, n) = {(d, n)}")
        if x.is_complex() != A.is_complex():
            raise TypeError(f"a constant {name} must have A's dtype {A.dtype}, but has {x.dtype}")
    elif x.dim() == 3:
        if tuple(x.shape) != (b, n, last):
            raise _shape_error(name, x, f"(b, n, l) = {(b, n, last)}")
    elif x.dim() == 4:
        if (x.shape[0], x.shape[2], x.shape[3]) != (b, n, last):
            raise _shape_error(name, x, f"(b, g, n, l) = {(b, 'g', n, last)}")
        if x.shape[1] < 1 or d % x.shape[1]:
            raise ValueError(
                f"{name} has {x.shape[1]} groups, which do not divide the {d} channels of u"
            )
    else:
        raise _shape_error(name, x, "(d, n), (b, n, l) or (b, g, n, l)")


def _check_projection(name: str, x: Tensor, A: Tensor, u: Tensor) -> None:
    check_projection_shape(name, x, A, tuple(u.shape))
    if x.dim() > 2 and x.dtype != u.dtype:
        raise TypeError(f"{name} is {x.dtype}, but u is {u.dtype}; cast it with {name}.to(u.dtype)")


def check_scan_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raises ValueError for shapes and devices, TypeError for dtypes; says what is allowed."""
    if u.dim() != 3:
        raise _shape_error("u", u, "(b, d, l)")
    if u.dtype not in _ACTIVATION_DTYPES:
        raise TypeError(f"u must be fp32, fp16, bf16 (or fp64), but is {u.dtype}")
    d = u.shape[1]
    for name, x in (("delta", delta), ("z", z)):
        if x is None:
            continue
        if x.shape != u.shape:
            raise _shape_error(name, x, f"u's {tuple(u.shape)}")
        if x.dtype != u.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, but u is {u.dtype}; cast it with {name}.to(u.dtype)"
            )
    if A.dim() != 2 or A.shape[0] != d:
        raise _shape_error("A", A, f"(d, n) = ({d}, n)")
    if not 1 <= A.shape[1] <= MAX_STATE_SIZE:
        raise ValueError(f"A has state size n = {A.shape[1]}; allowed: 1 to {MAX_STATE_SIZE}")
    if not (A.dtype.is_floating_point or A.is_complex()):
        raise TypeError(f"A must be fp32 or complex64, but is {A.dtype}")
    _check_projection("B", B, A, u)
    _check_projection("C", C, A, u)
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is None:
            continue
        if tuple(x.shape) != (d,):
            raise _shape_error(name, x, f"(d,) = ({d},)")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be fp32, but is {x.dtype}")
    tensors = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, x in tensors.items():
        if x is not None and x.device != u.device:
            raise ValueError(
                f"{name} is on {x.device}, but u is on {u.device}; move them to one device"
            )


def check_initial_state(
    initial_state: Tensor | None, num_states: int, A: Tensor, u: Tensor
) -> None:
    """Raises ValueError or TypeError unless ``initial_state`` is a floating (num_states, d, n)."""
    if initial_state is None:
        return
    expected = (num_states, *A.shape)
    if tuple(initial_state.shape) != expected:
        raise _shape_error("initial_state", initial_state, f"(number of states, d, n) = {expected}")
    if not (initial_state.dtype.is_floating_point or initial_state.is_complex()):
        raise TypeError(f"initial_state must be fp32, but is {initial_state.dtype}")
    if initial_state.is_complex() and not A.is_complex():
        raise TypeError("initial_state is complex, but A is real")
    if initial_state.device != u.device:
        raise ValueError(f"initial_state is on {initial_state.device}, but u is on {u.device}")
