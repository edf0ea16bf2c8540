"""`lmssl`, `python -m lmssl`, and with it `accelerate launch -m lmssl`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run a verb; returns the exit code of the process."""
    try:
        from lmssl import cli  # here, so that a Ctrl-C meanwhile ends in no traceback

        return cli.main()
    except KeyboardInterrupt:  # before `cli.main` could say it, or behind it
        return 130


if __name__ == "__main__":
    sys.exit(main())
