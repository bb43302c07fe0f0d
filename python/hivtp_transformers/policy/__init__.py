"""Which units of an image stay."""

from .methods import METHODS, Evidence, Method
from .policy import Plan, Policy, Sources, by_unit

__all__ = ["METHODS", "Evidence", "Method", "Plan", "Policy", "Sources", "by_unit"]
