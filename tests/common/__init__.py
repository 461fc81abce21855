"""Checks that every method passes at every kind of site, in every reading."""
