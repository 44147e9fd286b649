"""The child process of ``our_quantiser``: it begins as the commands do, before anything heavy is imported.

``python -m reelforge.tools.bench.our_quantiser_child JOB.json``.
"""

from __future__ import annotations

import importlib
import sys

from reelforge.tools.deferred import defer


def main(path: str) -> None:
    """Run the job in the file ``path``."""
    defer()
    importlib.import_module("reelforge.tools.bench.our_quantiser").main(path)


if __name__ == "__main__":
    main(sys.argv[1])
