"""What made the committed tables: the embedded default, the sentiment experiment, a small run."""
