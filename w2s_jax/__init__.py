"""Weak-to-strong alignment in JAX: small tuned models steer large frozen ones.

Public names, listed in `__init__.pyi`, load on first use, so that `import w2s_jax` stays cheap and
touches no device.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
