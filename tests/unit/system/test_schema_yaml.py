"""YAML files as they are read: what is not plain is one line."""

from __future__ import annotations

import pytest

from runner.errors import UsageError
from runner.system.schema import read_yaml


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {path: /a}\nmodel: {path: /b}\n", "line 2: not valid YAML: model is there twice"),
        ("model:\n  path: /a\n  path: /b\n", "line 3: not valid YAML: path is there twice"),
        ("rows:\n- {a: 1, a: 2}\n", "line 2: not valid YAML: a is there twice"),
        ("training: {batch_size: 2020-99-99}\n", "not valid YAML: month must be in 1..12"),
        ("a: !!python/object/apply:os.system [id]\n", "not valid YAML"),
    ],
)
def test_a_file_that_says_two_things_or_none_is_refused(tmp_path, text, said):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_yaml(file)
    assert said in str(refused.value) and str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_merged_may_be_said_again(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("b: &b {x: 1, y: 2}\na: {inner: &i {<<: *b, x: 3}}\nc: {<<: *i, y: 4}\n")
    assert read_yaml(file) == {
        "b": {"x": 1, "y": 2},
        "a": {"inner": {"x": 3, "y": 2}},
        "c": {"x": 3, "y": 4},
    }
    file.write_text("")
    assert read_yaml(file) is None
