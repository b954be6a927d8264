"""``python -m cvxnn.cli``."""

import sys

from cvxnn.cli import main

sys.exit(main())
