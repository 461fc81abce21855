"""Measured claims: one file, one claim, each beside its rival in one run."""
