"""Slurm's pure half: what is submitted, and what its answers mean."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from ClusterShell.NodeSet import NodeSet
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from golden_files import check as golden
from runner.cluster import slurm as slurm_settings
from runner.cluster.slurm import Settings
from runner.errors import InfrastructureError, UsageError
from runner.launch.slurm import answers, waiting
from runner.launch.slurm.script import STARTUP_S, BatchJob, Step, cells_of, limit_s, render
from runner.node import slurm_step
from runner.system import nodeset

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured" / "slurm"
real_output = pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")
quick = hypothesis_settings(max_examples=50)


def captured(name):
    return (CAPTURED / name).read_text()


# --- settings --------------------------------------------------------------------------------------


def test_settings_are_taken_as_yaml_gives_them():
    given = {
        "partition": "gpu,gpu-long",
        "account": 1234,
        "qos": None,
        "time_limit_s": "1-12:00:00",
        "gres": "gpu:h200:8",
        "mem": 0,
        "constraint": "[rack1|rack2]&ib",
        "reservation": "maint",
        "exclude": ["node[001-002]", "spare"],
        "extra": "--switches=1",
        "shared": False,
        "wait_s": 3600,
    }
    assert slurm_settings.settings(given, "--set slurm") == Settings(
        partition="gpu,gpu-long",
        account="1234",
        time_limit_s=129600,
        gres="gpu:h200:8",
        mem="0",
        constraint="[rack1|rack2]&ib",
        reservation="maint",
        exclude=("node001", "node002", "spare"),
        extra=("--switches=1",),
        shared=False,
        wait_s=3600,
    )
    assert slurm_settings.settings({}, "here") == Settings()
    assert slurm_settings.settings(H200.model_dump(), "a saved plan") == H200


@pytest.mark.parametrize(
    ("given", "submitted"),
    [
        ("gpu:8", "gpu:8"),
        ("gpu:4090:8", "gpu:4090:8"),
        ("gpu:1g.10gb:7", "gpu:1g.10gb:7"),
        ("gpu:1g.10gb+me:7", "gpu:1g.10gb+me:7"),
        ("gpu:a100_1g.5gb:7", "gpu:a100_1g.5gb:7"),
        ("gpu:nvidia_h100_80gb_hbm3:8", "gpu:nvidia_h100_80gb_hbm3:8"),
        ("gpu:tesla_v100-sxm2-32gb:8", "gpu:tesla_v100-sxm2-32gb:8"),
        ("gpu:a100:4,nic-ib:2", "gpu:a100:4,nic-ib:2"),
        ("mps:400", "mps:400"),
        ("gres/gpu:h100:8", "gpu:h100:8"),
        ("gres/gpu:6000_ada=8", "gpu:6000_ada:8"),
        ("gres:gpu:2080ti:8", "gpu:2080ti:8"),
        ("none", "none"),
    ],
)
def test_resources_are_taken_as_slurm_names_them(given, submitted):
    assert slurm_settings.settings({"gres": given}, "inv").gres == submitted
    assert f"--gres={submitted}" in options(render(cell(), Settings(gres=given)))


def test_a_reservation_among_the_further_options_is_the_setting():
    given = {"extra": ["--reservation=maint", "--switches=1"]}
    assert slurm_settings.settings(given, "inv") == Settings(reservation="maint", extra=("--switches=1",))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"partion": "gpu"}, "inv: unknown key 'partion'; did you mean 'partition'?"),
        ({"partition": "gpu long"}, "expected one word"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "expected one word"),
        ({"account": "a --nodes=1"}, "expected one word"),
        ({"account": 'a"b'}, "expected one word"),
        ({"account": "a#b"}, "expected one word"),
        ({"account": "$USER"}, "expected one word"),
        ({"account": ""}, "expected one word"),
        ({"account": True}, "expected one word"),
        ({"partition": None, "qos": ["high"]}, "expected one word"),
        ({"account": "<account>"}, "'<account>' is a placeholder"),
        ({"account": "YOUR_ACCOUNT"}, "'YOUR_ACCOUNT' is a placeholder"),
        ({"extra": ["--reservation=CHANGEME"]}, "'CHANGEME' is a placeholder"),
        ({"gres": "8"}, "write it as gpu:8 or gpu:h200:8"),
        ({"gres": "gpu:h200:many:8"}, "write it as gpu:8 or gpu:h200:8"),
        ({"gres": "gpu:8(S:0-1)"}, "write it as gpu:8 or gpu:h200:8"),
        ({"gres": "gpu:4090"}, "asks each node for 4090 GPUs; with their number, as gpu:4090:8"),
        ({"mem": 512}, "write it with its unit, as 1900G, or 0 for all memory of a node"),
        ({"mem": "all"}, "write it with its unit"),
        ({"mem": "1.5T"}, "write it with its unit"),
        ({"extra": ["--mem=0"]}, "--mem is set by Shakedown; use slurm.mem"),
        ({"time_limit_s": 0}, "expected seconds above 0"),
        ({"time_limit_s": "UNLIMITED"}, "expected seconds above 0"),
        ({"wait_s": True}, "expected seconds above 0"),
        ({"stuck_s": None}, "expected seconds above 0"),
        ({"shared": "yes"}, "expected true or false"),
        ({"exclude": "node[001"}, "not a list of nodes"),
        ({"extra": ["switches=1"]}, "write each option as --name=value"),
        ({"extra": ["-N", "2"]}, "write each option as --name=value"),
        ({"extra": ["--comment=a --nodes=1"]}, "write each option as --name=value"),
        ({"extra": ["--comment=a\n#SBATCH --nodes=1"]}, "write each option as --name=value"),
        ({"extra": 7}, "expected a list of texts"),
        *(({"extra": [f"--{name}=x"]}, f"--{name} is set by Shakedown") for name in (
            "output", "job-name", "nodes", "array", "export", "mem-per-cpu", "partition", "wrap", "outp", "nod",
        )),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_submitted_is_one_line(values, said):
    with pytest.raises(UsageError) as error:
        slurm_settings.settings(values, "inv")
    assert said in str(error.value) and str(error.value).startswith("inv: ") and "\n" not in str(error.value)


@quick
@given(st.text(max_size=40))
def test_no_setting_ends_its_line_or_hides_an_option(text):
    for key in ("partition", "account", "qos", "gres", "constraint", "extra"):
        try:
            settings = slurm_settings.settings({key: text}, "inv")
        except UsageError:
            continue
        (line,) = [
            line for line in options(render(cell(), settings)) if line not in options(render(cell(), Settings()))
        ]
        assert line.startswith("--") and len(line.split()) == 1 and not set(line) & set("\"'\\$#`")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("01:00:00", 3600), ("2-0", 172800), ("1-2:30", 95400), ("3-00:00:01", 259201)]
    + [(word, None) for word in ("UNLIMITED", "INFINITE", "NONE", "", "1:2:3:4", "-5")],
)
def test_slurms_times_are_seconds(text, seconds):
    assert slurm_settings.seconds_of(text) == seconds


# --- one job ---------------------------------------------------------------------------------------

REQUEST = {
    "kind": "cell",
    "cell": "torch-2n-r0",
    "env": {"NCCL_DEBUG": "WARN"},
    "hosts": [],
    "note": "it's `x` $(y) $Z é",
}


def cell(*steps, **changes):
    steps = steps or (Step("torch-2n-r0", 2, REQUEST, timeout_s=1800),)
    named = "sweep" if len(steps) > 1 else steps[0].cell
    return BatchJob(**{
        "name": f"shakedown-20260101-120000-ab12-{named}",
        "steps": steps,
        "python": "/opt/shakedown/bin/python",
        "log": f"/home/user/results/20260101-120000-ab12/slurm/{named}.log",
        "gpus_per_node": 2,
        "device": "cpu",
        **changes,
    })  # fmt: skip


H200 = Settings(
    partition="gpu",
    account="benchmarks",
    qos="high",
    gres="gpu:h200:8",
    constraint="roce&hgx",
    exclude=("hgx-0003", "hgx-0008"),
    reservation="acceptance",
    extra=("--comment=shakedown",),
)
SWEEP = tuple(Step(f"sft-llama-2-7b-{n}n-r0", n, {**REQUEST, "num_nodes": n}, timeout_s=3600) for n in (1, 2, 4, 8))

REPEATS = tuple(Step(f"torch-2n-r{n}", 2, {**REQUEST, "repeat": n}, timeout_s=1800 * n) for n in (1, 2))


STAGES = (Step("sft", 2, REQUEST, timeout_s=1800), Step("merge-sft", 1, REQUEST, timeout_s=600))


def options(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def without_requests(script):
    return re.sub(r"(<<'(\w+)'\n).*?\n(?=\2\n)", r"\1", script, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("name", "job", "settings"),
    [
        ("one-cell-cpu", cell(), Settings()),
        (
            "eight-h200-nodes",
            cell(SWEEP[-1], gpus_per_node=8, device="cuda", secrets=("HF_TOKEN", "WANDB_API_KEY")),
            H200,
        ),
        ("named-hosts", cell(Step("torch-3n-r0", 3, REQUEST, ("node003", "node001", "node002"))), Settings()),
        ("one-allocation", cell(*SWEEP, gpus_per_node=8, device="cuda"), Settings(partition="gpu")),
        ("job-array", cell(*REPEATS, array=True), Settings(partition="gpu")),
        ("after-another", cell(after="4711"), Settings()),
        ("chain-in-one-allocation", cell(*STAGES, chain=True), Settings()),
    ],
)
def test_the_whole_file(name, job, settings):
    golden(f"slurm/{name}.sh", render(job, settings))


def test_a_dependency_of_the_users_is_that_of_a_chains_first_job_and_does_not_replace_a_later_ones():
    extra = Settings(extra=("--dependency=afterany:12", "--comment=x"))
    first, later = (options(render(cell(after=after), extra)) for after in (None, "4711"))
    assert [line for line in first if "depend" in line] == ["--dependency=afterany:12"]
    assert [line for line in later if "depend" in line] == ["--dependency=afterok:4711"]
    assert "--comment=x" in first and "--comment=x" in later


@pytest.mark.parametrize("job", [cell(), cell(*SWEEP)])
def test_the_batch_shell_expands_nothing_but_exit_statuses(job):
    body = without_requests(render(job, Settings()))
    kept = [line for line in body.splitlines() if "$" in line or ("`" in line and not line.startswith("#"))]
    assert set(kept) == {'result=$?; [ "$status" -ne 0 ] || status=$result', 'exit "$status"'}
    assert not re.search(r"\bset -|\beval\b", body)


def test_of_an_array_the_batch_shell_expands_the_number_of_its_task_as_well():
    body = without_requests(render(cell(*REPEATS, array=True), Settings()))
    kept = {line for line in body.splitlines() if "$" in line}
    assert kept - {'result=$?; [ "$status" -ne 0 ] || status=$result', 'exit "$status"'} == {
        'case "$SLURM_ARRAY_TASK_ID" in'
    }


@pytest.mark.parametrize(("chain", "ran"), [(True, ["sft"]), (False, ["sft", "merge-sft"])])
@pytest.mark.parametrize("status", [0, 3])
def test_of_a_chain_nothing_runs_after_a_cell_that_failed(chain, ran, status, tmp_path):
    """By a real shell, with a stand-in for srun that fails in the first cell."""
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$1"\n[ "$1" != --job-name=sft ] || exit {status}\n')
    (tmp_path / "srun").chmod(0o755)
    script = render(cell(*STAGES, chain=chain), Settings())
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True)
    assert re.findall(r"^--job-name=(.*)$", done.stdout, re.MULTILINE) == (ran if status else ["sft", "merge-sft"])
    assert done.returncode == status


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_of_an_array_runs_its_own_cell(task, tmp_path):
    """By a real shell, with a stand-in for srun that shows what it is given."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$1"; cat\n')
    (tmp_path / "srun").chmod(0o755)
    script = render(cell(*REPEATS, array=True), Settings())
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(task)}
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True, check=True)
    first, _, request = done.stdout.partition("\n")
    assert first == f"--job-name={REPEATS[task].cell}" and json.loads(request) == REPEATS[task].request


