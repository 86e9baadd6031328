"""``python -m deployments.cli`` is ``pyramid-serve``."""

import sys

from deployments.cli import main

sys.exit(main())
