"""A model published by rsync over a real sshd on loopback: quoting, refusal, and a host that is not reached."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import loopback_sshd
from runner.errors import InfrastructureError, UsageError
from runner.system import manifest
from runner.workflow.publish import publish

pytestmark = [
    pytest.mark.local,
    pytest.mark.skipif(
        loopback_sshd.SSHD is None or shutil.which("rsync") is None, reason="sshd or rsync is not installed"
    ),
]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a host that `ssh` reaches on a port of this machine; the user's own configuration is not used."""
    with loopback_sshd.running(tmp_path) as sshd:
        (tmp_path / "known_hosts").write_text(f"store {sshd.host_key}\n")
        (tmp_path / "ssh_config").write_text(
            f"Host store\nHostName 127.0.0.1\nPort {sshd.port}\nHostKeyAlias store\nIdentityFile {sshd.client}\n"
            f"Host *\nUserKnownHostsFile {tmp_path}/known_hosts\nGlobalKnownHostsFile /dev/null\nIdentitiesOnly yes\n"
        )
        program = tmp_path / "bin" / "ssh"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        yield "store"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "a 'b'"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "$(touch hacked).bin").write_bytes(b"x" * 100_000)
    manifest.write(folder, {"question": "1 + 2?", "answer": "3"})
    return folder


def test_a_model_arrives_on_the_host_whatever_its_folder_is_called(host, model, tmp_path):
    there = tmp_path / "store" / "$(touch hacked); rm -r x; `id` 'my' model"
    found = publish(model, f"rsync:{host}:{there}")
    assert found.where == f"{host}:{there}/"
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }
    assert publish(model, f"rsync:{host}:{there}") == found
    assert not list(tmp_path.rglob("hacked")) and not Path.home().joinpath("hacked").exists()


def test_something_else_on_the_host_is_not_written_over(host, model, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "config.json").write_text("another model's")
    with pytest.raises(UsageError, match="the folder has 1 entry and no published model; name another"):
        publish(model, f"rsync:{host}:{tmp_path}/store")
    assert (tmp_path / "store" / "config.json").read_text() == "another model's"


@pytest.mark.parametrize(
    ("name", "says"), [("nobody@store", "Permission denied"), ("127.0.0.1", "Connection refused|Host key verification")]
)
def test_a_host_that_does_not_let_us_in_is_one_line(host, model, tmp_path, name, says):
    with pytest.raises(InfrastructureError, match=says) as caught:
        publish(model, f"rsync:{name}:{tmp_path}/store")
    assert str(caught.value).startswith(f"--publish rsync:{name}:") and "\n" not in str(caught.value)
