"""Pre-training: the trainer, its optimizer, schedules, balance, checkpoints; `hadal train RECIPE`."""
