"""`python -m lmssl`, and with it `accelerate launch -m lmssl`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from lmssl.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # while importing, before `main` can say it
        sys.exit(130)
