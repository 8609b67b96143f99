"""The scripts of `analyses/` and `benchmarks/` can be imported here."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(REPOSITORY / "analyses"), str(REPOSITORY / "benchmarks")]