def test_tasks_of_an_array_run_one_at_a_time_each_as_long_as_the_longest_may():
    script = render(cell(*REPEATS, array=True), Settings())
    assert {"--array=0-1%1", "--time=0-01:02:00"} <= set(options(script))
    assert any(line.startswith("--output=") and line.endswith(".log.%a") for line in options(script))
    assert cells_of(script) == ["torch-2n-r1", "torch-2n-r2"]


def test_a_task_of_an_array_is_known_by_the_id_that_it_has_before_it_starts():
    inside = {"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm_step.own_id(inside) == "12_2" and slurm_step.own_id({"SLURM_JOB_ID": "14"}) == "14"
    line = answers.SEPARATOR.join(("12_2", "PENDING", "N/A", "", "x", "JobArrayTaskLimit"))
    rest = answers.SEPARATOR.join(("12_[3-4%1]", "PENDING", "N/A", "", "x", "JobArrayTaskLimit"))
    assert answers.parse_squeue(f"{line}\n{rest}\n").keys() == {"12_2"}


def test_every_cell_gets_its_request_as_it_is():
    script = render(cell(*SWEEP), Settings())
    requests = re.findall(r"<<'(\w+)'\n(.*?)\n\1\n", script, flags=re.DOTALL)
    assert [json.loads(request) for _, request in requests] == [step.request for step in SWEEP]


@quick
@given(st.dictionaries(st.text(), st.text() | st.sampled_from(["REQUEST", "a\nREQUEST\nb", "REQUEST1"]), max_size=4))
def test_no_request_ends_its_own_document(request):
    try:
        script = render(cell(Step("c", 1, request)), Settings())
    except UsageError:
        assert slurm_settings.placeholder(json.dumps(request)) is not None
        return
    ((delimiter, text),) = re.findall(r"<<'(\w+)'\n(.*?)\n\1\n", script, flags=re.DOTALL)
    assert json.loads(text) == request and delimiter not in text


def test_the_time_limit_is_what_the_cells_may_take_in_whole_minutes():
    assert limit_s(cell(Step("c", 1, {}, timeout_s=61)), Settings()) == 240
    assert limit_s(cell(*SWEEP), Settings()) == 4 * (3600 + STARTUP_S)
    assert "--time=0-04:08:00" in options(render(cell(*SWEEP), Settings()))
    assert "--time=1-00:01:00" in options(render(cell(), Settings(time_limit_s=86401)))


def test_only_several_cells_in_one_allocation_have_limits_of_their_own():
    assert "--time" not in without_requests(render(cell(), Settings())).partition("status=0")[2]
    script = render(cell(*SWEEP), Settings())
    assert script.count("\nsrun ") == script.count(" --time=0-01:02:00 ") == 4


@pytest.mark.parametrize(
    ("device", "settings", "gres"),
    [
        ("cpu", Settings(), None),
        ("cuda", Settings(), "--gres=gpu:2"),
        ("cuda", Settings(gres="gpu:h200:2"), "--gres=gpu:h200:2"),
        ("cpu", Settings(gres="nic:1"), "--gres=nic:1"),
    ],
)
def test_gpus_are_asked_for_where_they_are_needed(device, settings, gres):
    lines = options(render(cell(device=device), settings))
    assert [line for line in lines if line.startswith("--gres")] == ([gres] if gres else [])


def test_secrets_are_handed_on_by_name_and_nothing_else_is():
    assert "--export=NIL" in options(render(cell(), Settings()))
    assert "--export=HF_TOKEN,WANDB_API_KEY" in options(render(cell(secrets=("HF_TOKEN", "WANDB_API_KEY")), Settings()))


def test_blanks_survive_in_paths_and_percent_signs_are_no_patterns_of_sbatchs():
    script = render(cell(python="/opt/my env/bin/python", log="/scratch/my run/%j.log"), Settings())
    assert '--output="/scratch/my run/%%j.log"' in options(script)
    assert "'/opt/my env/bin/python' -P -u -m runner.node" in script


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a\n#SBATCH --uid=0"},
        {"log": '/tmp/"; --uid=0'},
        {"log": "/tmp/#1.log"},
        {"python": "/opt/$HOME/python"},
        {"python": "python\nrm"},
        {"secrets": ("A\nB",)},
        {"steps": (Step("a\nb", 1, {}),), "name": "n"},
        {"steps": (Step("a", 1, {}, ("node1`",)),)},
    ],
)
def test_what_would_break_the_file_is_refused(changes):
    with pytest.raises(UsageError) as error:
        render(cell(**changes), Settings())
    assert "cannot hold" in str(error.value) and "\n" not in str(error.value)


