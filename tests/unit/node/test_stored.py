"""A user's folders on a node: whole or not at all, repaired when torn, never changed while they are used."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from runner.node import code
from runner.node.requests import StoreRequest
from runner.system import folders, tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    (made / "a b").mkdir(parents=True)
    (made / "train.py").write_text("print(1)\n")
    (made / "a b" / "run.sh").write_text("true\n")
    (made / "a b" / "run.sh").chmod(0o755)
    (made / "link").symlink_to("train.py")
    return made


def send(source: Path, root: Path, digest: str) -> Path:
    """What rsync does."""
    target = code.incoming(root / digest)
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    return target


def ask(root: Path, digest: str, arrived: bool = False, work: Path | str = "") -> code.Stored:
    return code.store(StoreRequest(str(root), digest, arrived, str(work)))


@pytest.fixture
def stored(source: Path, tmp_path: Path) -> Path:
    digest = tree.measure(source).digest
    send(source, tmp_path / "code", digest)
    assert ask(tmp_path / "code", digest, arrived=True).whole
    return tmp_path / "code" / digest


def test_what_is_not_there_is_asked_for_and_what_has_arrived_takes_its_place(source, tmp_path):
    root, digest = tmp_path / "code", tree.measure(source).digest
    assert ask(root, digest) == code.Stored(whole=False)
    target = send(source, root, digest)
    assert not ask(root, digest).whole, "half of it may be there: only after it was sent is it looked at"
    assert target.exists()
    assert ask(root, digest, arrived=True) == code.Stored(whole=True, found=digest)
    assert tree.measure(root / digest).digest == digest and not target.exists()
    assert ask(root, digest).whole


def test_what_arrives_torn_is_removed_and_said(source, tmp_path):
    root, digest = tmp_path / "code", tree.measure(source).digest
    target = send(source, root, digest)
    (target / "train.py").write_text("prin")
    answer = ask(root, digest, arrived=True)
    assert (
        not answer.whole and answer.found not in ("", digest) and not target.exists() and not (root / digest).exists()
    )


TORN = {
    "a content of the same size": lambda folder: rewrite(folder / "train.py", "print(2)\n"),
    "half a file": lambda folder: rewrite(folder / "train.py", "pri"),
    "a file less": lambda folder: (folder / "train.py").unlink(),
    "a file more": lambda folder: (folder / "cache.bin").write_text("x"),
    "a mode": lambda folder: (folder / "train.py").chmod(0o755),
    "a link": lambda folder: ((folder / "link").unlink(), (folder / "link").symlink_to("elsewhere")),
}


def rewrite(path: Path, text: str) -> None:
    status = path.stat()
    path.chmod(0o644)
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.chmod(0o444)


@pytest.mark.parametrize("tear", TORN.values(), ids=TORN)
def test_a_torn_copy_is_seen_whatever_was_done_to_it_and_replaced(source, stored, tear):
    assert ask(stored.parent, stored.name).whole  # its files were read, and are known now
    tear(stored)
    answer = ask(stored.parent, stored.name)
    assert not answer.whole and answer.found != stored.name
    with open(stored / "a b" / "run.sh") as used:  # by a job that runs meanwhile
        send(source, stored.parent, stored.name)
        assert ask(stored.parent, stored.name, arrived=True).whole
        assert used.read() == "true\n"
    assert tree.measure(stored).digest == stored.name
    assert [path.name for path in stored.parent.iterdir() if not path.name.startswith(".")] == sorted(
        [stored.name, *(path.name for path in stored.parent.glob("*.lock"))]
    )


def test_files_in_it_are_not_to_be_written(stored):
    assert {path.stat().st_mode & 0o777 for path in code._files(stored)} == {0o444, 0o555}


def test_a_run_works_in_a_copy_which_is_kept_with_what_the_script_wrote(stored, tmp_path):
    work = tmp_path / "work" / "run-1"
    assert ask(stored.parent, stored.name, work=work).whole
    assert tree.measure(work).digest == stored.name
    (work / "train.py").write_text("changed by the script")
    (work / "out").mkdir()
    (work / "out" / "checkpoint").write_text("7")
    assert ask(stored.parent, stored.name, work=work).whole
    assert (work / "train.py").read_text() == "changed by the script" and (work / "out" / "checkpoint").exists()
    assert tree.measure(stored).digest == stored.name, "what a run writes stays out of the store"


def test_other_code_replaces_the_files_of_the_former_and_nothing_else(source, stored, tmp_path):
    work = tmp_path / "work" / "run-1"
    ask(stored.parent, stored.name, work=work)
    (work / "checkpoint").write_text("7")
    (source / "train.py").write_text("print('mended')\n")
    (source / "link").unlink()
    digest = tree.measure(source).digest
    send(source, stored.parent, digest)
    assert ask(stored.parent, digest, arrived=True, work=work).whole
    assert (work / "train.py").read_text() == "print('mended')\n" and not os.path.lexists(work / "link")
    assert (work / "checkpoint").read_text() == "7"


def test_a_copy_that_was_not_finished_is_made_again(stored, tmp_path, monkeypatch):
    work = tmp_path / "work" / "run-1"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(work))

    with monkeypatch.context() as patch:
        patch.setattr(code, "_copy", fail)
        answer = ask(stored.parent, stored.name, work=work)
        assert (answer.whole, answer.kind) == (False, "disk_full") and "no space" in answer.problem
    assert not work.exists()
    assert ask(stored.parent, stored.name, work=work).whole and tree.measure(work).digest == stored.name


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "code").write_text("no folder")
    answer = ask(tmp_path / "code", "0" * 64)
    assert not answer.whole and answer.kind == "not_permitted" and str(tmp_path / "code") in answer.problem


def test_two_that_ask_at_once_leave_one_whole_copy(source, tmp_path):
    root, digest = tmp_path / "code", tree.measure(source).digest
    send(source, root, digest)
    answers: list[code.Stored] = []
    work = tmp_path / "work" / "run-1"
    threads = [
        threading.Thread(target=lambda: answers.append(ask(root, digest, arrived=True, work=work))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.whole for answer in answers] == [True] * 4
    assert tree.measure(work).digest == tree.measure(root / digest).digest == digest


def fake(root: Path, number: int, age_s: float) -> Path:
    """A stored folder that was used `age_s` ago."""
    folder = root / f"{number:064x}"
    folder.mkdir(parents=True)
    used = folders.use_of(folder)
    used.touch()
    moment = used.stat().st_mtime - age_s
    os.utime(used, (moment, moment))
    return folder


def test_folders_that_were_not_used_for_long_go_but_none_that_is_used(source, tmp_path):
    root, digest = tmp_path / "code", tree.measure(source).digest
    recent = [fake(root, number, 3600.0 * number) for number in range(1, 5)]
    old = [fake(root, number, code.UNUSED_S + 1000.0 * number) for number in range(10, 20)]
    send(source, root, digest)
    (root / "notes").mkdir()  # nobody's of ours
    for name, age_s in (("a", code.UNUSED_S + 10), ("b", 10)):  # transfers that were interrupted
        (root / f"{name * 64}.incoming").mkdir()
        os.utime(root / f"{name * 64}.incoming", (time.time() - age_s,) * 2)
    with open(folders.use_of(old[-1])) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        ask(root, digest, arrived=True)
        assert old[-1].exists(), "it is used"
    left = [folder for folder in old if folder.exists()]
    assert left == [*old[: code.KEPT - 1 - len(recent)], old[-1]] and all(folder.exists() for folder in recent)
    assert (root / digest).exists() and (root / "notes").exists()
    assert [path.name[0] for path in root.glob("*.incoming")] == ["b"]
    ask(root, digest)
    assert not old[-1].exists()


def test_many_that_were_used_lately_stay(tmp_path, source):
    root, digest = tmp_path / "code", tree.measure(source).digest
    made = [fake(root, number, 3600.0) for number in range(20)]
    send(source, root, digest)
    ask(root, digest, arrived=True)
    assert all(folder.exists() for folder in made)


def test_a_lock_of_use_dates_it(stored):
    os.utime(folders.use_of(stored), (0, 0))
    with folders.in_use(stored):
        assert folders.use_of(stored).stat().st_mtime > 10**9
