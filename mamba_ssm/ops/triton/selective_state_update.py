"""The historical home of the decode step."""

from ..selective_state_update import selective_state_update, selective_state_update_ref

__all__ = ["selective_state_update", "selective_state_update_ref"]