PLACEHOLDERS = (
    "<account> <...> CHANGEME change_me REPLACE_ME YOUR_ACCOUNT your-partition TODO xxx XXXX {{account}} ${USER}"
)


@quick
@given(
    st.text(st.sampled_from("abcXYZ019 -_./:=,"), max_size=12),
    st.sampled_from(" -_./:=,"),
    st.sampled_from(PLACEHOLDERS.split()),
    st.text(st.sampled_from(" -./:=,_"), max_size=12),
)
def test_nothing_with_a_placeholder_in_it_is_submitted(before, mark, word, after):
    before += mark
    assert slurm_settings.placeholder(before + word + after)
    for job in (
        cell(log=f"/tmp/{before}{word}{after}.log"),
        cell(Step("c", 1, {"env": {"A": before + word + after}})),
    ):
        with pytest.raises(UsageError):
            render(job, Settings())
    with pytest.raises(UsageError):
        slurm_settings.settings({"account": word}, "inv")


@pytest.mark.parametrize("word", ["gpu", "a<b", "todo", "methodology", "xx", "maxxxl", "{}", "your", "$1", "<|user|>"])
def test_ordinary_words_are_no_placeholders(word):
    assert slurm_settings.placeholder(f"a {word} b") is None


def test_the_words_of_a_step_are_one_argument_each():
    script = without_requests(render(cell(Step("a b; c & *", 1, {}, ("n[1];x",))), Settings()))
    (line,) = [line for line in script.replace("\\\n", "").splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    assert words[:2] == ["srun", "--job-name=a b; c & *"] and "--nodelist=n[1];x" in words and words[-6:-1] == [
        "/opt/shakedown/bin/python", "-P", "-u", "-m", "runner.node",
    ]  # fmt: skip


# --- inside a step ---------------------------------------------------------------------------------


@given(
    st.sets(st.tuples(st.sampled_from(["node", "gpu-a", "h1x"]), st.integers(0, 300), st.integers(1, 4)), min_size=1)
)
def test_what_was_folded_expands_to_the_same_names(parts):
    names = {f"{prefix}{number:0{width}}" for prefix, number, width in parts}
    assert set(nodeset.expand(str(NodeSet.fromlist(names, resolver=None)))) == names


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node3", "node3"),
        ("node003,node[001-002]", "node003 node001 node002"),
        ("node[3,1-2]", "node3 node1 node2"),
        ("node[08-11]", "node08 node09 node10 node11"),
        ("rack[1-2]n[1,3]", "rack1n1 rack1n3 rack2n1 rack2n3"),
        ("a[1-2].x.y,b-1", "a1.x.y a2.x.y b-1"),
        ("n[1-2],n[2-3]", "n1 n2 n3"),
    ],
)
def test_node_lists_keep_slurms_order(nodelist, names):
    assert nodeset.expand(nodelist) == tuple(names.split())


