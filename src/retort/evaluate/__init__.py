"""Measures of a student: ROUGE-L, acceptance, perplexity, and whether a difference is real.

Nothing here is imported by models, decoding or training; each module takes models, engines or
texts and returns a small frozen dataclass or a list of numbers. The modules are imported by
their own names (``from retort.evaluate import rouge``), so that reading ROUGE needs no torch.
"""
