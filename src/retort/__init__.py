"""Retort: distil a language model into a small student, and serve either one faster."""