@pytest.mark.parametrize(
    "nodelist", ["", "(null)", "node[001", "node[a-b]", "node[]", "a,,b", "a b", "node[1-]", "a;b"]
)
def test_what_is_no_node_list_is_said(nodelist):
    with pytest.raises(ValueError, match="not a list of nodes"):
        nodeset.expand(nodelist)


def test_a_task_finds_its_place_in_what_slurm_tells_it():
    told = {"SLURM_STEP_NODELIST": "node[002-003]", "SLURM_JOB_NODELIST": "node[001-003]"}
    hosts = ("node002", "node003")
    assert slurm_step.placement({**told, "SLURMD_NODENAME": "node003", "SLURM_NODEID": "1"}) == (hosts, 1)
    assert slurm_step.placement({**told, "SLURM_NODEID": "1"}) == (hosts, 1)
    assert slurm_step.placement({"SLURM_JOB_NODELIST": "node1", "SLURMD_NODENAME": "node1"}) == (("node1",), 0)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_STEP_NODELIST": "node[1-2]"}, "neither SLURMD_NODENAME nor SLURM_NODEID"),
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NODEID": "2"}, "neither SLURMD_NODENAME nor SLURM_NODEID"),
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node3", "SLURM_NODEID": "0"}, "node3 is not in"),
        ({"SLURM_STEP_NODELIST": "node[1-"}, "not a list of nodes"),
    ],
)
def test_a_task_that_slurm_told_too_little_says_what_is_missing(environ, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        slurm_step.placement(environ)


# --- what became of jobs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("PENDING", "waiting"), ("PD", "waiting"), ("CF", "waiting"), ("RH", "waiting"), ("SPECIAL_EXIT", "waiting"),
        ("RUNNING", "running"), ("r", "running"), ("SUSPENDED", "running"), ("ST", "running"), ("SI", "running"),
        ("COMPLETING", "ending"), ("SO", "ending"), ("COMPLETED", "complete"), ("FAILED", "failed"),
        ("CANCELLED by 1000", "cancelled"), ("CANCELLED+", "cancelled"), ("cancelled", "cancelled"), ("RV", "cancelled"),
        ("TIMEOUT", "time_limit"), ("DEADLINE", "time_limit"), ("NODE_FAIL", "node_failed"), ("BF", "node_failed"),
        ("OUT_OF_MEMORY", "out_of_memory"), ("OOM", "out_of_memory"), ("PREEMPTED", "preempted"),
        ("", "unknown"), ("EXPEDITING", "unknown"), ("42", "unknown"), ("?", "unknown"),
    ],
)  # fmt: skip
def test_every_state_is_one_of_our_words(word, ours):
    assert answers.state(word) == ours


