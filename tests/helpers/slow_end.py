"""`liger-trainer`, whose first process takes a while to record how a run has ended."""

import sys
import time

from liger_trainer import cli
from liger_trainer.runs.folder import RunFolder

write = RunFolder.write


def slow(self, state, **facts):
    if state == "interrupted":
        time.sleep(3)
    return write(self, state, **facts)


if __name__ == "__main__":
    RunFolder.write = slow
    sys.exit(cli.main())
