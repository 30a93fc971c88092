"""The historical import paths of the ops; importing them needs no Triton.

The function ``selective_state_update`` is deliberately not a name of this package: it would hide
the module of the same name.
"""
