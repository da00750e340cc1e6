"""How a harness runs a twin."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from twin_bench.config import Dtype, Settings
from twin_bench.errors import InputError, first_line
from twin_bench.protocols import ProtocolName


class TwinSettings(Settings):
    """The settings of a twin that answers a harness.

    `device` is where it runs. None is the fastest device there is, and `auto` becomes None. `device_map`, `max_memory`
    and `offload_folder` spread it over several devices; one figure of `max_memory` is that of one device.
    `quantization` keeps it in few bits. `dtype` is what it
    computes in; None is that of the shared expert. `tolerance` is the allowed relative error of the logits. For all of
    these see `TwinModel.from_pretrained`. `batch_size` is the largest number of rows in a forward. `compile` says when
    the steps of a generation are compiled (see `twin_bench.twin.compiled`).
    """

    device: str | None = None
    device_map: str | dict[str, str | int] | None = None
    max_memory: dict[int | str, int | str] | int | str | None = None
    offload_folder: str | None = None
    quantization: Literal["4bit", "8bit"] | dict[str, Any] | None = None
    dtype: Dtype | None = None
    protocol: ProtocolName = "standard"
    tolerance: float | None = Field(default=None, ge=0, lt=1)
    batch_size: int = Field(default=8, ge=1)
    compile: Literal["auto", "on", "off"] = "off"

    @field_validator("max_memory")
    @classmethod
    def _size(cls, given: Any, info: ValidationInfo) -> Any:
        """Refuse one figure that is no size, or is given for several devices. Those of devices are accelerate's."""
        from twin_bench.twin.memory import memory_limit

        if not isinstance(given, dict):
            memory_limit(given, info.data.get("device_map"))
        return given

    @field_validator("device")
    @classmethod
    def _named(cls, device: str | None) -> str | None:
        """Refuse what names no device. The settings may be another machine's, so the device need not be here."""
        import torch

        from twin_bench.twin.device import AUTO

        try:
            return None if device in (None, AUTO) else str(torch.device(device))
        except RuntimeError as error:
            raise InputError(f"no device: auto, cpu, cuda, cuda:1, ... ({first_line(error)})") from None
