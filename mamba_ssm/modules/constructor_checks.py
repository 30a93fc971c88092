"""What the constructor of ``Mamba`` accepts."""

from __future__ import annotations

import math
from typing import Any


def check_mamba_arguments(values: dict[str, Any]) -> None:
    """Raise TypeError / ValueError / NotImplementedError naming the argument that is wrong."""
    for name in ("d_model", "d_state", "d_conv", "dt_rank"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int):
            allowed = "'auto' or an int" if name == "dt_rank" else "an int"
            raise TypeError(f"{name} must be {allowed}, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if values["d_state"] > 256:
        raise ValueError(f"d_state must be at most 256, got {values['d_state']}")
    for name in ("expand", "dt_min", "dt_max", "dt_scale", "dt_init_floor"):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if values["dt_min"] > values["dt_max"]:
        raise ValueError(
            f"dt_min must not exceed dt_max, got dt_min={values['dt_min']}, "
            f"dt_max={values['dt_max']}"
        )
    if int(values["expand"] * values["d_model"]) < 1:
        raise ValueError(
            f"int(expand * d_model) must be at least 1, got expand={values['expand']}, "
            f"d_model={values['d_model']}"
        )
    if values["dt_init"] not in ("random", "constant"):
        raise NotImplementedError(
            f"dt_init must be 'random' or 'constant', got {values['dt_init']!r}"
        )
