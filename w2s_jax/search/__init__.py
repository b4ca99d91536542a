"""Search: proposers × scorers × selectors, the jitted step, and the run over many prompts.

Public names, listed in `__init__.pyi`, load on first use, so that `settings.py` can be read without
jax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
