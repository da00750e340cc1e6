"""Protocols and tracks: what a score's model was told, and what its method may see. See docs/protocols.md."""

from __future__ import annotations

from typing import Literal

ProtocolName = Literal["standard", "paper", "routed"]
PROTOCOLS: tuple[ProtocolName, ...] = ("standard", "paper", "routed")
Track = Literal["bound", "data-free", "calibration", "test-time", "per-input", "task-id given"]
TRACKS: tuple[Track, ...] = ("bound", "data-free", "calibration", "test-time", "per-input", "task-id given")
