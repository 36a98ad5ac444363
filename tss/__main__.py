"""`python -m tss` is `tss`."""

import sys

from tss.cli import main

sys.exit(main())
