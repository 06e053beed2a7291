"""``python -m dittfast`` is the ``dittfast`` command."""

import sys

from .cli import main

sys.exit(main())
