"""The tests, which mirror src/weft."""
