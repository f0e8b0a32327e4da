"""`python -m alpagasus2` is the `alpagasus2` command."""

import sys

from alpagasus2.cli import main

sys.exit(main())
