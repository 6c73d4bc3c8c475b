"""Distillation: methods as mixes of sequences and losses, on transformers' Trainer.

`DistillConfig` and `DistillTrainer` are the public names; `retort.distill.run.run` is a whole run
from a configuration.
"""
