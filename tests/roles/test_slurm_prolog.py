"""slurm_prolog: the driver's verdicts, each part's judgement, and what a site's slurm.conf lacks."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from role_modules import ROOT, carry_out, load

CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "captured"
real_output = pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")
FILES = ROOT / "roles" / "slurm_prolog" / "files"
prolog = load("slurm_prolog")


sys.path.insert(0, str(FILES))  # as the folder in which the role installs them all


def program(name):
    spec = importlib.util.spec_from_file_location(name, FILES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_health, leftover, affinity = program("gpu_health"), program("leftover_processes"), program("affinity")


# --- the driver ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """The drivers and no part, with a stand-in for scontrol that notes how it was called."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\n# STAND-IN for scontrol\necho "$*" >>{tmp_path}/called\ncat {tmp_path}/shown 2>/dev/null\n'
    )
    scontrol.chmod(0o755)
    for kind in ("prolog", "epilog"):
        (tmp_path / f"{kind}.d").mkdir()
        (tmp_path / kind).write_text((FILES / "driver.py").read_text())
        (tmp_path / kind).chmod(0o755)
    settings = {"parts": {}, "scontrol": str(scontrol), "site_part_limit_s": 0.4, "total_s": 5}
    (tmp_path / "prolog.json").write_text(json.dumps(settings))
    return tmp_path


def add(home, name, script, kind="prolog"):
    part = home / f"{kind}.d" / name
    part.write_text(f"#!/bin/sh\n{script}\n")
    part.chmod(0o755)


def start(home, kind="prolog", *words):
    env = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node001"}
    return subprocess.run([home / kind, *words], capture_output=True, text=True, timeout=30, env=env)


def outcomes(home, kind="prolog"):
    found = json.loads(start(home, kind, "--test").stdout)["parts"]
    return {one["name"]: (one["verdict"], one["reason"]) for one in found}


def called(home):
    return (home / "called").read_text().splitlines() if (home / "called").exists() else []


def test_parts_run_in_the_order_of_their_numbers(home):
    for name in ("100-last", "20-second", "3-first"):
        add(home, name, "exit 0")
    add(home, "README", "exit 1")
    assert list(outcomes(home)) == ["3-first", "20-second", "100-last"]


def test_a_part_that_fails_drains_the_node_with_its_last_line(home):
    add(home, "10-gpu", "echo looking; echo GPU 3 is lost; exit 1")
    assert start(home).returncode == 1
    assert called(home)[-1] == "update nodename=node001 state=drain reason=prolog 10-gpu: GPU 3 is lost"


def test_a_node_that_is_drained_already_keeps_its_reason(home):
    add(home, "10-gpu", "echo bad; exit 1")
    (home / "shown").write_text("NodeName=node001 State=IDLE+DRAIN ThreadsPerCore=1")
    assert start(home).returncode == 1
    assert called(home) == ["--oneliner show node node001"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 60", "no answer within 0.4 s"),
        ("echo no driver; exit 2", "ended with 2: no driver"),
        ("kill -9 $$", "ended with -9"),
        ("exit 127", "ended with 127"),
    ],
)
def test_a_part_that_cannot_tell_is_unknown_and_drains_nothing(home, script, reason):
    add(home, "10-part", script)
    assert outcomes(home) == {"10-part": ("unknown", reason)}
    assert start(home).returncode == 0
    assert called(home) == []


def test_a_hung_part_takes_its_children_with_it(home):
    add(home, "10-part", f"sleep 987654 & echo $! >{home}/child; wait")
    start(home)
    child = Path("/proc") / (home / "child").read_text().strip() / "stat"
    time.sleep(0.1)
    assert not child.exists() or ") Z " in child.read_text()


def test_parts_after_the_end_of_the_time_are_unknown(home):
    settings = json.loads((home / "prolog.json").read_text())
    (home / "prolog.json").write_text(json.dumps({**settings, "total_s": 0.2}))
    add(home, "10-slow", "sleep 60")
    add(home, "20-never", "exit 1")
    assert outcomes(home)["20-never"] == ("unknown", "no time was left")


