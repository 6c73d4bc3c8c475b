"""The fields of `DistillConfig` by subject, and what contradicts what."""
