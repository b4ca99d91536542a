"""The experiments behind the committed tables: embedded default, sentiment, a small run."""