def test_a_test_changes_nothing_and_drains_nothing(home):
    add(home, "10-part", "echo $RUN_AS $RUN_TEST; exit 1")
    assert outcomes(home) == {"10-part": ("bad", "prolog 1")}
    assert called(home) == []


def test_the_epilog_has_parts_of_its_own(home):
    add(home, "10-part", "echo $RUN_AS; exit 1", kind="epilog")
    assert outcomes(home) == {}
    assert outcomes(home, "epilog") == {"10-part": ("bad", "epilog")}


def test_a_part_gets_its_settings_the_jobs_variables_and_a_path(home):
    settings = json.loads((home / "prolog.json").read_text())
    settings["parts"] = {"10-part": {"limit_s": 5, "env": {"GPUS": "8"}}}
    (home / "prolog.json").write_text(json.dumps(settings))
    add(home, "10-part", 'echo "$GPUS $SLURM_JOB_ID $PATH"')
    assert outcomes(home)["10-part"] == ("good", "8 7 /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")


@pytest.mark.parametrize("broken", ["", "{", '{"parts": {}}'])
def test_a_driver_without_its_settings_lets_jobs_run(home, broken):
    (home / "prolog.json").write_text(broken)
    assert start(home).returncode == 0
    assert start(home, "prolog", "--test").returncode == 2


def test_a_part_that_prints_no_text_is_read_all_the_same(home):
    add(home, "10-part", r"printf '\377\376 bad \n\n'; exit 1")
    assert outcomes(home)["10-part"][0] == "bad"


def test_a_driver_without_parts_costs_little(home):
    start(home)
    begin = time.monotonic()
    for _ in range(3):
        start(home)
    assert (time.monotonic() - begin) / 3 < 1


# --- GPU health ------------------------------------------------------------------------------------

GOOD = "".join(f"{n}, 0, No, No\n" for n in range(8))


def test_eight_good_gpus_are_good():
    assert gpu_health.judge(GOOD, 8) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (GOOD.replace("3, 0, No, No", "3, 2, No, No"), ["GPU 3: 2 uncorrectable ECC errors"]),
        (GOOD.replace("3, 0, No, No", "3, 0, Yes, No"), ["GPU 3: row remapping pending, reset the GPU"]),
        (GOOD.replace("3, 0, No, No", "3, 0, Yes, Yes"), ["GPU 3: row remapping failed"]),
        (GOOD.replace("7, 0, No, No\n", ""), ["7 of 8 GPUs answer"]),
        (GOOD[:-6], ["7 of 8 GPUs answer"]),
        ("", ["0 of 8 GPUs answer"]),
        ("Unable to determine the device handle for GPU0000:5D:00.0: Unknown Error\n", ["0 of 8 GPUs answer"]),
    ],
)
def test_what_is_wrong_with_a_gpu_is_named(text, wrong):
    assert gpu_health.judge(text, 8) == wrong


def test_what_a_gpu_does_not_tell_is_not_judged():
    assert gpu_health.judge("0, [N/A], [N/A], [N/A]\n1, N/A, N/A, N/A\n", 2) == []


@given(st.text())
def test_any_text_is_judged(text):
    assert all(isinstance(line, str) for line in gpu_health.judge(text, 0))


def test_an_old_xid_is_forgotten():
    records = [
        "4,812,1000000,-;NVRM: Xid (PCI:0000:5d:00): 79, pid=1, GPU has fallen off the bus.\n SUBSYSTEM=pci\n",
        "4,813,9000000000,-;NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>'\n",
        "half a record",
    ]
    messages = gpu_health.recent(records, now_s=9001, window_s=3600)
    assert [(xid.pci, xid.number) for xid in gpu_health.xids.serious("\n".join(messages))] == [("0000:3b:00.0", 48)]


