"""`python -m uft.cli`, for launchers such as torchrun."""

import sys

from uft.cli import main

sys.exit(main())