@quick
@given(st.text())
def test_no_state_is_a_surprise(word):
    assert answers.state(word) in {*answers.STATES.values(), "unknown"}


SQUEUE = """\
4|#RUNNING|#2026-11-21T10:48:19|#node[001-002]|#limit|#None
7|#PENDING|#2026-11-22T01:00:00|#|#shakedown-r-c|#(ReqNodeNotAvail, UnavailableNodes:cs[100,101])
8|#PENDING|#N/A|#|#b|#odd | reason |# typed by hand
1|#FAILED|#2026-11-21T10:46:37|#node[001-003]|#env|#NonZeroExitCode
slurm_load_jobs error: Unable to contact slurm controller
9|#PENDING|#N/A
"""


def test_squeue_tells_state_nodes_reason_and_start():
    jobs = answers.parse_squeue(SQUEUE)
    assert list(jobs) == ["4", "7", "8", "1"]
    assert (jobs["4"].state, jobs["4"].nodes, jobs["4"].reason) == ("running", ("node001", "node002"), "")
    assert (jobs["7"].state, jobs["7"].nodes, jobs["7"].start) == ("waiting", (), "2026-11-22T01:00:00")
    assert jobs["7"].reason == "(ReqNodeNotAvail, UnavailableNodes:cs[100,101])" and jobs["7"].name == "shakedown-r-c"
    assert (jobs["8"].reason, jobs["8"].start) == ("odd | reason |# typed by hand", None)
    assert (jobs["1"].state, jobs["1"].raw, jobs["1"].exit_code) == ("failed", "FAILED", None)


