"""The order in which the fused steps on a GPU take a model's weights.

``_decode_step_weights`` gets one flat list: each layer's tensors in the order of ``LAYER_WEIGHTS``,
then those of ``TAIL_WEIGHTS``; ``_prefill_layers`` gets all of it but lm_head. What a model does
not have stands there as an empty tensor. Where weights are int8, the step gets the scales of their
outputs, fp32 (out, 1), in a list of their own: each layer's of ``LAYER_INT8``, then those of
``TAIL_INT8``; else an empty list. ``csrc/bindings_cuda_decode.cpp`` and
``csrc/bindings_cuda_prefill.cpp`` read the same lists.
"""

from __future__ import annotations

LAYER_WEIGHTS = (
    "norm_weight", "norm_bias", "in_proj", "in_bias", "conv_weight", "conv_bias", "x_proj",
    "dt_proj", "dt_bias", "A_log", "D", "out_proj", "out_bias",
)  # fmt: skip
TAIL_WEIGHTS = ("norm_f_weight", "norm_f_bias", "lm_head")
LAYER_INT8 = ("in_proj", "x_proj", "out_proj")
TAIL_INT8 = ("lm_head",)
