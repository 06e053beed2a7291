"""How tests start another Python."""

import sys

# -P keeps the folder that it starts in off the path, where it holds our kernels/ folder.
PYTHON = (sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []))
