"""What every role's module is made of: all problems at once, nothing half-written, nothing that hangs."""

from __future__ import annotations

import os
import pwd
import time

import pytest
from ansible.module_utils import nvidia
from ansible.module_utils.phase import Stop, one_line, write
from hypothesis import given
from hypothesis import strategies as st

from role_modules import carry_out


def call(body, check=False, settings=None):
    return carry_out({"configure": body}, "configure", settings or {}, check)


def test_all_problems_are_told_at_once_in_one_line():
    def body(phase):
        phase.problem("driver", "560", "535", "upgrade it")
        phase.problem("GPUs", 8, 7)
        phase.facts["gpus"] = 7

    answer = call(body)
    assert not answer.ok and answer.facts == {"gpus": 7}
    assert answer.msg == "driver: expected 560, found 535 (upgrade it); GPUs: expected 8, found 7"


@pytest.mark.parametrize(
    ("inventory", "remedy"),
    [
        ("/srv/lab", "run `runner setup -i /srv/lab --tags roce_qos`, then `runner setup -i /srv/lab`"),
        ("/srv/my lab", "run `runner setup -i '/srv/my lab' --tags roce_qos`, then `runner setup -i '/srv/my lab'`"),
        ("", "run `runner setup --tags roce_qos`, then `runner setup`"),
    ],
)
def test_a_remedy_names_the_inventory_in_use_and_never_the_default_one(inventory, remedy):
    def body(phase):
        phase.problem("mtu", 9000, 1500, "run `runner setup --tags roce_qos`, then `runner setup`")
        raise Stop("gid", "one", "none", "run `runner setup --tags roce_qos`, then `runner setup`")

    answer = call(body, settings={"inventory": inventory})
    assert [problem["remedy"] for problem in answer.problems] == [remedy] * 2


def test_what_cannot_go_on_keeps_what_was_found_before():
    def body(phase):
        phase.problem("disk", "10 GiB", "2 GiB")
        raise Stop("nvidia-smi", "an answer", "nothing within 20 s")

    assert [problem["what"] for problem in call(body).problems] == ["disk", "nvidia-smi"]


def test_a_file_is_written_once_with_its_mode_and_a_diff(tmp_path):
    path = str(tmp_path / "etc" / "nccl.conf")
    first = call(lambda phase: phase.write(path, "A=1\n", 0o640))
    assert first.changed and first.diff[0]["after"] == "A=1\n\n" and os.stat(path).st_mode & 0o777 == 0o640
    assert not call(lambda phase: phase.write(path, "A=1\n", 0o640)).changed
    mode = call(lambda phase: phase.write(path, "A=1\n", 0o600))
    assert mode.diff[0]["before"] == "mode 0640\n" and os.stat(path).st_mode & 0o777 == 0o600


ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
NOBODY = pwd.getpwnam("nobody")


@pytest.mark.parametrize(
    ("mode", "uid", "wanted", "owner", "differs"),
    [
        (0o644, 0, 0o644, None, ""),
        (0o666, 0, 0o644, None, "mode 0666"),
        (0o600, 0, 0o644, None, "mode 0600"),  # others cannot read it any more
        (0o4755, 0, 0o755, None, "mode 4755"),
        (0o644, NOBODY.pw_uid, 0o644, None, "mode 0644, owner nobody:"),
        (0o644, 0, 0o600, "nobody", "mode 0644, owner root:root"),
        (0o600, NOBODY.pw_uid, 0o600, "nobody", ""),
        (0o666, 0, None, None, "mode 0666"),
        (0o640, 0, None, None, ""),  # where only writing matters, others may be kept from reading
    ],
)
@ROOT_ONLY
def test_mode_and_owner_are_put_right_or_named_as_the_phase_may(tmp_path, mode, uid, wanted, owner, differs):
    path = tmp_path / "conf"

    def make():
        path.write_text("A=1\n")
        os.chown(path, uid, 0)
        path.chmod(mode)

    def body(phase):
        phase.own(str(path), wanted, owner, "run `runner setup`")

    make()
    checked = carry_out({"verify": body}, "verify", {})
    assert [p["found"].startswith(differs) for p in checked.problems] == (
        [True] if differs else []
    ) and not checked.changed
    assert call(body, check=True).changed == bool(differs) and path.stat().st_mode & 0o7777 == mode
    assert call(body).changed == bool(differs)
    assert not call(body).changed and carry_out({"verify": body}, "verify", {}).ok
    assert path.read_text() == "A=1\n"


