"""The historical import paths of the ops; importing them needs no Triton.

The function ``selective_state_update`` is deliberately not a name of this package: it would hide
the module of the same name.
"""

# Clients ask which of the two names of this module there is by looking at this package.
from . import layernorm as layernorm
