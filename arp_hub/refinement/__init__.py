"""Gradient steps that bring a decomposed model closer to its dense model, without labels."""

from .refine import LEAST_IMAGES, Refinement, refine

__all__ = ["LEAST_IMAGES", "Refinement", "refine"]
