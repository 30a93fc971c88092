"""Models prepared for inference: decoding on the CPU from packed weights, int8 weights."""

from mamba_ssm.inference.cpu_decoder import CpuDecoder, decoder_for, release, why_not

__all__ = ["CpuDecoder", "decoder_for", "release", "why_not"]
