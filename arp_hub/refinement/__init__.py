"""Gradient steps that bring a decomposed model closer to its dense model, without labels."""

from .refine import LEAST_IMAGES, Refinement, held_out_count, refine

__all__ = ["LEAST_IMAGES", "Refinement", "held_out_count", "refine"]
