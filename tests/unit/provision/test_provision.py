"""`runner setup` and `runner check`: what Ansible's events mean, folded for people, and the exit code."""

from __future__ import annotations

import json

import pytest

from conftest import NAMES, ROOT
from runner.errors import UsageError
from runner.provision import board as provision_board
from runner.provision import playbook, roles
from runner.provision.playbook import Call

NODES = {name: f"node{position:03d}" for position, name in enumerate(NAMES, 1)}


def raw(host=NAMES[0], event="runner_on_ok", role="roce_qos", phase="verify", **result):
    """An event as ansible-runner gives it."""
    data = {
        "host": host,
        "play": "Verify",
        "task": "Read back",
        "duration": 0.31234,
        "task_path": f"/srv/shakedown/roles/{role}/tasks/{phase}.yml:2",
        "res": result,
    }
    return {"event": event, "created": "2026-11-21T07:00:00", "event_data": data | ({"role": role} if role else {})}


def board(*raws):
    events = [event for one in raws if (event := playbook.parse(one))]
    return provision_board.Board(NODES, events)


WRONG = {"what": "mlx5_0/eth1 pfc", "expected": "3", "found": "off", "remedy": ""}


def failed(host, *problems, role="roce_qos"):
    return raw(host, "runner_on_failed", role, msg="…", problems=list(problems))


# --- events -------------------------------------------------------------------------------------------------------


def test_an_event_keeps_what_people_need_and_nothing_of_the_invocation():
    event = playbook.parse(raw(changed=True, invocation={"module_args": {"settings": {"munge_key": "geheim"}}}))
    assert (event.status, event.role, event.phase, event.duration_s) == ("changed", "roce_qos", "verify", 0.312)
    assert "geheim" not in repr(event)


@pytest.mark.parametrize("event", ["playbook_on_stats", "runner_on_start", "verbose", ""])
def test_what_says_nothing_of_a_host_is_no_event(event):
    assert playbook.parse(raw(event=event)) is None


