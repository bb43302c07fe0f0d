"""HIVTP visual-token pruning (arXiv 2509.23663) for models of Hugging Face transformers.

>>> handle = hivtp_transformers.apply(model)  # doctest: +SKIP
>>> out = model.generate(**inputs)  # doctest: +SKIP
>>> handle.remove()  # doctest: +SKIP
"""

from .apply import apply
from .count import token_count
from .handle import Handle
from .pruner import Stats

__all__ = ["Handle", "Stats", "apply", "token_count"]