@real_output
def test_reasons_as_squeue_really_gives_them_survive_our_format():
    # The captured query had a format of its own: each of its jobs is written in ours.
    seen = [
        json.loads(line)
        for line in captured("squeue-o-jsonish-with-reasons.txt").splitlines()
        if 'cpu": xx' not in line and line[0] == "{"
    ]
    ours = "".join(
        answers.SEPARATOR.join(
            (str(job["id"]), job["state"], job["end_time"], job["r"] if "(" not in job["r"] else "", "n", job["r"])
        )
        + "\n"
        for job in seen
    )
    jobs = answers.parse_squeue(ours)
    assert jobs["26515966"].nodes == ("cs10",) and jobs["18804"].start is None
    stuck = {job_id: waiting.judge(job.reason)[1] for job_id, job in jobs.items() if job.state == "waiting"}
    assert {job_id for job_id, why in stuck.items() if why} == {"51447052", "51447053"}
    assert "cs[100,101,102]" in str(stuck["51447052"]) and set(stuck) == {"51447051", "51447052", "51447053", "18804"}


@real_output
def test_a_table_for_people_is_not_taken_for_an_answer():
    assert answers.parse_squeue(captured("squeue-array-truncated-jobid.txt")) == {}


@real_output
def test_sacct_cancelled_by_a_user_without_its_steps():
    jobs = answers.parse_sacct(captured("sacct-P-cancelled-by-uid.txt"), "|")
    assert list(jobs) == ["39125549", "39125551", "39125552"]
    assert {job.state for job in jobs.values()} == {"cancelled"}
    assert jobs["39125549"].raw == "CANCELLED by 1185300516"


