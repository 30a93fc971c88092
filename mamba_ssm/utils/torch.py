"""The historical autograd-function decorators, as thin wrappers over :mod:`torch.amp`.

``custom_fwd`` and ``custom_bwd`` keep the meaning they had before torch asked for a device type:
they act on the CUDA autocast state unless ``device_type`` says otherwise. Both work bare
(``@custom_fwd``) and with keywords (``@custom_fwd(cast_inputs=torch.float16)``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["custom_amp_decorator", "custom_bwd", "custom_fwd"]


def custom_amp_decorator(
    decorator: Callable[..., Any], needs_device_type: bool = True
) -> Callable[..., Any]:
    """Give ``decorator`` the default ``device_type="cuda"``.

    Args:
        decorator: ``torch.amp.custom_fwd``, ``torch.amp.custom_bwd`` or alike.
        needs_device_type: False for a decorator that takes no ``device_type`` (those of
            ``torch.cuda.amp``); it is then passed through unchanged.
    """

    @functools.wraps(decorator)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if needs_device_type:
            kwargs.setdefault("device_type", "cuda")
        return decorator(*args, **kwargs)

    return wrapped


custom_fwd = custom_amp_decorator(torch.amp.custom_fwd)
custom_bwd = custom_amp_decorator(torch.amp.custom_bwd)
