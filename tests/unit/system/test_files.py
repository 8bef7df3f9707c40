"""Files that are written whole: JSON is read as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from runner.system.files import write_json_atomic


@given(st.lists(st.one_of(st.binary().map(os.fsdecode), st.text())))
def test_json_is_read_as_it_was_whatever_bytes_a_user_has_typed(tmp_path_factory, words):
    file = Path(tmp_path_factory.mktemp("json"), "words.json")
    write_json_atomic(file, words)
    assert json.loads(file.read_text(encoding="utf-8")) == words


def test_what_is_text_stays_readable(tmp_path):
    write_json_atomic(tmp_path / "words.json", ["日本", "\udcff"])
    assert (tmp_path / "words.json").read_text(encoding="utf-8") == '[\n "日本",\n "\\udcff"\n]\n'