@real_output
def test_sacct_leaves_out_the_tail_of_a_broken_record():
    assert answers.parse_sacct(captured("sacct-P-all-with-broken-line.txt"), "|") == {}


@real_output
@pytest.mark.parametrize("name", ["sacct-P-bar-hash-multiline-comment.txt", "sacct-P-running-duplicates.txt"])
def test_sacct_steps_and_records_over_several_lines_are_no_jobs(name):
    text = captured(name)
    ids = {line.split("|#")[32] for line in text.splitlines()[1:] if line.count("|#") > 90}
    assert answers.parse_sacct(text).keys() == {job_id for job_id in ids if job_id.isdigit()} and ids
    assert all(answers.state(word) != "unknown" for word in re.findall(r"\|#([A-Z]{6,}(?: by \d+)?)\|#20", text))


def test_sacct_tells_the_last_of_a_requeued_jobs_lines():
    lines = [
        "JobID|#JobName|#State|#Reason|#NodeList|#Start|#ExitCode",
        "12|#a|#NODE_FAIL|#None|#n1|#2026-01-01T00:00:00|#0:0",
        "12|#a|#FAILED|#NonZeroExitCode|#n[1-2]|#2026-01-01T00:10:00|#3:0",
        "12.batch|#batch|#FAILED|##|#n1|#2026-01-01T00:10:00|#3:0",
        "13|#b|#CANCELLED by 0|#None|#None assigned|#Unknown|#0:15",
        "14|#b|#TIMEOUT|#Ti",
    ]
    jobs = answers.parse_sacct("\n".join(lines))
    assert list(jobs) == ["12", "13"]
    assert (jobs["12"].state, jobs["12"].exit_code, jobs["12"].nodes) == ("failed", 3, ("n1", "n2"))
    assert (jobs["13"].state, jobs["13"].signal, jobs["13"].nodes, jobs["13"].start) == ("cancelled", 15, (), None)
    assert answers.parse_sacct("") == {}


