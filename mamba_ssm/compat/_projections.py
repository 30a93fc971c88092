"""transformers' Mamba mixers with projections that are called, not read.

Their ``forward`` reads ``dt_proj.weight`` always, and the weights of x_proj and out_proj too while
it trains through ``mamba_inner_fn``. An adapter, a quantised layer or a hook in such a place is
then left out without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.ops.client_layers import is_foreign_mixer, is_plain

_HOOKED = "_mamba_ssm_calls_projections"
_KEPT = "_mamba_ssm_kept"
_ABSENT = object()


class _CalledWeight:
    """Stands for dt_proj.weight in ``weight @ x``: calls the layer on x instead."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __matmul__(self, x: Tensor) -> Tensor:
        # (b, r, l) → (b, d, l); the layer adds its own bias.
        return self.layer(x.transpose(-1, -2)).transpose(-1, -2)


class _CalledLayer:
    """Stands for dt_proj during one forward: every use of it calls the layer, bias included."""

    def __init__(self, layer: nn.Module, like: Tensor) -> None:
        self.layer = layer
        self.weight = _CalledWeight(layer)
        # The mixer adds this in the scan; the layer has added the real one.
        self.bias = torch.zeros_like(like, dtype=torch.float32, requires_grad=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _enter(mixer: nn.Module, args: tuple, kwargs: dict) -> None:
    if all(is_plain(getattr(mixer, name), nn.Linear) for name in ("x_proj", "dt_proj", "out_proj")):
        return
    mixer.__dict__[_KEPT] = mixer.training
    # Without `training` the mixer takes the path that calls x_proj and out_proj. The children keep
    # theirs, so that dropout inside an adapter is unchanged.
    mixer.training = False
    mixer.__dict__["dt_proj"] = _CalledLayer(mixer.dt_proj, mixer.D)


def _leave(mixer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    if _KEPT in mixer.__dict__:
        mixer.training = mixer.__dict__.pop(_KEPT)
        del mixer.__dict__["dt_proj"]


def call_projections(model: nn.Module) -> int:
    """Make the transformers Mamba mixers in ``model`` call x_proj, dt_proj and out_proj.

    For Mamba, FalconMamba and Jamba. A mixer all of whose projections are plain ``nn.Linear`` runs
    as before; one with a replaced, parametrised or hooked projection computes op by op, training
    included. Call it before or after the projections are replaced; calling it twice does nothing.
    This library's own ``Mamba`` needs none of it. FalconMamba trains otherwise through
    ``mamba_inner_fn``, which normalises delta after dt_proj; op by op it trains what it evaluates.

    Returns:
        The number of mixers in ``model``.

    Raises:
        ValueError: there is none.
    """
    mixers = [module for module in model.modules() if is_foreign_mixer(module)]
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has no transformers Mamba mixer (a module with in_proj, "
            "conv1d, x_proj, dt_proj, out_proj, A_log and D). This library's own models call "
            "replaced projections without this."
        )
    for mixer in mixers:
        if not mixer.__dict__.get(_HOOKED):
            mixer.__dict__[_HOOKED] = True
            mixer.register_forward_pre_hook(_enter, with_kwargs=True)
            mixer.register_forward_hook(_leave, with_kwargs=True, always_call=True)
    return len(mixers)


def peft(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """``call_projections(model)``, and a context in which PEFT accepts out_proj as a target.

    PEFT refuses LoRA on the out_proj of transformers' Mamba models by ``config.model_type``,
    because the layer is not called there. After ``call_projections`` it is, so inside the context
    the model's configuration carries another model_type::

        with mamba_ssm.compat.peft(model):
            model = get_peft_model(model, LoraConfig(target_modules=["x_proj", "out_proj"]))

    Loading an adapter onto a base model needs the same. conv1d remains read, not called: a LoRA on
    it is refused here, too.

    Returns:
        A context manager that gives ``model``. The mixers call their projections from the call of
        this function on, also outside the context.

    Raises:
        ValueError: ``model`` has no transformers Mamba mixer; at the context's end, an adapter was
            put on a conv1d.
    """
    call_projections(model)
    return _as_another_type(model)


@contextmanager
def _as_another_type(model: nn.Module) -> Iterator[nn.Module]:
    config = model.config  # model_type is an attribute of its class; one of its own hides that
    before = config.__dict__.get("model_type", _ABSENT)
    config.__dict__["model_type"] = f"{config.model_type}_with_called_projections"
    try:
        yield model
    finally:
        if before is _ABSENT:
            del config.__dict__["model_type"]
        else:
            config.__dict__["model_type"] = before
    for name, module in model.named_modules():
        if is_foreign_mixer(module) and type(module.conv1d) is not nn.Conv1d:
            raise ValueError(
                f"{name}.conv1d is a {type(module.conv1d).__module__}."
                f"{type(module.conv1d).__qualname__}, but transformers' mixer reads "
                "its weight instead of calling it, so that it would have no effect: leave conv1d "
                "out of target_modules"
            )
