"""Tests of other libraries' formats."""
