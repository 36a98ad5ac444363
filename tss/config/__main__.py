"""`python -m tss.config` prints the table of settings that the README shows."""

import sys

from tss.config.showing import table

sys.stdout.write(table() + "\n")
