"""What every training run shares: checkpoints, records, arguments."""
