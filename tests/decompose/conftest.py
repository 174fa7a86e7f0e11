"""What the tests of decompositions share."""

from __future__ import annotations

import sys
from pathlib import Path

# Test folders are not packages; what several files share is imported from beside them.
sys.path.insert(0, str(Path(__file__).parent))
