"""Training: `sft` and `dpo` on typed settings, and what they are made of.

Public names, listed in `__init__.pyi`, load on first use, so that `config.py` can be read without
jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
