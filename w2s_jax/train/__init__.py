"""Losses, optimizers, the train step and its checkpoints."""
