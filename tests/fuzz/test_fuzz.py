"""Two hundred inputs of the fuzz harness; `make fuzz` runs five thousand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
def test_damaged_files_are_read_or_refused_in_one_line() -> None:
    script = Path(__file__).with_name("run.py")
    found = subprocess.run([sys.executable, str(script), "200"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    assert json.loads(found.stdout)["refused"] > 50
