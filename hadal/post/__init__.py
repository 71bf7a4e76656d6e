"""Post-training: supervised fine-tuning, reinforcement learning, its tasks and rewards, on the same `Transformer`."""
