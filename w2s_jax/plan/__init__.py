"""Ahead-of-time compilation for slices that are not here: what fits, and what it moves."""
