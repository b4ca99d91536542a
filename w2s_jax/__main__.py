"""`python -m w2s_jax` is `w2s`."""

import sys

from w2s_jax.cli.main import main

sys.exit(main())