def test_a_failure_that_the_playbook_expects_is_none():
    one = raw(event="runner_on_failed", msg="no")
    one["event_data"]["ignore_errors"] = True
    assert playbook.parse(one).status == "ok"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ({"msg": "driver: expected 560, found 535"}, "driver: expected 560, found 535"),
        (
            {"msg": "Task failed: Finalization of task args for 'roce_qos' failed: Error while resolving value for "
                    "'settings': The lookup plugin 'role_settings' failed: roce_qos: unknown variable 'x'"},
            "roce_qos: unknown variable 'x'",
        ),
        ({"msg": "non-zero return code", "stderr": "warming up\nno space left\n"}, "no space left"),
        ({"msg": "MODULE FAILURE: see stderr", "module_stderr": "Traceback…\nKeyError: 'gpus'"},
         "the module crashed: KeyError: 'gpus'"),
        ({"msg": "Module result deserialization failed: No start of json char found",
          "module_stderr": "pyenv: python3.13: command not found\n\nThe command exists in these versions:\n  3.13.0\n"},
         "the module gave no answer: pyenv: python3.13: command not found"),
        ({}, "failed without output"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_one_line_without_ansibles_own_words(result, said):
    assert playbook.message(result) == said


def test_the_call_limits_to_the_chosen_nodes_and_quotes_once():
    call = Call("site.yml", "inventory/a b", ("n1", "n2"), ssh_config="/tmp/x y/ssh_config", tags="verify", check=True)
    *before, variables, book = call.command()
    assert before == [
        "ansible-playbook", "--inventory", "inventory/a b", "--limit", "n1,n2",
        "--tags", "verify", "--check", "--diff", "--extra-vars",
    ]  # fmt: skip
    assert json.loads(variables)["ansible_ssh_common_args"] == "-F '/tmp/x y/ssh_config'" and book == str(
        ROOT / "site.yml"
    )


# --- folded -------------------------------------------------------------------------------------------------------


def test_equal_problems_of_several_nodes_are_one_line():
    told = board(failed(NAMES[1], WRONG), failed(NAMES[2], WRONG), failed(NAMES[7], WRONG | {"found": "5"}))
    assert [(f.nodes, f.line()) for f in provision_board.failures(told)] == [
        ("node[002-003]", "roce_qos: mlx5_0/eth1 pfc: expected 3, found off"),
        ("node008", "roce_qos: mlx5_0/eth1 pfc: expected 3, found 5"),
    ]


def test_every_problem_of_a_node_is_told_but_not_the_playbooks_repetition():
    last = raw(NAMES[1], "runner_on_failed", role="", msg="roce_qos: …")
    told = board(failed(NAMES[1], WRONG, {"what": "mtu", "expected": "9000", "found": "1500"}), last)
    assert [f.what for f in provision_board.failures(told)] == ["mlx5_0/eth1 pfc", "mtu"]


def test_a_playbooks_own_reason_is_told_when_no_role_has_one():
    told = board(raw(NAMES[0], "runner_on_failed", role="", msg="a and b have the same runner_alias node001"))
    assert provision_board.failures(told)[0].line() == "a and b have the same runner_alias node001"


def test_warnings_and_differences_are_folded_too():
    entry = {"before_header": "eth1 mtu", "after_header": "eth1 mtu", "before": "1500\n", "after": "9000\n"}
    told = board(*(raw(name, changed=True, warnings=["clock unknown"], diff=[entry]) for name in NAMES[:3]))
    assert provision_board.warnings(told) == [("node[001-003]", "roce_qos", "clock unknown")]
    assert provision_board.diffs(told) == [("node[001-003]", "eth1 mtu", "1500", "9000")]


def test_the_table_shows_the_worst_of_each_role_on_each_node():
    told = board(
        raw(NAMES[0], changed=True),
        raw(NAMES[0]),
        raw(NAMES[0], role="nccl_build", event="runner_on_skipped"),
        failed(NAMES[1], WRONG),
        raw(NAMES[2], "runner_on_unreachable", msg="gone"),
    )
    rows = [line.split() for line in provision_board.table(told).splitlines()]
    assert rows[:2] == [["node", "roce"], ["qos"]]
    assert rows[3:7] == [["node001", "changed"], ["node002", "FAILED"], ["node003", "NO", "ANSWER"], ["node004", "–"]]
    assert rows[-1] == ["off:", "nccl_build"]


def told_off(reasons, host=NAMES[0]):
    return raw(host, role="", ansible_facts={"site_off": reasons})


def skipped(role, host=NAMES[0]):
    return raw(host, "runner_on_skipped", role)


def test_a_role_that_is_off_says_why_once_for_all_nodes_and_roles():
    reasons = {"nccl_build": "this machine is the only node", "roce_qos": "this machine is the only node"}
    events = [one for name in NAMES for one in (told_off(reasons, name), *(skipped(role, name) for role in reasons))]
    events += [raw(NAMES[0], role="cuda_check", off="no NVIDIA GPU here", msg="no NVIDIA GPU here")]
    events += [raw(name, role="cuda_check") for name in NAMES[1:]]
    events += [raw(name, role="ssh_mesh", event="runner_on_skipped") for name in NAMES]
    told = board(*events)
    lines = provision_board.table(told).splitlines()
    assert lines[-3:] == [
        "off: nccl_build, roce_qos: this machine is the only node",
        "off on node001: cuda_check: no NVIDIA GPU here",
        "off: ssh_mesh",
    ]
    assert "node001  off" in lines and not told.bad()
    assert provision_board.summary(told, "complete", 1.0, "")["off"]["node001"]["cuda_check"] == "no NVIDIA GPU here"


def test_a_role_that_was_to_be_off_and_ran_is_not_called_off():
    assert "off" not in provision_board.table(board(told_off({"roce_qos": "one node"}), raw()))


def test_the_table_of_all_roles_fits_into_80_columns():
    told = board(*(raw(name, role=role, changed=True) for name in NAMES for role in roles.roles()))
    assert max(map(len, provision_board.table(told).splitlines())) <= 80


def test_the_summary_is_json_with_a_schema():
    told = provision_board.summary(board(failed(NAMES[1], WRONG)), "failed", 12.34, "")
    assert json.loads(json.dumps(told)) == told
    assert told["nodes"]["node002"] == {"name": NAMES[1], "roles": {"roce_qos": "failed"}}
    assert told["failures"][0]["expected"] == "3" and told["error"] is None


@pytest.mark.parametrize(
    ("raws", "state", "code"),
    [
        ([raw()], "complete", 0),
        ([failed(NAMES[0], WRONG)], "failed", 1),
        ([failed(NAMES[0], WRONG)], "complete", 1),
        ([failed(NAMES[0], WRONG), raw(NAMES[1], "runner_on_unreachable", msg="x")], "failed", 3),
        ([], "failed", 3),
        ([raw()], "cancelled", 130),
    ],
)
def test_the_exit_code_says_what_happened(raws, state, code):
    assert provision_board.exit_code(board(*raws), state) == code


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", ["roce_qos", "verify", "roce_qos,conda_env"])
def test_roles_and_phases_are_tags(tags):
    roles.check_tags(tags)


@pytest.mark.parametrize(
    ("tags", "said"), [("roce_qso", "did you mean 'roce_qos'"), ("roce_qos,verfy", "did you mean 'verify'"), ("", "''")]
)
def test_another_tag_is_refused(tags, said):
    with pytest.raises(UsageError, match=said):
        roles.check_tags(tags)


def test_a_phase_that_is_not_played_is_no_tag():
    with pytest.raises(UsageError, match="unknown tag 'install'"):
        roles.check_tags("install", ("verify",))


def test_variables_are_the_roles_and_typed_as_yaml():
    name = "cuda_check_driver_min"
    assert roles.variables_of([f"{name}='560'"]) == {name: "560"}
    for setting, said in ((f"{name}x=1", "did you mean"), (name, "NAME=VALUE"), (f"{name}=[", "not a YAML value")):
        with pytest.raises(UsageError, match=said):
            roles.variables_of([setting])
