"""How a worker is driven: a line on its standard input asks for an iteration, a line of JSON on its output answers.

Nothing but the standard library, and Python 3.11: both environments import it.
"""

import json
import os
import sys
from typing import Any


def peak_mb() -> float:
    """The most memory that this process has held at once, 10^6 bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e6


class Channel:
    """The worker's end. Standard output is for answers alone: whatever else is printed goes to standard error."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = json.loads(sys.argv[1])
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **answer: Any) -> None:
        """Answers, with the peak of memory so far."""
        print(json.dumps(answer | {"peak MB": peak_mb()}), file=self._answers, flush=True)

    def wait(self) -> None:
        """Until an iteration is asked for; ends the process when nothing will be any more."""
        if not sys.stdin.readline():
            sys.exit()
