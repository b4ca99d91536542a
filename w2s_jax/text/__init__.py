"""Tokenizers, files of rows, journals and batches. No model code."""
