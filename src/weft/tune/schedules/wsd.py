"""Warm-up, stable, decay: the peak, then a line to zero over the last fifth (Hu et al. 2024, arXiv 2404.06395)."""

__all__ = ["factor"]

_DECAY_SHARE = 0.2


def factor(progress: float) -> float:
    """1 until the last fifth, then linear."""
    return min(1.0, (1.0 - progress) / _DECAY_SHARE)
