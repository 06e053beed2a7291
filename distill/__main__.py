"""``python -m dittfast.distill`` and ``accelerate launch -m dittfast.distill``: as the command."""

import sys

from dittfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
