"""Distil an encoder into a StaticModel. What needs torch is imported when it runs."""

from .distilling import distill
from .recipe import PRESETS, Recipe

__all__ = ["PRESETS", "Recipe", "distill"]
