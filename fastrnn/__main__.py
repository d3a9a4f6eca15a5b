"""``python -m fastrnn`` is the same as the command ``fastrnn``."""

import sys

from fastrnn.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
