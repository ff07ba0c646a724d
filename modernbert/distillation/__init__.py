"""Distil an encoder into a StaticModel. What is heavy is imported when it is first used."""

from typing import TYPE_CHECKING, Any

from .recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from .distilling import distill

__all__ = ["PRESETS", "Recipe", "distill"]


def __getattr__(name: str) -> Any:
    if name == "distill":
        from .distilling import distill

        return distill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
