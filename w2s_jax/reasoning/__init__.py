"""Weak-to-strong reasoning (arXiv 2407.13647): a run in stages, from questions to a report.

Public names, listed in `__init__.pyi`, load on first use, so that `config.py` can be read without
jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
