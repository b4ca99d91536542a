"""Weak-to-strong reasoning (arXiv 2407.13647): final answers, curation, preferences, the stages."""