@ROOT_ONLY
def test_a_user_gets_a_file_in_his_own_folder_back(tmp_path):
    path = tmp_path / "keys"
    path.write_text("ssh-ed25519 AAAA\n")
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o011)
    os.chown(tmp_path, NOBODY.pw_uid, NOBODY.pw_gid)

    def body(phase):
        os.setegid(NOBODY.pw_gid)
        os.seteuid(NOBODY.pw_uid)
        try:
            phase.own(str(path), 0o600)
        finally:
            os.seteuid(0)
            os.setegid(0)

    assert call(body).changed and path.read_text() == "ssh-ed25519 AAAA\n"
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (NOBODY.pw_uid, 0o600)


@ROOT_ONLY
def test_a_group_that_may_read_is_the_owners_and_another_does_not_matter(tmp_path):
    path = tmp_path / "conf"
    path.write_text("x")
    os.chown(path, 0, NOBODY.pw_gid)
    path.chmod(0o644)
    assert not call(lambda phase: phase.own(str(path), 0o644)).changed
    assert call(lambda phase: phase.own(str(path), 0o640)).changed and path.stat().st_gid == 0


@ROOT_ONLY
def test_a_file_is_written_for_its_owner_and_none_is_made_for_a_user_that_is_not_there(tmp_path):
    path = tmp_path / "conf"
    call(lambda phase: phase.write(str(path), "x", 0o600, owner="nobody"))
    assert path.stat().st_uid == NOBODY.pw_uid and path.stat().st_mode & 0o777 == 0o600
    assert not call(lambda phase: phase.write(str(path), "x", 0o600, owner="nobody")).changed
    answer = call(lambda phase: phase.write(str(path), "y", 0o600, owner="no-such-user"))
    assert answer.problems[0]["what"] == "user no-such-user" and path.read_text() == "x"
    # In check mode, an earlier phase would have made the user.
    assert call(lambda phase: phase.own(str(path), 0o600, "no-such-user"), check=True).ok
    assert not call(lambda phase: phase.own(str(tmp_path / "none"), 0o600, "no-such-user")).changed


def test_check_mode_changes_nothing_and_tells_what_would_be(tmp_path):
    path = tmp_path / "conf"
    path.write_text("A=1\n")
    answer = call(lambda phase: (phase.write(str(path), "A=2\n"), phase.remove(str(path))), check=True)
    assert answer.changed and len(answer.diff) == 2
    assert path.read_text() == "A=1\n"


def test_a_secret_is_in_no_diff(tmp_path):
    path = tmp_path / "key"
    for text in ("geheim-1", "geheim-2"):
        answer = call(lambda phase, text=text: phase.write(str(path), text, 0o600, secret=True))
        assert answer.changed and "geheim" not in repr(answer.__dict__)


