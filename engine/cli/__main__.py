"""`python -m nnturbo.engine.cli`."""

import sys

from .main import main

sys.exit(main())
