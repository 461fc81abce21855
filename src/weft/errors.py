"""The named errors that a user meets, and the two hints that they give: the nearest name, what to install."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AdapterError", "DataError", "MissingExtra", "QuantiseError", "RecipeError", "WeftError", "missing_extra",
    "nearest",
]  # fmt: skip


class WeftError(Exception):
    """Something that the user can put right; the command line prints it as one sentence, without a traceback."""


class AdapterError(WeftError, ValueError):
    """An adapter name or state that does not fit what was asked."""


class RecipeError(WeftError, ValueError):
    """A recipe that cannot be read or holds a wrong key or value."""


class DataError(WeftError, ValueError):
    """Data that cannot be found, has no known format, or has too many bad rows."""


class QuantiseError(WeftError, ValueError):
    """A quantisation that does not exist, lacks an option, or cannot be had for this model."""


class MissingExtra(WeftError, ImportError):
    """An optional dependency is not installed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say what `name` was probably meant to be: the closest known name, else the whole list."""
    names = sorted({str(item) for item in known})
    close = get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "none are known"


def missing_extra(extra: str, *, needs: str) -> MissingExtra:
    """The error for a package that is not installed, with the command that installs it; the caller raises it."""
    return MissingExtra(f"{needs} is not installed; install it with: pip install 'weft[{extra}]'", name=needs)
