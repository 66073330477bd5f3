"""Gradient steps that bring a decomposed model closer to its dense model, without labels."""

from .refine import Refinement, refine

__all__ = ["Refinement", "refine"]
