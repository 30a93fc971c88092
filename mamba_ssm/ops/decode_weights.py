"""The order in which the fused steps on a GPU take a model's weights.

``_decode_step_weights`` gets one flat list: each layer's tensors in the order of ``LAYER_WEIGHTS``,
then those of ``TAIL_WEIGHTS``; ``_prefill_layers`` gets all of it but lm_head. What a model does
not have stands there as an empty tensor. ``csrc/bindings_cuda_decode.cpp`` and
``csrc/bindings_cuda_prefill.cpp`` read the same list.
"""

from __future__ import annotations

LAYER_WEIGHTS = (
    "norm_weight", "norm_bias", "in_proj", "in_bias", "conv_weight", "conv_bias", "x_proj",
    "dt_proj", "dt_bias", "A_log", "D", "out_proj", "out_bias",
)  # fmt: skip
TAIL_WEIGHTS = ("norm_f_weight", "norm_f_bias", "lm_head")
