"""Measures of what was written: gold rewards."""
