"""The error of one request."""

from __future__ import annotations

from twin_bench.errors import InputError


class RefusedError(InputError):
    """One request that can't be answered. Others can: HELM sets this one aside, with the message as its reason."""
