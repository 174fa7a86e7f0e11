import sys
from pathlib import Path

# Test folders are not packages; the networks that several files share are imported from beside them.
sys.path.insert(0, str(Path(__file__).parent))
