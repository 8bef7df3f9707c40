"""benchmarks/sft_speed.py for real: tiny arms on the CPU, twice each. Slow (some 30 s): every process imports torch and trains."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.local


def test_the_product_and_the_stock_trainer_learn_the_same_and_the_page_says_how_fast(tmp_path: Path):
    page = tmp_path / "page.md"
    argv = [sys.executable, ROOT / "benchmarks" / "sft_speed.py", "--device", "cpu", "--arms", "fast,stock-tuned"]
    argv += ["--layers", "1", "--minutes", "8", "--out", page]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"round \d, [\w-]+", ended.stderr) == [
        *("round 1, fast", "round 1, stock-tuned", "round 2, stock-tuned", "round 2, fast"),
    ]
    text = page.read_text()
    assert text in ended.stdout
    assert "`fast` 1 + 1 + 1; 1 + 1 + 1, `stock-tuned` 1 + 1 + 1; 1 + 1 + 1." in text
    rows = {
        line.split("`")[1]: [part.strip() for part in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    }
    assert "- Result: no fault." in text
    assert rows["fast"][-1] == "0.000" and 0 < float(rows["stock-tuned"][-1]) < 0.5, "close, and not the same numbers"
    real, positions = (float(rows["stock-tuned"][column].replace(",", "")) for column in (1, 6))
    assert positions > 1.1 * real, "padding is computed and not counted"
