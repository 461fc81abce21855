"""The report of a run: one HTML file without scripts and without outside parts, made from its result and its log."""

from weft.report.page import render, write_report

__all__ = ["render", "write_report"]
