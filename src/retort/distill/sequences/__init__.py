"""Where a training step's sequences come from: dataset, student, replay; and their revision."""
