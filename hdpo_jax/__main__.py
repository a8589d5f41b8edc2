"""`python -m hdpo_jax` is `hdpo`."""

import sys

from hdpo_jax.cli import main

sys.exit(main())
