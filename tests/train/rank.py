"""A rank of a drill under torchrun: FAULT WHO CONFIG KEY=VALUE ..., as `tests.train.drills` starts it."""

import os
import sys

from nmoe.cli.main import main
from tests.train import faults

if __name__ == "__main__":
    fault, who, config, *sets = sys.argv[1:]
    if os.environ["RANK"] == who:
        faults.arm(fault)
    main(["train", config, *(word for item in sets for word in ("--set", item))])
