"""Mathematical operations: naive references, fast forms, native and PyTorch twins."""
