"""The checkpoints that the study can evaluate, and where they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

# The trained model of seed 0, which the demo ships.
SMALL_LLAVA = Path(__file__).parents[2] / "examples" / "small_llava"


def llava_config(name: str) -> Any:
    """The config of a LLaVA-1.5 checkpoint, a directory or Hub id; a ValueError for any other."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _illegal("--model", "a checkpoint's directory or Hub id", name, error) from error
    if config.model_type != "llava":
        raise ValueError(f"--model must be of type llava, got {config.model_type!r}")
    if not isinstance(config.vision_feature_layer, int):
        layers = config.vision_feature_layer
        raise ValueError(f"--model must have one vision_feature_layer, got {layers}")
    return config


def check_device(name: str) -> None:
    """Raise a ValueError unless torch can use the device here."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _illegal("--device", "one that torch can use here", name, error) from error


def _illegal(option: str, legal: str, value: str, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(f"{option} must be {legal}, got {value!r}: {reason}")
