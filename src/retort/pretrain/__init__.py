"""Language-model training from scratch or from a checkpoint: ``retort pretrain``."""