def test_a_missing_parser_is_unknown_and_drains_nothing(tmp_path):
    part = tmp_path / "prolog.d" / "10-gpu-health"
    part.parent.mkdir()
    part.write_text((FILES / "gpu_health.py").read_text())
    ended = subprocess.run([sys.executable, "-IS", part], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (
        2,
        f"{tmp_path}/xids.py is missing: the role slurm_prolog installs it\n",
    )
    (tmp_path / "xids.py").write_text((FILES / "xids.py").read_text())
    smi = {"NVIDIA_SMI": "/bin/false", "GPUS": "1", "XID_WINDOW_S": "1"}
    ended = subprocess.run([sys.executable, "-IS", part], env=smi, capture_output=True, text=True, check=False)
    assert ended.stdout == "nvidia-smi ended with 1\n" and not (tmp_path / "__pycache__").exists()


# --- leftover processes ----------------------------------------------------------------------------

INIT, ALICE, BOB = (1, 0, "systemd", ""), 1001, 1002


def test_a_process_of_a_user_without_a_job_is_left_over():
    found = {1: INIT, 50: (1, ALICE, "python3", "")}
    assert leftover.leftovers(found, []) == {50: (ALICE, "python3")}


@pytest.mark.parametrize(
    "of_a_job",
    [
        {60: (1, 0, "slurmstepd", ""), 61: (60, ALICE, "bash", ""), 62: (61, ALICE, "python3", "")},
        {62: (1, ALICE, "python3", "job")},
    ],
)
def test_a_user_with_a_job_here_is_left_alone(of_a_job):
    assert leftover.leftovers({1: INIT, 50: (1, ALICE, "tmux", ""), **of_a_job}, []) == {}


def test_a_users_own_program_named_slurmstepd_makes_no_job():
    found = {1: INIT, 60: (1, ALICE, "slurmstepd", ""), 61: (60, ALICE, "miner", "")}
    assert set(leftover.leftovers(found, [])) == {60, 61}


def test_root_system_users_and_those_who_are_kept_are_never_looked_at():
    found = {
        1: INIT,
        40: (1, 999, "ntpd", ""),
        41: (1, 65534, "dnsmasq", ""),
        42: (1, 64030, "slurmctld", ""),
        50: (1, BOB, "agent", ""),
    }
    assert leftover.leftovers(found, [BOB]) == {}


@pytest.mark.parametrize(
    ("cgroup", "kind"),
    [
        ("0::/user.slice/user-1001.slice/session-4.scope", ""),
        ("0::/system.slice/slurmd.service", ""),
        ("0::/system.slice/ssh.service", ""),
        ("1:name=systemd:/libpod_parent/libpod-1/system.slice/slurmd.service", ""),
        ("0::/system.slice/slurmstepd.scope/job_12/step_0/user/task_0", "job"),
        ("11:freezer:/slurm/uid_1001/job_12/step_batch", "job"),
        ("0::/system.slice/slurmctld.service", "service"),
        ("0::/system.slice/dcgm-exporter.service", "service"),
        ("0::/system.slice/docker-0123abcd.scope", "service"),
        ("0::/kubepods.slice/kubepods-burstable.slice/x", "service"),
    ],
)
def test_services_and_containers_are_told_from_what_users_left(tmp_path, cgroup, kind):
    (tmp_path / "70").mkdir()
    (tmp_path / "70" / "stat").write_text("70 (x) S 1 70 70 0\n")
    (tmp_path / "70" / "cgroup").write_text(f"{cgroup}\n")
    assert leftover.processes(tmp_path)[70][3] == kind


def test_a_service_that_runs_as_a_person_is_no_leftover():
    assert leftover.leftovers({1: INIT, 50: (1, ALICE, "exporter", "service")}, []) == {}


def test_a_directorys_user_with_a_high_number_is_a_person():
    assert leftover.leftovers({1: INIT, 50: (1, 1185300516, "python3", "")}, []) == {50: (1185300516, "python3")}


def test_this_machines_processes_are_read():
    own = leftover.processes()[os.getpid()]
    assert own[0] == os.getppid() and own[1] == os.geteuid()


def test_a_name_with_parentheses_and_blanks_is_read(tmp_path):
    (tmp_path / "70").mkdir()
    (tmp_path / "70" / "stat").write_text("70 (a) b (c) S 1 70 70 0\n")
    (tmp_path / "70" / "cgroup").write_text("0::/system.slice/slurmstepd.scope/job_12/step_0/user/task_0\n")
    (tmp_path / "71").mkdir()  # ended while it was read
    assert leftover.processes(tmp_path) == {70: (1, os.geteuid(), "a) b (c", "job")}


def test_a_process_that_ignores_sigterm_is_killed():
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alive = leftover.end(
            {child.pid: (ALICE, "x")}, lambda: {child.pid: (ALICE, "x")} if child.poll() is None else {}
        )
        assert alive == {}
        assert child.wait() == -9


# --- huge pages ------------------------------------------------------------------------------------


def huge_pages(vm, wanted, test="0", compact="0"):
    env = {"VM": str(vm), "HUGE_PAGES": str(wanted), "COMPACT": compact, "RUN_TEST": test, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sh", FILES / "huge_pages.sh"], capture_output=True, text=True, env=env, timeout=30)
    return done.returncode, done.stdout.strip()


def test_huge_pages_are_reserved_and_memory_is_compacted(tmp_path):
    (tmp_path / "nr_hugepages").write_text("0\n")
    assert huge_pages(tmp_path, 512, compact="1") == (0, "512 of 512 huge pages are reserved")
    assert (tmp_path / "compact_memory").read_text() == "1\n"


def test_what_is_reserved_already_stays(tmp_path):
    (tmp_path / "nr_hugepages").write_text("1024\n")
    assert huge_pages(tmp_path, 512)[0] == 0
    assert (tmp_path / "nr_hugepages").read_text() == "1024\n"


def test_a_test_reserves_nothing(tmp_path):
    (tmp_path / "nr_hugepages").write_text("0\n")
    assert huge_pages(tmp_path, 512, test="1", compact="1") == (0, "0 of 512 huge pages are reserved")
    assert not (tmp_path / "compact_memory").exists()


def test_fewer_pages_than_wanted_are_bad_and_an_unwritable_setting_is_unknown(tmp_path):
    (tmp_path / "nr_hugepages").symlink_to("/dev/null")
    assert huge_pages(tmp_path, 512)[0] == 1
    (tmp_path / "compact_memory").mkdir()
    assert huge_pages(tmp_path, 512, compact="1")[0] == 2


# --- affinity --------------------------------------------------------------------------------------


@real_output
def test_affinity_of_a_real_node_with_nics():
    found = affinity.affinity((CAPTURED / "nvidia-smi" / "h200x8-topo-m-nics-mlx5.txt").read_text())
    assert [found[str(n)]["nic"] for n in range(8)] == [f"mlx5_{n}" for n in range(8)]
    assert {gpu["link"] for gpu in found.values()} == {"PIX"}
    assert found["0"]["cpus"] == "0-55,112-167" and found["7"]["cpus"] == "56-111,168-223"
    assert [found[str(n)]["numa"] for n in range(8)] == [0] * 4 + [1] * 4


@real_output
@pytest.mark.parametrize(
    ("file", "gpus", "first", "last"),
    [
        ("h100x8-topo-m-nv18-numa.txt", 8, "0-51,104-155", "52-103,156-207"),
        ("a100x8-topo-m-nv12-compact.txt", 8, "0-23", "24-47"),
        ("h200x1-590-topo-m.txt", 1, "0-23", "0-23"),
    ],
)
def test_affinity_of_real_nodes_without_nics(file, gpus, first, last):
    found = affinity.affinity((CAPTURED / "nvidia-smi" / file).read_text())
    assert len(found) == gpus
    assert (found["0"]["cpus"], found[str(gpus - 1)]["cpus"]) == (first, last)
    assert found["0"]["nic"] is None and found["0"]["link"] is None


@real_output
def test_a_table_that_is_cut_is_refused():
    text = (CAPTURED / "nvidia-smi" / "h200x8-topo-m-nics-mlx5.txt").read_text()
    with pytest.raises(ValueError, match="GPU5 is missing or cut"):
        affinity.affinity(text[: text.index("GPU5  ", text.index("GPU4   ", 200)) + 30])


@pytest.mark.parametrize("text", ["", "\n", "Failed to initialize NVML: Driver/library version mismatch\n"])
def test_what_is_no_table_is_refused(text):
    with pytest.raises(ValueError):
        affinity.affinity(text)


def test_what_nvidia_smi_does_not_know_is_null():
    text = "\tGPU0\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \tPHB\tN/A\tN/A\t\tN/A\n"
    assert affinity.affinity(text) == {"0": {"cpus": None, "numa": None, "nic": "NIC0", "link": "PHB"}}


@given(st.text())
def test_any_text_gives_an_affinity_or_a_refusal(text):
    with contextlib.suppress(ValueError):
        assert isinstance(affinity.affinity(text), dict)


# --- the role --------------------------------------------------------------------------------------


def settings(tmp_path, **changes):
    return {
        "dir": str(tmp_path / "slurm"),
        "own_cluster": True,
        "slurm_conf": str(tmp_path / "slurm" / "slurm.conf"),
        "manage_conf": False,
        "timeout_s": 60,
        "gpu_health": False,
        "gpu_health_limit_s": 10.0,
        "gpus": 8,
        "gpu_xid_window_s": 3600,
        "leftover_processes": False,
        "leftover_kill": False,
        "leftover_keep_users": [],
        "leftover_limit_s": 5.0,
        "huge_pages": 0,
        "compact_memory": False,
        "huge_pages_limit_s": 10.0,
        "affinity": False,
        "affinity_limit_s": 10.0,
        "site_part_limit_s": 5.0,
        "files": {path.name: path.read_text() for path in FILES.iterdir() if path.is_file()},
        **changes,
    }


def installed(tmp_path):
    home = tmp_path / "slurm"
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_only_parts_that_are_asked_for_are_installed_and_others_leave(tmp_path):
    want = settings(tmp_path, leftover_processes=True, compact_memory=True)
    assert carry_out(prolog.PHASES, "install", want).changed
    assert installed(tmp_path) == [
        "epilog",
        "epilog.d/20-leftover-processes",
        "prolog",
        "prolog.d/20-leftover-processes",
        "prolog.d/30-huge-pages",
        "prolog.json",
    ]
    assert not carry_out(prolog.PHASES, "install", want).changed
    (tmp_path / "slurm" / "prolog.d" / "50-site").write_text("a site's own part\n")
    assert carry_out(prolog.PHASES, "install", settings(tmp_path)).changed
    assert installed(tmp_path) == ["epilog", "prolog", "prolog.d/50-site", "prolog.json"]


def test_check_mode_installs_nothing(tmp_path):
    answer = carry_out(prolog.PHASES, "install", settings(tmp_path, affinity=True), check=True)
    assert answer.ok and answer.changed and len(answer.diff) == 4
    assert not (tmp_path / "slurm").exists()


def test_verify_tells_each_parts_verdict_and_names_an_edit(tmp_path):
    want = settings(tmp_path, leftover_processes=True)
    carry_out(prolog.PHASES, "install", want)
    answer = carry_out(prolog.PHASES, "verify", want)
    assert answer.ok, answer.msg
    assert [one["verdict"] for one in answer.facts["parts"]["epilog"]] == ["good"]
    part = tmp_path / "slurm" / "prolog.d" / "20-leftover-processes"
    part.write_text("#!/bin/sh\necho 3 zombies\nexit 1\n")
    answer = carry_out(prolog.PHASES, "verify", want)
    assert f"{part}: expected as installed, found edited since" in answer.msg
    assert "prolog part 20-leftover-processes: expected good, found 3 zombies" in answer.msg
    part.write_text("#!/bin/sh\nexit 3\n")
    answer = carry_out(prolog.PHASES, "verify", want)
    assert answer.warnings == ["prolog part 20-leftover-processes is unknown: ended with 3"]


def test_limits_that_slurmd_would_not_wait_for_are_refused(tmp_path):
    want = settings(tmp_path, timeout_s=20, huge_pages=4, leftover_processes=True)
    answer = carry_out(prolog.PHASES, "validate", want)
    assert "time limits of the prolog's parts: expected at most 8 s together" in answer.msg
    assert "found 15.0 s" in answer.msg


def test_a_sites_own_prolog_is_not_overwritten(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "prolog").write_text("#!/bin/sh\nexit 0\n")
    answer = carry_out(prolog.PHASES, "validate", settings(tmp_path))
    assert f"{tmp_path}/slurm/prolog: expected none, or this role's, found a file of another origin" in answer.msg


def test_without_a_cluster_of_ours_slurm_must_be_there(tmp_path):
    answer = carry_out(prolog.PHASES, "validate", settings(tmp_path, own_cluster=False))
    assert "slurm.conf: expected present at" in answer.msg


def test_the_lines_that_a_site_lacks_are_told_exactly():
    lines = ["Prolog=/etc/slurm/prolog", "Epilog=/etc/slurm/epilog", "PrologFlags=Alloc", "PrologEpilogTimeout=60"]
    shown = (
        "Configuration data as of 2026-11-21T07:00:00\n"
        "Epilog                  = (null)\n"
        "Prolog                  = /etc/slurm/prolog\n"
        "PrologEpilogTimeout     = 60\n"
        "PrologFlags             = Alloc,Contain\n"
    )
    assert prolog.missing_lines(shown, lines) == ["Epilog=/etc/slurm/epilog"]
    assert prolog.missing_lines("", lines) == lines


def test_slurm_24_11_numbers_the_programs_of_which_it_may_have_several():
    lines = ["Prolog=/etc/slurm/prolog", "Epilog=/etc/slurm/epilog", "PrologFlags=Alloc"]
    shown = (
        "Epilog[0]               = /opt/site/epilog\nEpilog[1]               = /etc/slurm/epilog\n"
        "Prolog[0]               = /etc/slurm/prolog\nPrologFlags             = Alloc,Contain\n"
    )
    assert prolog.missing_lines(shown, lines) == []
    assert prolog.missing_lines(shown.replace("Prolog[0]", "ResvProlog"), lines) == lines[:1]


@real_output
def test_the_lines_that_a_real_site_lacks():
    shown = (CAPTURED / "slurm" / "scontrol-show-config.txt").read_text()
    lines = ["Prolog=/public/slurm/prolog/prologs.sh", "PrologFlags=Alloc", "PrologEpilogTimeout=300", "Epilog=/etc/x"]
    assert prolog.missing_lines(shown, lines) == ["Epilog=/etc/x"]


def test_the_file_for_a_sites_include_is_written_only_where_asked(tmp_path):
    carry_out(prolog.PHASES, "configure", settings(tmp_path, own_cluster=False))
    assert not (tmp_path / "slurm").exists()
    carry_out(prolog.PHASES, "configure", settings(tmp_path, own_cluster=False, manage_conf=True), check=True)
    assert not (tmp_path / "slurm").exists()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("prolog", 0o775),
        ("epilog.d/20-leftover-processes", 0o644),
        ("prolog.json", 0o666),
        ("prolog.d", 0o777),
    ],
)
def test_the_mode_of_each_file_is_named_by_verify_and_put_right_by_install(tmp_path, name, mode):
    want = settings(tmp_path, leftover_processes=True)
    carry_out(prolog.PHASES, "install", want)
    path = tmp_path / "slurm" / name
    path.chmod(mode)
    problems = carry_out(prolog.PHASES, "verify", want).problems
    assert (str(path), f"mode {mode:04o}") in [(p["what"], p["found"]) for p in problems]
    assert carry_out(prolog.PHASES, "install", want).changed and carry_out(prolog.PHASES, "verify", want).ok
