from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ stands beside src/, and is not installed
    sys.path.insert(0, str(ROOT))
