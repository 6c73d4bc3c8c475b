"""Measuring a running server: open-loop load, and what its clients saw."""
