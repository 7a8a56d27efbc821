"""``python -m repvgg``."""

import sys

from repvgg.cli import main

sys.exit(main())
