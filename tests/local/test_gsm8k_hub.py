"""GSM8K by its name, from a hub: a stand-in on this machine that has it in the hub's own layout, with a few rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from fakes import hub
from role_modules import ROOT

pytestmark = pytest.mark.local

# As on the hub: two configurations with a split for training and one for tests.
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
"""
CODE = """
import json, sys
from pathlib import Path
from runner.errors import RunnerError
from runner.workloads.data import verl
import pyarrow.parquet
try:
    source = verl.open_source(sys.argv[1])
    found = [verl.prepare(source, schema, Path(sys.argv[2])) for schema in verl.Schema]
except RunnerError as error:
    sys.exit(f"{error.exit_code} {error.kind} {error}")
print(json.dumps([[pyarrow.parquet.read_table(each).to_pylist() for each in (one.train, one.val)] for one in found]))
"""


def table(tmp_path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return (tmp_path / "rows.parquet").read_bytes()


def prepared(source, tmp_path, endpoint):
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    argv = [sys.executable, "-c", CODE, source, str(tmp_path / "cache")]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, env={**os.environ, **own})


@pytest.mark.parametrize("source", ["gsm8k", "openai/gsm8k"])
def test_gsm8k_is_taken_from_the_hub_with_both_its_splits(tmp_path, source):
    train = [{"question": "What is 1 + 2?", "answer": "It is <<1+2=3>>3.\n#### 3"}] * 3
    test = [{"question": "And 500 + 600?", "answer": "#### 1,100"}]
    with hub.serving() as server:
        server.repositories["datasets/openai/gsm8k"] = hub.Repository(
            {
                "README.md": CARD.encode(),
                "main/train-00000-of-00001.parquet": table(tmp_path, train),
                "main/test-00000-of-00001.parquet": table(tmp_path, test),
                "socratic/train-00000-of-00001.parquet": table(tmp_path, test * 9),
            }
        )
        outcome = prepared(source, tmp_path, server.endpoint)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    (chats, chats_val), (prompts, prompts_val) = json.loads(outcome.stdout.splitlines()[-1])
    assert [len(each) for each in (chats, chats_val, prompts, prompts_val)] == [3, 1, 3, 1]
    assert chats[0]["messages"][1]["content"] == train[0]["answer"]
    assert prompts_val[0]["reward_model"]["ground_truth"] == "1100"
    again = prepared("gsm8k", tmp_path, "http://127.0.0.1:9")
    assert (again.returncode == 0) == (source == "gsm8k"), "what was prepared at its commit needs no hub"


def test_without_a_hub_one_line_says_what_to_use_instead(tmp_path):
    outcome = prepared("gsm8k", tmp_path, "http://127.0.0.1:9")
    assert outcome.stderr.strip() == (
        "3 hub_unreachable data set 'openai/gsm8k': the Hugging Face hub does not answer; "
        "give a local file or folder, or use 'arithmetic'"
    )
