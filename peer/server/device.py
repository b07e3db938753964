"""What a server computes on, and in which dtype."""

from __future__ import annotations

import torch

from petals.models.source.checkpoint import Checkpoint
from petals.peer.base.config import ServeConfig
from petals.protocols.errors import UserError
from petals.protocols.tensors import FLOATS_BY_NAME


def compute_dtype(config: ServeConfig, checkpoint: Checkpoint) -> torch.dtype:
    """float32 on a CPU unless asked otherwise: exact, and the fastest product there; the checkpoint's own on a GPU."""
    if config.dtype == "auto":
        return torch.float32 if device_of(config).type == "cpu" else checkpoint.dtype
    if config.dtype not in FLOATS_BY_NAME:
        raise UserError(f"unknown dtype {config.dtype!r}: choose auto, {', '.join(FLOATS_BY_NAME)}")
    return FLOATS_BY_NAME[config.dtype]


def device_of(config: ServeConfig) -> torch.device:
    """The device to compute on."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise UserError(f"unknown device {config.device!r}: choose auto, cpu or cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count() or "no"
        raise UserError(f"no device {config.device!r} here: torch sees {there} CUDA devices; choose auto or cpu")
    return device
