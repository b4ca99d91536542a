"""Measures of what was written: gold rewards, lm-eval's tasks, what quantising a policy changes.

Public names, listed in `__init__.pyi`, load on first use, so that `config.py` can be read without
jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
