"""Models prepared for inference: fused decode steps on the CPU and on GPUs, int8 weights."""

from mamba_ssm.inference.cpu_decoder import CpuDecoder, decoder_for, release, why_not
from mamba_ssm.inference.int8 import Int8Linear, is_quantized, quantize_

__all__ = [
    "CpuDecoder",
    "Int8Linear",
    "decoder_for",
    "is_quantized",
    "quantize_",
    "release",
    "why_not",
]
