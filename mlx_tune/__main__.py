"""`python -m mlx_tune` is the command `mlx-tune`."""

import sys

from mlx_tune.cli import main

sys.exit(main())
