"""`python -m lmssl`, and with it `accelerate launch -m lmssl`."""

from __future__ import annotations

import sys

from lmssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
