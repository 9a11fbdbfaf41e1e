"""Where sources and results lie."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "profiling" / "results"
