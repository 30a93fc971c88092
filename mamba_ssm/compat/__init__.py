"""Opt-ins for other people's code: nothing here happens unless it is called.

``causal_conv1d()`` makes this library's convolution importable under the name of the package that
clients look for; ``call_projections(model)`` and ``peft(model)`` make transformers' Mamba mixers
call their projections, so that adapters and hooks on them take part. See docs/clients.md.
"""

from ._causal_conv1d import causal_conv1d
from ._projections import call_projections, peft

__all__ = ["call_projections", "causal_conv1d", "peft"]
