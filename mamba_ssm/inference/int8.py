"""int8 weights: a quarter of fp32's memory and traffic, for inference only.

Weights are rounded to the nearest of 255 steps, each output channel (or group of inputs of one)
with a scale of its own; activations stay as they are. On a CPU, and for one row on a GPU of compute
capability 9.0, `generate` streams the int8 weights themselves; every other call multiplies with
them as floats, a few rows at a time on a CPU and a layer at a time on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.modules.sequence_args import is_plain
from mamba_ssm.ops.linear import linear

SCHEMES = ("int8",)
# Weights in memory as floats at a time: on a CPU they should stay in a cache, a GPU should have
# enough to do.
_MAX_FLOATS = 1 << 20
_MAX_FLOATS_GPU = 1 << 26
_LARGEST = 127


def quantize_weight(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """(int8 values (out, in), fp32 scales (out, groups)) of a weight (out, in).

    ``group_size`` inputs share a scale; None, or a size that does not divide the inputs, means that
    a whole row does. Raises ValueError for weights that are not finite.
    """
    out, inputs = weight.shape
    if group_size is None or inputs % group_size:
        group_size = inputs
    groups = weight.detach().float().reshape(out, inputs // group_size, group_size)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("weights that are infinite or NaN cannot be turned into int8")
    # By a tensor: by a number a GPU multiplies with the reciprocal, which rounds otherwise.
    scales = largest / torch.full_like(largest, _LARGEST)
    rounded = torch.round(groups / torch.where(scales > 0, scales, torch.ones_like(scales)))
    return rounded.to(torch.int8).reshape(out, inputs), scales.squeeze(-1).contiguous()


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, (…, in_features) → (…, out_features) in the input's dtype.

    Made from a linear layer by ``model.quantize_("int8")``. Buffers: ``quantized`` (out, in) int8,
    ``scales`` (out, groups) fp32; ``bias`` is the layer's own. It cannot be trained: a call that
    would have to record gradients raises RuntimeError.
    """

    def __init__(self, linear: nn.Linear, group_size: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantized, scales = quantize_weight(linear.weight, group_size)
        self.register_buffer("quantized", quantized)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        """The product with some rows of the weight, without the bias."""
        quantized, scales = self.quantized[rows], self.scales[rows]
        if scales.shape[1] == 1 and x.dtype != torch.float16:
            # Small integers are exact in bf16 and fp32, so scaling can wait; sums of unscaled
            # products could overflow in fp16.
            return linear(x, quantized.to(x.dtype)) * scales.squeeze(1).to(x.dtype)
        groups = quantized.unflatten(1, (scales.shape[1], -1))
        # Multiplied as fp32, and rounded in the same kernel.
        weight = torch.mul(
            groups, scales.unsqueeze(-1), out=scales.new_empty(groups.shape, dtype=x.dtype)
        )
        return linear(x, weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "int8 weights cannot be trained: call the model under torch.no_grad() or "
                "torch.inference_mode(), or load it again without quantize_"
            )
        most = _MAX_FLOATS_GPU if x.is_cuda else _MAX_FLOATS
        step = max(1, most // self.in_features)
        starts = range(0, self.out_features, step)
        outs = [self._rows(x, slice(i, i + step)) for i in starts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return out if self.bias is None else out + self.bias.detach().to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        # model.half() is about activations: the scales keep their precision.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args: Any, **kwargs: Any) -> None:
        if prefix + "weight" in state_dict:
            raise RuntimeError(
                f"{prefix}weight is a float weight and this layer holds int8: load the state dict "
                "into a model that is not quantized, then call quantize_"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"groups={self.scales.shape[1]}, bias={self.bias is not None}"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a model holds int8 weights."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _targets(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(name, parent, attribute) of the linear layers that make up nearly all of a step's traffic.

    delta's projection is small and its error goes through an exponential: it stays as it is. So do
    attention and MLP layers.
    """
    targets = [
        (f"{name}.{child}", mixer, child)
        for name, mixer in model.named_modules()
        if isinstance(mixer, Mamba)
        for child in ("in_proj", "x_proj", "out_proj")
    ]
    return [*targets, ("lm_head", model, "lm_head")]


def quantize_(model: nn.Module, scheme: str = "int8", group_size: int | None = None) -> None:
    """Replace the large linear layers of a MambaLMHeadModel by int8 ones, in place.

    Raises ValueError, before anything is changed, for another scheme, a group size below 1, a model
    that is quantized already, and layers that are not plain ``nn.Linear`` any more.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise ValueError(f"group_size must be a positive int or None, got {group_size!r}")
    if is_quantized(model):
        raise ValueError("the model holds int8 weights already")
    targets = _targets(model)
    for name, parent, child in targets:
        linear = getattr(parent, child)
        if not is_plain(linear, nn.Linear) or not linear.weight.dtype.is_floating_point:
            raise ValueError(
                f"{name} ({type(linear).__name__}) was replaced, hooked or parametrized: quantize "
                "the plain model, before such changes"
            )
        if not bool(linear.weight.isfinite().all()):
            raise ValueError(f"{name}.weight has infinite or NaN values and cannot become int8")
    with torch.inference_mode(False), torch.no_grad():
        for _, parent, child in targets:
            setattr(parent, child, Int8Linear(getattr(parent, child), group_size))