def test_a_killed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "conf"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write(str(path), "new \udcff")  # as good as a kill: it ends in the middle
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["conf"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_and_a_read_only_place_are_problems_with_their_path():
    def full(phase):
        with open("/dev/full", "w") as file:
            file.write("x")

    problem = call(full).problems[0]
    assert problem["found"] == "no space left on device" and "free some space" in problem["remedy"]
    problem = call(lambda phase: phase.write("/sys/shakedown/conf", "x")).problems[0]
    assert problem["what"].startswith("/sys") and problem["expected"] == "writable"


@pytest.mark.skipif(os.geteuid() == 0, reason="is root")
def test_an_ordinary_user_is_told_what_to_set():
    answer = carry_out({"verify": lambda phase: None}, "verify", {}, needs_root=True)
    assert answer.msg.startswith("user: expected root, found uid ") and "ansible_become: true" in answer.msg


# --- a phase that is carried out in the call of another ---


def both(first, second):
    return carry_out({"configure": first, "verify": second}, "configure", {}, also="verify")


def as_wanted(phase):
    phase.facts["first"] = 1


def test_a_phase_with_nothing_to_do_is_carried_out_in_the_call_of_another():
    def second(phase):
        phase.facts["second"] = 2
        phase.warn("in maintenance")
        phase.done.append("answers")

    answer = both(as_wanted, second)
    assert answer.also and answer.ok and answer.facts == {"first": 1, "second": 2}
    assert answer.warnings == ["in maintenance"] and answer.msg == "answers"


def test_what_it_would_change_or_finds_wrong_is_left_to_its_own_call(tmp_path):
    path = str(tmp_path / "conf")

    def stop(phase):
        raise Stop("munge", "up", "down")

    def refused(phase):
        raise PermissionError(1, "no", path)

    def halfway(body):
        def second(phase):
            phase.facts["second"] = 2
            phase.warn("half the truth")
            body(phase)

        return second

    for body in (
        lambda phase: phase.problem("peer", "a session", "refused"),
        lambda phase: phase.write(path, "x"),
        lambda phase: phase.remove(str(tmp_path)),
        stop,
        refused,
    ):
        answer = both(as_wanted, halfway(body))
        assert answer.ok and not answer.also and not answer.changed
        assert answer.facts == {"first": 1} and answer.warnings == []
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_it_is_not_tried_after_a_change_or_a_problem():
    def never(phase):
        raise AssertionError("carried out")

    assert both(lambda phase: phase.change("mode", "0644", "0600"), never).also is False
    assert both(lambda phase: phase.problem("disk", "10 GiB", "2 GiB"), never).also is False


def test_a_bug_is_a_bug():
    with pytest.raises(KeyError):
        call(lambda phase: phase.want["nothing of this name"])
    with pytest.raises(KeyError):
        both(as_wanted, lambda phase: phase.want["nothing of this name"])


@pytest.mark.parametrize(
    ("argv", "rc", "last"),
    [
        (["sh", "-c", "echo a; echo why >&2; exit 3"], 3, "why"),
        (["no-such-program"], None, "no-such-program: not found"),
        (["false"], 1, "status 1 without output"),
        (["printf", "\\377ok"], 0, "\ufffdok"),
    ],
)
def test_a_commands_end_is_a_value(argv, rc, last):
    outcomes = []
    call(lambda phase: outcomes.append(phase.run(argv, 10)))
    assert (outcomes[0].rc, outcomes[0].last_line) == (rc, last)


def test_a_hanging_command_is_ended_with_its_children():
    outcomes = []
    started = time.monotonic()
    call(lambda phase: outcomes.append(phase.run(["sh", "-c", "sleep 60 & wait"], 0.3)))
    assert outcomes[0].last_line == "sh gave no answer within 0.3 s"
    assert time.monotonic() - started < 10


def test_problems_read_well_without_a_remedy():
    assert one_line([{"what": "a", "expected": "b", "found": "c", "remedy": ""}]) == "a: expected b, found c"


@given(st.lists(st.integers(0, 999), min_size=1, max_size=4))
def test_versions_compare_as_numbers(parts):
    text = ".".join(map(str, parts))
    assert nvidia.version(text) == tuple(parts)
    assert nvidia.version(f"{text}-1ubuntu2")[: len(parts) - 1] == tuple(parts[:-1])


@pytest.mark.parametrize("text", ["", "N/A", "[Unknown Error]", "None"])
def test_what_is_no_version_has_no_numbers(text):
    assert nvidia.version(text) == ()
