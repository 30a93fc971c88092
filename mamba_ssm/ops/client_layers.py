"""Whether the layers around an op are what their weights say, in our modules and in clients'."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn

# What a Mamba-1 mixer has, in this library and in transformers.
_MIXER_PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "A_log", "D")
_READ = ("x_proj", "dt_proj", "out_proj")
# Between a client's mixer and the op there are a few wrappers of the client's.
_FRAMES = 8
_REMEDY = (
    "call mamba_ssm.compat.call_projections(model) once (for PEFT: build the adapters inside "
    "`with mamba_ssm.compat.peft(model):`), and the mixer calls its projections"
)


def is_plain(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether reading ``module.weight`` does exactly what calling the module does.

    Not so for LoRA and other replacements, quantised weights (another module type, or a tensor
    subclass), hooks, parametrizations and an overridden ``forward``.
    """
    if type(module) not in kinds:
        return False
    # Past Module.__getattr__: every layer asks this several times a call.
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    ) and type(tensor_of(module, "weight")) in (nn.Parameter, torch.Tensor)


def tensor_of(module: nn.Module, name: str) -> torch.Tensor | None:
    """``getattr(module, name)``, at a part of its cost where it is a parameter."""
    own = module.__dict__["_parameters"]
    return own[name] if name in own else getattr(module, name)


def _is_mixer(module: object) -> bool:
    return isinstance(module, nn.Module) and all(
        name in module._modules or name in module._parameters for name in _MIXER_PARTS
    )


def is_foreign_mixer(module: object) -> bool:
    """Whether this is a Mamba-1 mixer of another library, by the names of its parts."""
    return _is_mixer(module) and not type(module).__module__.startswith("mamba_ssm.")


def check_calling_mixer() -> None:
    """For ``mamba_inner_fn``: no projection of a client's mixer may be left out without a word.

    transformers' mixers pass ``x_proj.weight`` and so on while they train, whatever the layer has
    become. The mixer is found among the callers, because a weight does not know its layer.

    Raises:
        RuntimeError: a projection of the calling mixer is a layer that computes something else.

    Warns:
        RuntimeWarning: a projection has hooks, which do not run.
    """
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return
        if frame.f_code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            if _is_mixer(caller):
                if is_foreign_mixer(caller):
                    _check_mixer(caller)
                return
        frame = frame.f_back


def _check_mixer(mixer: nn.Module) -> None:
    for name in _READ:
        layer = getattr(mixer, name)
        # A subclass that only initialises otherwise (our dt_proj in a client's subclass of our
        # mixer) computes what its weight says.
        linear = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        if linear and is_plain(layer, type(layer)):
            continue
        what = f"{name} of {type(mixer).__name__}"
        if not linear or type(layer.weight) not in (nn.Parameter, torch.Tensor):
            kind = type(layer) if not linear else type(layer.weight)
            raise RuntimeError(
                f"{what} is a {kind.__module__}.{kind.__qualname__}, but while training "
                f"{type(mixer).__module__} reads its weight instead of calling it, so that the "
                f"layer would have no effect and would not be trained: {_REMEDY}"
            )
        # accelerate replaces every forward to move inputs between devices: nothing is lost.
        if "forward" not in layer.__dict__ or not hasattr(layer, "_hf_hook"):
            warnings.warn(
                f"{what} has hooks or a replaced forward, which do not run while training, because "
                f"{type(mixer).__module__} reads its weight instead of calling it: {_REMEDY}",
                RuntimeWarning,
                stacklevel=4,
            )
