"""Linear: a straight line from the peak to zero."""

__all__ = ["factor"]


def factor(progress: float) -> float:
    """1 - progress."""
    return 1.0 - progress
