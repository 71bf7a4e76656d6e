"""Post-training: fine-tuning, reinforcement learning, tasks and rewards, on the same `Transformer`."""
