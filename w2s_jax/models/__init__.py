"""One decoder family and one encoder: their configs, parameters and checkpoints."""
