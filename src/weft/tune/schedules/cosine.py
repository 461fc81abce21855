"""Cosine: half a wave from the peak to zero (Loshchilov and Hutter 2016, arXiv 1608.03983, without restarts)."""

from math import cos, pi

__all__ = ["factor"]


def factor(progress: float) -> float:
    """(1 + cos(pi progress)) / 2."""
    return 0.5 * (1.0 + cos(pi * progress))