TIMEOUT = (  # Slurm 22.05
    "JobId=4 JobName=limit UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901756 Nice=0 Account=(null) "
    "QOS=(null) JobState=TIMEOUT Reason=TimeLimit Dependency=(null) Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 "
    "ExitCode=0:15 RunTime=00:01:26 TimeLimit=00:01:00 TimeMin=N/A SubmitTime=2026-11-21T10:48:19 "
    "StartTime=2026-11-21T10:48:19 EndTime=2026-11-21T10:49:45 Deadline=N/A Partition=gpu "
    "ReqNodeList=node009 ExcNodeList=(null) NodeList=node[001-002] BatchHost=node001 StdOut=/tmp/out of 4.log Power= "
)


def test_scontrol_tells_how_a_job_ended():
    job = answers.parse_scontrol_job(TIMEOUT)
    assert job == answers.JobInfo(
        "4", "limit", "time_limit", "TIMEOUT", "TimeLimit", ("node001", "node002"), "2026-11-21T10:48:19", 0, 15
    )
    said_by_the_user = TIMEOUT + "Comment=why? JobState=COMPLETED NodeList=node009"
    assert answers.parse_scontrol_job(said_by_the_user) == job
    assert answers.parse_scontrol_job("slurm_load_jobs error: Invalid job id specified\n") is None


@real_output
@pytest.mark.parametrize(
    ("name", "job_id", "first", "num_nodes"),
    [("multinode", "8401413", "node1433", 8), ("gres-idx", "30214", "node1751", 1)],
)
def test_scontrol_on_many_lines(name, job_id, first, num_nodes):
    job = answers.parse_scontrol_job(captured(f"scontrol-show-job-{name}.txt"))
    assert (job.job_id, job.state, job.reason, job.exit_code) == (job_id, "running", "", None)
    assert (job.nodes[0], len(job.nodes)) == (first, num_nodes) and job.start.startswith("2024-")


def test_a_batched_query_asks_for_all_jobs_at_once():
    assert answers.squeue_argv(["1", "2"])[-1] == answers.sacct_argv(["1", "2"])[-1] == "--jobs=1,2"
    assert answers.scontrol_argv("7")[-2:] == ["job", "7"]
    assert answers.queue_argv("gpu")[-1] == "--partition=gpu"


def test_the_place_in_the_queue_counts_from_one():
    assert [answers.position("31\n12\n7\n", job_id) for job_id in ("31", "7", "1")] == [1, 3, None]


@pytest.mark.parametrize(("stdout", "job_id"), [("12\n", "12"), ("12;cluster\n", "12"), ("note\n345\n", "345")])
def test_the_submitted_id(stdout, job_id):
    assert answers.submitted_id(stdout) == job_id


@pytest.mark.parametrize("stdout", ["", "Submitted batch job 12\n", "error\n", "12\nlater words"])
def test_no_id_is_said(stdout):
    with pytest.raises(InfrastructureError, match="no job id"):
        answers.submitted_id(stdout)


def test_slurms_commands_get_no_variable_that_changes_them():
    environ = {"PATH": "/bin", "SLURM_CONF": "/etc/s", "SBATCH_PARTITION": "x", "SQUEUE_FORMAT": "y", "SLURM_JOB_ID": "1",
               "SLURM_TIME_FORMAT": "relative", "HF_TOKEN": "t"}  # fmt: skip
    assert answers.client_environment(environ) == {"PATH": "/bin", "SLURM_CONF": "/etc/s", "HF_TOKEN": "t"}


@real_output
@pytest.mark.parametrize("name", ["squeue-json.txt", "slurmrestd-job-2nodes.txt"])
def test_jobs_of_other_versions_have_known_states_and_nodes(name):
    text = json.loads(captured(name))
    for job in text.get("jobs", [text]):
        words = job["job_state"] if isinstance(job["job_state"], list) else [job["job_state"]]
        assert "unknown" not in map(answers.state, words)
        assert not job["nodes"] or set(nodeset.expand(job["nodes"])) == set(NodeSet(job["nodes"], resolver=None))
