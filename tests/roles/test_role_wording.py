"""Numbers agree with their nouns in what the roles say on nodes."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from role_modules import ROOT, load

load("ssh_mesh")  # so that module_utils are found
phase = importlib.import_module("ansible.module_utils.phase")
FILES = sorted(
    path for part in ("library", "module_utils", "action_plugins", "files") for path in ROOT.glob(f"roles/*/{part}/*.py")
)  # fmt: skip
# A plural right after a number that may be 1: use `counted`.
PLURAL = re.compile(
    r"^ (?:[a-z]+ )?(?:GPU|key|node|port|link|part|package|file|character|process|host|member|other)(?:s|es)\b"
)


@pytest.mark.parametrize(("number", "text"), [(0, "0 keys"), (1, "1 key"), (2, "2 keys")])
def test_a_number_has_its_noun(number, text):
    assert phase.counted(number, "key") == text


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parts[-3]}/{path.name}")
def test_no_count_is_followed_by_a_fixed_plural(path):
    found = []
    for string in ast.walk(ast.parse(path.read_text())):
        if isinstance(string, ast.JoinedStr):
            for value, after in zip(string.values, string.values[1:], strict=False):
                counts = isinstance(value, ast.FormattedValue) and "len(" in ast.unparse(value)
                if counts and isinstance(after, ast.Constant) and PLURAL.match(str(after.value)):
                    found.append(ast.unparse(string))
    assert found == []
