"""Fused, deterministic visual-token pruning (HIVTP) for vision-language models."""

from .backends import available_backends
from .config import PruneConfig
from .functional import (
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from .types import Selection
from .version import __version__

__all__ = [
    "PruneConfig",
    "Selection",
    "__version__",
    "attention_scores",
    "available_backends",
    "gather_tokens",
    "pack_tokens",
    "score_and_select",
    "select_tokens",
]
