"""`python -m liger_trainer` is `liger-trainer`."""

import sys

from liger_trainer.cli import main

sys.exit(main())
