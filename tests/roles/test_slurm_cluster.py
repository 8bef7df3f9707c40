"""slurm_cluster: configuration rendered, Slurm's answers read, and what a change of them asks for."""

from __future__ import annotations

import ast
import base64
import importlib.util
import os
import pwd
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_files import check as golden
from role_modules import ROOT, carry_out, load
from runner.cluster.slurm_gres import holds

CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "captured" / "slurm"
real_output = pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")
slurm, conf = load("slurm_cluster"), importlib.import_module("ansible.module_utils.slurm_conf")


def plugin(name):
    path = ROOT / "roles" / "slurm_cluster" / "lookup_plugins" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


munge_key, cluster_settings = plugin("munge_key"), plugin("slurm_cluster_settings")

HGX = {"CPUs": 224, "Boards": 1, "SocketsPerBoard": 2, "CoresPerSocket": 56, "ThreadsPerCore": 2, "RealMemory": 2063937}


def node(number, **observed):
    hostname = f"fukushimadc-02-hgx-{number:04}"
    seen = {"hostname": hostname, "hardware": HGX, "version": "22.05.8", **observed}
    return {"name": f"node{number:03}", "address": f"10.20.0.{number}", "observed": seen}


def typed(number):
    """A node on which the driver and NVIDIA's library were found."""
    return node(number, gpu_type="h200", nvml=True)


def settings(**changes):
    return {
        "node": "node001",
        "controller": "node001",
        "nodes": [node(1), node(2)],
        "cluster_name": "shakedown",
        "partition": "gpu",
        "gpus": 8,
        "gpu_type": "",
        "gpu_device": "/dev/nvidia",
        "system_memory_mib": 8192,
        "accounting": False,
        "proctrack": "cgroup",
        "return_to_service": 1,
        "prolog": "",
        "epilog": "",
        "prolog_timeout_s": 60,
        "conf_dir": "/nonexistent",
        "state_dir": "/var/lib/slurm/slurmctld",
        "settle_s": 0,
        "clock_skew_s": 30,
        "verify_job": False,
        "verify_job_limit_s": 30,
        "munge_key_problem": [],
        **changes,
    }


def rendered(want, old=""):
    parts = [conf.slurm_conf(want, old), conf.gres_conf(want, want["nodes"][0]["observed"]), conf.cgroup_conf(want)]
    return "\n".join(parts)


# --- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hgx", {"prolog": "/etc/slurm/prolog", "epilog": "/etc/slurm/epilog", "nodes": [typed(1), typed(2)]}),
        ("accounting", {"accounting": True, "gpu_type": "h200"}),
        ("containers", {"proctrack": "linuxproc", "gpu_device": "/srv/stand-in-gpus/nvidia", "controller": "node002"}),
        ("cpu", {"gpus": 0, "proctrack": "linuxproc"}),
    ],
)
def test_the_configuration(name, changes):
    golden(f"roles/slurm_cluster/{name}.conf", rendered(settings(**changes)))


def test_memory_is_given_in_whole_gib_so_that_a_new_kernel_does_not_drain_the_node():
    assert "RealMemory=2063360 " in conf.node_line(settings(), node(1))


def test_a_node_that_was_not_asked_keeps_its_line():
    both = conf.slurm_conf(settings(), "")
    silent = {**node(2), "observed": {}}
    assert conf.slurm_conf(settings(nodes=[node(1), silent]), both) == both


def test_the_controllers_host_name_is_taken_from_its_line_where_it_was_not_asked():
    both = conf.slurm_conf(settings(), "")
    silent = {**node(1), "observed": {}}
    assert "SlurmctldHost=fukushimadc-02-hgx-0001(10.20.0.1)" in conf.slurm_conf(
        settings(nodes=[silent, node(2)]), both
    )


def test_a_node_that_nobody_knows_stops_the_run_by_name():
    with pytest.raises(slurm.Stop) as stop:
        conf.slurm_conf(settings(nodes=[node(1), {**node(2), "observed": {}}]), "")
    assert stop.value.problem[2] == "unknown for node002"


def test_a_node_whose_name_is_its_hosts_needs_no_second_name():
    assert "NodeHostname" not in conf.node_line(settings(), {**node(1), "name": "fukushimadc-02-hgx-0001"})


@pytest.mark.parametrize(("gpus", "file"), [(1, "/dev/nvidia0"), (8, "/dev/nvidia[0-7]")])
def test_gpus_are_files_since_a_bare_count_drains_the_node(gpus, file):
    assert f"Name=gpu File={file}\n" in conf.gres_conf(settings(gpus=gpus), {})


@pytest.mark.parametrize(
    ("models", "found"),
    [
        (["NVIDIA H200"] * 8, "h200"),
        (["NVIDIA H100 80GB HBM3"] * 8, "h100"),
        (["NVIDIA H100 PCIe"], "h100"),
        (["NVIDIA A100-SXM4-80GB"] * 4, "a100"),
        (["Tesla V100-SXM2-32GB"], "v100"),
        (["Tesla T4"], "t4"),
        (["NVIDIA GeForce RTX 4090"] * 8, "4090"),
        (["NVIDIA GeForce GTX 1080 Ti"], "1080"),
        (["NVIDIA RTX A6000"], "a6000"),
        (["NVIDIA RTX 6000 Ada Generation"], "6000"),
        (["NVIDIA L40S"], "l40s"),
        (["NVIDIA GH200 480GB"], "gh200"),
        (["NVIDIA B200"] * 8, "b200"),
        (["NVIDIA H200", "NVIDIA H100 80GB HBM3"], ""),
        ([], ""),
    ],
)
def test_the_type_of_gpus_is_a_word_of_the_name_that_the_driver_has_for_them(models, found):
    assert conf.gpu_type(models) == found
    # Slurm's own name of a detected GPU; a configured type must be a part of it.
    assert all(found in model.lower().replace(" ", "_") for model in models)


@pytest.mark.parametrize("wanted", ["gpu:h200:8", "gpu:8", "gpu:h200:4"])
def test_what_the_examples_inventory_asks_for_is_what_a_node_has(wanted):
    assert 'gres: "gpu:h200:8"' in (ROOT / "inventory" / "slurm-example" / "hosts.yml").read_text()
    (there,) = {
        line.partition("Gres=")[2] for line in conf.node_lines(conf.slurm_conf(settings(nodes=[typed(1)]), "")).values()
    }
    assert holds(there, wanted) is True


def test_what_the_inventory_calls_the_gpus_wins():
    assert "Gres=gpu:h200_141gb:8" in conf.node_line(settings(gpu_type="h200_141gb"), typed(1))


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("", False), ("h100", False), ("H100", False), ("nvidia_h100_80gb_hbm3", False), ("h200", True), ("hopper", True)],
)
def test_a_type_that_slurm_would_not_find_is_refused(tmp_path, monkeypatch, kind, refused):
    monkeypatch.setattr(slurm, "gpu_models", lambda: ["NVIDIA H100 80GB HBM3"] * 8)
    answer = carry_out(
        slurm.PHASES, "validate", settings(gpu_type=kind, conf_dir=str(tmp_path), state_dir=str(tmp_path))
    )
    says = f"slurm_cluster_gpu_type: expected a part of nvidia_h100_80gb_hbm3, as the driver names the GPUs, found {kind} ("
    assert (says in answer.msg) is refused


def test_the_drivers_names_are_read_from_its_files(tmp_path):
    for number, name in enumerate(("0000:1b:00.0", "0000:43:00.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(
            f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 12{number}\nDevice Minor: \t {number}\n"
        )
    assert slurm.gpu_models(str(tmp_path)) == ["NVIDIA H200", "NVIDIA H200"]
    assert slurm.gpu_models(str(tmp_path / "none")) == []


@pytest.mark.parametrize(
    "folder", ["lib/slurm", "lib64/slurm", "lib/x86_64-linux-gnu/slurm-wlm", "lib/aarch64-linux-gnu/slurm"]
)
def test_the_driver_is_asked_where_slurms_library_can(tmp_path, folder):
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "slurmd").touch()
    assert not slurm.has_nvml_plugin(str(tmp_path / "sbin" / "slurmd"))
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "gpu_nvml.so").touch()
    assert slurm.has_nvml_plugin(str(tmp_path / "sbin" / "slurmd"))
    assert "AutoDetect=nvml\n" in conf.gres_conf(settings(), {"nvml": True})
    assert "AutoDetect" not in conf.gres_conf(settings(), {"nvml": False})


# --- memory ----------------------------------------------------------------------------------------


def sized(number, gib, cpus, **observed):
    return node(number, hardware={"CPUs": cpus, "RealMemory": gib * 1024}, **observed)


def test_jobs_that_ask_for_no_memory_share_what_the_system_leaves_of_the_smallest_node():
    text = conf.slurm_conf(settings(nodes=[sized(1, 2015, 224), sized(2, 1007, 224)]), "")
    assert f"DefMemPerCPU={(1007 * 1024 - 8192) // 224}\n" in text
    assert f" DefMemPerGPU={(1007 * 1024 - 8192) // 8}\n" in text
    assert "DefMemPerGPU" not in conf.slurm_conf(settings(gpus=0), "")
    assert "SelectTypeParameters=CR_Core_Memory\n" in text


@pytest.mark.parametrize(("gib", "kept_mib"), [(2015, 8192), (128, 8192), (64, 8192), (32, 4096), (4, 512)])
def test_the_system_keeps_no_more_than_an_eighth_of_a_node(gib, kept_mib):
    assert f"MemSpecLimit={kept_mib}" in conf.node_line(settings(), sized(1, gib, 8))


def test_the_memory_of_a_node_that_an_earlier_version_wrote_is_read_from_its_line():
    old = "NodeName=node002 NodeAddr=10.20.0.2 CPUs=2 RealMemory=2048\n"
    text = conf.slurm_conf(settings(nodes=[node(1), {**node(2), "observed": {}}]), old)
    assert "DefMemPerCPU=1024\n" in text


# --- what a change asks for ------------------------------------------------------------------------


def changed(**changes):
    def three(want):
        return dict(
            zip(
                ("slurm.conf", "gres.conf", "cgroup.conf"),
                (conf.slurm_conf(want, ""), conf.gres_conf(want, {}), conf.cgroup_conf(want)),
                strict=True,
            )
        )

    return conf.how_to_apply(three(settings()), three(settings(**changes)))


def test_no_change_asks_for_nothing():
    assert changed() == ""


@pytest.mark.parametrize(
    "change",
    [{"prolog": "/etc/slurm/prolog"}, {"epilog": "/etc/slurm/epilog"}, {"return_to_service": 2}, {"partition": "all"}],
)
def test_what_slurm_reads_again_needs_no_restart(change):
    assert changed(**change) == "reload"


@pytest.mark.parametrize(
    "change",
    [{"nodes": [node(1), node(2), node(4)]}, {"gpus": 4}, {"proctrack": "linuxproc"}, {"accounting": True}],
)
def test_nodes_gpus_and_plugins_need_a_restart(change):
    assert changed(**change) == "restart"


def test_files_that_were_not_there_need_a_restart():
    assert conf.how_to_apply({"slurm.conf": None}, {"slurm.conf": "A=1\n"}) == "restart"


# --- what Slurm says -------------------------------------------------------------------------------


def test_hardware_of_slurmd():
    text = (
        "NodeName=hgx CPUs=224 Boards=1 SocketsPerBoard=2 CoresPerSocket=56 ThreadsPerCore=2 RealMemory=2063937\n"
        "UpTime=12-03:31:34\n"
    )
    assert conf.hardware(text) == HGX


@pytest.mark.parametrize(
    "text", ["", "slurmd: error: no", "NodeName=x CPUs=2", "NodeName=x CPUs= RealMemory=9", "UpTime=1"]
)
def test_what_is_no_hardware_is_refused(text):
    with pytest.raises(ValueError):
        conf.hardware(text)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("node001|idle|none", ""),
        ("node001|mixed|none", ""),
        ("node001|idle-|none", ""),
        ("node001|idle~|none", ""),
        ("node001|powered_down|none", ""),
        ("node001|reboot^|updates", ""),
        ("node001|maint|none", ""),  # jobs of its reservation start there
        ("node001|reserved|none", ""),
        ("node001|drained$|disk", "drained, reason: disk"),
        ("node001|inval|Low RealMemory", "inval, reason: Low RealMemory"),
        ("node001|allocated*|none", "allocated, not answering"),
        ("node001|drained|bad fan", "drained, reason: bad fan"),
        ("node001|drained|a|b|c", "drained, reason: a|b|c"),
        ("node001|down*|Not responding", "down, not answering, reason: Not responding"),
        ("node001|unknown*|none", "unknown, not answering"),
    ],
)
def test_a_state_and_why_it_takes_no_jobs(line, found):
    state, reason = slurm.states(line + "\n")["node001"]
    assert slurm.judge(state, reason) == (found, state in ("maint", "reserved"))


def test_the_role_and_the_planner_read_states_by_one_list():
    there = ROOT / "plugins" / "module_utils" / "slurm_states.py"
    assert there.resolve() == ROOT / "runner" / "cluster" / "slurm_states.py"
    ast.parse(there.read_text(), feature_version=(3, 9))
    imports = {node.module for node in ast.walk(ast.parse(there.read_text())) if isinstance(node, ast.ImportFrom)}
    assert imports == {"__future__"}  # it is taken to nodes alone


@pytest.mark.parametrize(
    "line", ["slurm_load_node: Unable to contact slurm controller", "node001", "node001|", "|idle|", "node001|<!>|"]
)
def test_what_is_no_state_is_refused(line):
    with pytest.raises(ValueError):
        slurm.states(line)


@given(st.text())
def test_any_text_gives_states_or_a_refusal(text):
    try:
        found = slurm.states(text)
    except ValueError:
        return
    assert all(state for state, _ in found.values())


@real_output
def test_states_of_a_real_cluster():
    text = (CAPTURED / "sinfo-N-state-pairs.txt").read_text().replace(",", "|")
    found = slurm.states(text)
    up = {name for name, state in found.items() if not slurm.judge(*state)[0]}
    assert {found[name][0] for name in up} == {"idle", "allocated", "mixed"}
    assert {state.strip("*") for state, _ in found.values()} - {"idle", "allocated", "mixed"} == {
        "down",
        "drained",
        "draining",
        "fail",
    }


@real_output
def test_configuration_of_a_real_cluster():
    values = slurm.config((CAPTURED / "scontrol-show-config.txt").read_text())
    assert values["SLURM_VERSION"] == "23.02.2"
    assert values["HASH_VAL"] == "Match"
    assert values["Prolog"] == "/public/slurm/prolog/prologs.sh"
    assert values["SchedulerParameters"].startswith("defer,max_rpc_cnt=64")


def test_the_moments_of_a_credential():
    text = "STATUS:          Success (0)\nENCODE_TIME:     2026-11-21 07:16:46 +0000 (1795245406)\nDECODE_TIME:     2026-11-21 07:17:46 +0000 (1795245466)\nUID:   root (0)\n"
    assert slurm.unmunged(text) == {"ENCODE_TIME": 1795245406, "DECODE_TIME": 1795245466}
    assert slurm.unmunged("unmunge: Error: Invalid credential") == {}


# --- the key ---------------------------------------------------------------------------------------

KEY = base64.b64encode(bytes(range(128))).decode()


def test_a_key_is_taken_as_it_is_given(tmp_path):
    file = tmp_path / "munge.key"
    file.write_bytes(bytes(range(128)))
    file.chmod(0o600)
    assert munge_key.given_key(KEY, "", True) == KEY
    assert munge_key.given_key("", str(file), True) == KEY


def test_no_key_lets_the_first_node_make_one_only_where_that_is_allowed():
    assert munge_key.given_key("", "", True) == ""
    with pytest.raises(munge_key.Refused, match="neither"):
        munge_key.given_key("", "", False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("not base64!", "something else"),
        (base64.b64encode(b"short").decode(), "5"),
        (base64.b64encode(bytes(1025)).decode(), "1025"),
    ],
)
def test_a_key_that_munge_would_not_take_is_refused_without_telling_it(text, found):
    with pytest.raises(munge_key.Refused) as refused:
        munge_key.given_key(text, "", True)
    assert refused.value.args[2] == found
    assert text not in str(refused.value)


def test_a_keys_file_that_others_may_read_is_refused(tmp_path):
    file = tmp_path / "munge.key"
    file.write_bytes(bytes(128))
    file.chmod(0o640)
    with pytest.raises(munge_key.Refused, match="mode 0640"):
        munge_key.given_key("", str(file), True)
    with pytest.raises(munge_key.Refused, match="no such file"):
        munge_key.given_key("", str(tmp_path / "none"), True)


# --- the inventory ---------------------------------------------------------------------------------


def test_nodes_come_in_the_inventorys_order_with_what_was_seen_of_them():
    seen = {"hostname": "a", "hardware": HGX, "version": "1"}
    hostvars = {
        "hgx-0001": {
            "runner_alias": "node001",
            "ansible_host": "10.0.0.1",
            "slurm_cluster_install_result": {"facts": {"observed": seen}},
        },
        "hgx-0002": {"runner_alias": "node002", "slurm_cluster_install_result": {"unreachable": True}},
        "hgx-0003": {
            "slurm_cluster_install_result": {"skipped": True},
            "slurm_cluster_validate_result": {"also": True, "facts": {"observed": seen}},
        },
    }
    assert cluster_settings.nodes(["hgx-0002", "hgx-0001"], hostvars, "alias") == [
        {"name": "node002", "address": "hgx-0002", "observed": {}},
        {"name": "node001", "address": "10.0.0.1", "observed": seen},
    ]
    assert cluster_settings.nodes(["hgx-0001"], hostvars, "hostname")[0]["name"] == "hgx-0001"
    assert cluster_settings.nodes(["hgx-0003"], hostvars, "alias")[0]["observed"] == seen


# --- the phases ------------------------------------------------------------------------------------


@pytest.fixture
def node_of(tmp_path, monkeypatch):
    """A PATH with stand-ins for the commands that a test names, each a text to print and a return code."""

    def make(**commands):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, (text, rc) in commands.items():
            script = folder / name
            script.write_text(f"#!/bin/sh\n# STAND-IN for {name}\ncat <<'END'\n{text}\nEND\nexit {rc}\n")
            script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm, "STARTED", time.monotonic())

    return make


def healthy(**commands):
    active = "\n\n".join(
        f"Id={name}.service\nActiveState=active\nUnitFileState=enabled" for name in ("munge", "slurmctld", "slurmd")
    )
    opened = "STATUS: Success (0)\nENCODE_TIME:  2026-11-21 07:16:46 +0000 (1795245406)\nDECODE_TIME:  2026-11-21 07:16:47 +0000 (1795245407)"
    return {
        "systemctl": (active, 0),
        "munge": ("MUNGE:abc:", 0),
        "unmunge": (opened, 0),
        "scontrol": (
            "Slurmctld(primary) at hgx is UP\nHASH_VAL                = Match\nSLURM_VERSION           = 22.05.8",
            0,
        ),
        "sinfo": ("node001|idle|none", 0),
        **commands,
    }


def verify(**changes):
    return carry_out(slurm.PHASES, "verify", settings(credential={"rc": 0, "stdout": "MUNGE:x:"}, **changes))


def test_a_healthy_node_is_good(node_of):
    node_of(**healthy())
    answer = verify()
    assert answer.ok, answer.msg
    assert answer.facts["state"] == "idle"


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"sinfo": ("node001|drained|bad fan", 0)}, "node in Slurm: expected up, found drained, reason: bad fan"),
        (
            {"sinfo": ("node001|down|Not responding", 0)},
            "node in Slurm: expected up, found down, reason: Not responding (NOT_RESPONDING) (run `runner setup --tags slurm_cluster`",
        ),
        ({"sinfo": ("", 0)}, "node in Slurm: expected up, found no such node"),
        ({"sinfo": ("half a li", 0)}, "node in Slurm: expected up, found no node|state|reason in 'half a li'"),
        ({"scontrol": ("Slurmctld(primary) at hgx is DOWN", 1)}, "slurmctld on node001: expected UP, found DOWN"),
        (
            {"scontrol": ("is UP\nHASH_VAL    = Different Ours=0x1 Slurmctld=0x2", 0)},
            "slurm.conf: expected that which slurmctld has read",
        ),
        (
            {"unmunge": ("unmunge: Error: Invalid credential", 1)},
            "munge key: expected that of node001, found unmunge: Error: Invalid credential",
        ),
        (
            {"systemctl": ("Id=munge.service\nActiveState=failed\nUnitFileState=enabled", 0)},
            "munge.service: expected active, found failed",
        ),
    ],
)
def test_what_is_broken_is_named(node_of, broken, says):
    node_of(**healthy(**broken))
    answer = verify()
    assert not answer.ok
    assert says in answer.msg


@pytest.mark.parametrize(
    ("sacctmgr", "says"),
    [
        (("shakedown|10.20.0.1", 0), ""),
        (("", 0), "cluster that slurmdbd knows, with its slurmctld: expected shakedown, found none"),
        (("shakedown|", 0), "cluster that slurmdbd knows, with its slurmctld: expected shakedown, found shakedown"),
        (("other|10.0.0.1", 0), "cluster that slurmdbd knows, with its slurmctld: expected shakedown, found other"),
        (
            ("sacctmgr: error: slurm_persist_conn_open_without_init: Connection refused", 1),
            "found sacctmgr: error: slurm_pers",
        ),
    ],
)
def test_a_slurmdbd_that_does_not_know_the_cluster_is_named_on_its_node(node_of, sacctmgr, says):
    active = healthy()["systemctl"][0] + "".join(
        f"\n\nId={name}.service\nActiveState=active\nUnitFileState=enabled" for name in ("mariadb", "slurmdbd")
    )
    node_of(**healthy(sacctmgr=sacctmgr, systemctl=(active, 0)))
    answer = verify(accounting=True)
    assert answer.ok is (says == "") and says in answer.msg
    elsewhere = verify(accounting=True, node="node002")
    assert "slurmdbd knows" not in elsewhere.msg


def added(tmp_path, monkeypatch, sacctmgr):
    """(the answer, the commands of sacctmgr) where the cluster is added to slurmdbd, if it is not there."""
    script = tmp_path / "sacctmgr"
    script.write_text(f'#!/bin/sh\n# STAND-IN for sacctmgr\necho "$@" >> {tmp_path}/asked\n{sacctmgr}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "clustername").write_text("shakedown|2761")
    want = settings(accounting=True, state_dir=str(tmp_path))
    answer = carry_out({"configure": lambda phase: slurm.add_cluster(phase, phase.want)}, "configure", want)
    return answer, [line for line in (tmp_path / "asked").read_text().splitlines() if "add cluster" in line]


def test_a_cluster_that_slurmdbd_knows_is_left_as_it_is(tmp_path, monkeypatch):
    answer, commands = added(tmp_path, monkeypatch, "echo 'shakedown|10.20.0.1'")
    assert not answer.changed and commands == [] and (tmp_path / "clustername").exists()


def test_a_cluster_that_ran_without_slurmdbd_gives_up_the_number_that_it_gave_itself(tmp_path, monkeypatch):
    answer, commands = added(tmp_path, monkeypatch, "true")
    assert answer.changed and commands == ["--immediate add cluster shakedown"]
    assert not (tmp_path / "clustername").exists()


def test_a_slurmdbd_that_does_not_answer_stops_the_run_with_its_words(tmp_path, monkeypatch):
    answer, commands = added(tmp_path, monkeypatch, "echo 'sacctmgr: error: Connection refused' >&2; exit 1")
    assert "slurmdbd: expected answers within 0 s, found sacctmgr: error: Connection refused" in answer.msg
    assert commands == [] and (tmp_path / "clustername").exists()


GRANTS = {
    "10.11": "GRANT USAGE ON *.* TO `slurm`@`localhost` IDENTIFIED VIA unix_socket\nGRANT ALL PRIVILEGES ON `slurm_acct_db`.* TO `slurm`@`localhost`",
    "escaped": "GRANT ALL PRIVILEGES ON `slurm\\_acct\\_db`.* TO `slurm`@`localhost`",
}


@pytest.mark.parametrize("grants", GRANTS.values(), ids=GRANTS)
def test_a_database_that_is_there_is_left_as_it_is(node_of, grants):
    node_of(mariadb=(grants, 0))
    answer = carry_out({"configure": slurm.database}, "configure", settings())
    assert answer.ok and not answer.changed


def test_the_database_has_no_password_and_what_mariadb_refuses_is_told(node_of):
    node_of(mariadb=("ERROR 1141 (42000) at line 1: There is no such grant defined for user 'slurm'", 1))
    answer = carry_out({"configure": slurm.database}, "configure", settings())
    assert "MariaDB: expected a database slurm_acct_db, found ERROR 1141" in answer.msg
    assert "Pass" not in conf.slurmdbd_conf("hgx-0001")


def test_a_clock_that_is_off_is_named(node_of):
    late = "ENCODE_TIME: x (1795245406)\nDECODE_TIME: y (1795245506)"
    node_of(**healthy(unmunge=(late, 0)))
    assert "clock: expected within 30 s of node001, found +100 s" in verify().msg


def test_a_controller_without_munge_is_no_riddle(node_of):
    node_of(**healthy())
    answer = carry_out(slurm.PHASES, "verify", settings(credential={"rc": 1, "stderr": "munge: Error: no socket"}))
    assert "munge credential of the controller: expected one, found munge: Error: no socket" in answer.msg


@pytest.mark.parametrize(
    ("state", "is_hung"),
    [
        ("down|Not responding", True),
        ("down*|Not responding", True),
        ("down*|Not responding : Not responding", True),  # 24.11
        ("down*|bad fan : Not responding", True),  # drained for that once, and resumed
        ("down|mended : disk : Not responding", True),
        ("down*|Not responding : bad fan", False),
        ("down|bad fan", False),
        ("down|Node unexpectedly rebooted", False),
        ("drained|Not responding", False),
        ("idle|Not responding", False),  # the reason remains after the node has come back
        ("down|", False),
    ],
)
def test_only_slurms_own_verdict_on_a_silent_node_is_taken_back(state, is_hung):
    (found,) = slurm.states(f"node001|{state}\n").values()
    assert slurm.hung(*found) is is_hung


def resumed(node_of, tmp_path, prints="cat <<'END'", settle_s=0, **commands):
    """(the answer of what configure does last, the commands of scontrol, which `prints`) on a node that Slurm has down
    after a hang.
    """
    node_of(**healthy(sinfo=("node001|down|Not responding", 0), **commands))
    script = Path(os.environ["PATH"].split(":")[0]) / "scontrol"
    text = script.read_text().replace("#!/bin/sh\n", f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    script.write_text(text.replace("cat <<'END'", prints))
    want = settings(credential={"rc": 0, "stdout": "MUNGE:x:"}, settle_s=settle_s)
    answer = carry_out({"configure": lambda phase: slurm.resume(phase, phase.want)}, "configure", want)
    return answer, (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_a_node_that_is_down_since_it_hung_is_resumed_and_the_cause_is_named(node_of, tmp_path):
    answer, asked = resumed(node_of, tmp_path)
    assert answer.changed and asked[-1] == "update nodename=node001 state=resume"
    (warning,) = answer.warnings
    assert "NOT_RESPONDING" in warning and "resumed with `scontrol update nodename=node001 state=resume`" in warning


def test_a_hung_node_waits_until_slurmctld_has_read_its_new_slurm_conf(node_of, tmp_path):
    """One play configures both, each at its own time."""
    before = ("is UP\nHASH_VAL    = Different Ours=0x1 Slurmctld=0x2", 0)
    first = f'[ "$1" = ping ] || mkdir {tmp_path}/read 2>/dev/null'
    later = f"cat <<'END' | if {first}; then cat; else sed 's/Different.*/Match/'; fi"
    answer, asked = resumed(node_of, tmp_path, later, settle_s=10, scontrol=before)
    assert answer.changed and asked[-1] == "update nodename=node001 state=resume"


def after_two_questions(node_of, tmp_path, first):
    """verify's answer where sinfo says `first` twice, and then that the node is idle."""
    node_of(**healthy(sinfo=(f"node001|{first}|none", 0)))
    script = Path(os.environ["PATH"].split(":")[0]) / "sinfo"
    later = f"cat <<'END' | if mkdir {tmp_path}/1 || mkdir {tmp_path}/2; then cat; else sed 's/|.*|/|idle|/'; fi 2>/dev/null"
    script.write_text(script.read_text().replace("cat <<'END'", later))
    return verify(settle_s=10)


@pytest.mark.parametrize("first", ["idle*", "unknown", "mixed*"])
def test_a_node_that_was_resumed_is_given_the_time_to_answer(node_of, tmp_path, first):
    assert after_two_questions(node_of, tmp_path, first).ok


def test_a_node_that_is_down_is_told_at_once(node_of, tmp_path):
    assert "found down, not answering" in after_two_questions(node_of, tmp_path, "down*").msg


def test_the_age_of_the_controllers_credential_is_no_skew(node_of, monkeypatch):
    """A slurmd that is started anew may take longer than clocks may differ."""
    node_of(**healthy(unmunge=("ENCODE_TIME: x (1795245406)\nDECODE_TIME: y (1795245506)", 0)))
    monkeypatch.setattr(slurm, "STARTED", time.monotonic() - 99)
    assert "clock" not in verify().msg


def test_a_silent_slurmd_is_started_anew_and_not_told_to_reload_before(node_of, tmp_path):
    node_of(systemctl=healthy()["systemctl"])
    script = Path(os.environ["PATH"].split(":")[0]) / "systemctl"
    script.write_text(script.read_text().replace("#!/bin/sh\n", f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'))
    want = settings(node="node002")
    carry_out({"configure": lambda phase: slurm.start(phase, want, "reload", unheard=True)}, "configure", want)
    assert [words for words in (tmp_path / "asked").read_text().splitlines() if "show" not in words] == [
        "restart slurmd"
    ]


@pytest.mark.parametrize(
    "broken",
    [
        {"unmunge": ("unmunge: Error: Invalid credential", 1)},
        {"unmunge": ("ENCODE_TIME: x (1795245406)\nDECODE_TIME: y (1795245506)", 0)},
        {"systemctl": ("Id=slurmd.service\nActiveState=failed\nUnitFileState=enabled", 0)},
        {"scontrol": ("Slurmctld(primary) at hgx is DOWN", 1)},
        {"scontrol": ("is UP\nHASH_VAL    = Different Ours=0x1 Slurmctld=0x2", 0)},
    ],
    ids=["another key", "clock", "slurmd", "slurmctld", "another slurm.conf"],
)
def test_a_node_that_is_not_good_otherwise_is_not_resumed(node_of, tmp_path, broken):
    answer, asked = resumed(node_of, tmp_path, **broken)
    assert not answer.changed and not any("resume" in words for words in asked)


def test_a_busy_node_is_not_asked_to_run_a_job(node_of):
    node_of(**healthy(srun=("", 1)))
    script = Path(os.environ["PATH"].split(":")[0]) / "srun"
    script.write_text(
        "#!/bin/sh\n# STAND-IN for srun\necho 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2\nexit 1\n"
    )
    answer = verify(verify_job=True)
    assert answer.ok
    assert answer.warnings == ["no job was tried: none started within 10 s (see `squeue`)"]


def test_validate_finds_every_reason_at_once(tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=theirs\n")
    (tmp_path / "clustername").write_text("other|2761")
    want = settings(
        conf_dir=str(tmp_path),
        state_dir=str(tmp_path),
        gpu_device=f"{tmp_path}/gpu",
        munge_key_problem=["munge key", "one", "none", ""],
    )
    answer = carry_out(slurm.PHASES, "validate", want)
    what = [problem["what"] for problem in answer.problems]
    assert {"munge key", f"{tmp_path}/slurm.conf", "GPU files", f"cluster name in {tmp_path}"} <= set(what)


@pytest.mark.parametrize("content", ["shakedown", "shakedown\n", "shakedown|2761"])
def test_the_clusters_own_name_is_accepted_as_any_version_writes_it(tmp_path, content):
    (tmp_path / "clustername").write_text(content)
    answer = carry_out(slurm.PHASES, "validate", settings(conf_dir=str(tmp_path), state_dir=str(tmp_path)))
    assert "cluster name" not in answer.msg


@pytest.mark.parametrize(
    ("node_name", "accounting", "packages"),
    [
        ("node001", False, {"munge", "slurmd", "slurm-client", "slurmctld"}),
        ("node002", False, {"munge", "slurmd", "slurm-client"}),
        ("node001", True, {"munge", "slurmd", "slurm-client", "slurmctld", "slurmdbd", "mariadb-server"}),
        ("node002", True, {"munge", "slurmd", "slurm-client"}),
    ],
)
def test_each_node_gets_the_packages_of_what_runs_there(node_name, accounting, packages, monkeypatch, tmp_path):
    want = settings(node=node_name, accounting=accounting)
    monkeypatch.setattr(slurm, "program", lambda name: None)
    monkeypatch.setattr(slurm, "PMIX", str(tmp_path / "*" / "libpmix.so"))
    assert set(slurm.missing_packages(want)) == packages | {"libpmix-dev"}
    (tmp_path / "x86_64-linux-gnu").mkdir()
    (tmp_path / "x86_64-linux-gnu" / "libpmix.so").touch()
    assert set(slurm.missing_packages(want)) == packages


def test_check_mode_shows_the_files_and_writes_none(tmp_path):
    here = node(1, hostname=socket.gethostname())
    answer = carry_out(
        slurm.PHASES, "configure", settings(conf_dir=str(tmp_path), state_dir=str(tmp_path), nodes=[here]), check=True
    )
    assert answer.ok and answer.changed
    shown = {diff["after_header"]: diff["after"] for diff in answer.diff}
    assert "NodeName=node001" in shown[f"{tmp_path}/slurm.conf"]
    assert list(tmp_path.iterdir()) == []


def test_another_version_than_the_controllers_stops_before_anything_is_written(tmp_path):
    nodes = [node(1), node(2, version="23.11.4")]
    answer = carry_out(slurm.PHASES, "configure", settings(conf_dir=str(tmp_path), nodes=nodes, node="node002"))
    assert "Slurm version: expected 22.05.8, as node001 has, found 23.11.4" in answer.msg
    assert list(tmp_path.iterdir()) == []


def test_a_prolog_that_is_missing_never_gets_into_slurm_conf(tmp_path):
    answer = carry_out(slurm.PHASES, "configure", settings(conf_dir=str(tmp_path), prolog=f"{tmp_path}/prolog"))
    assert "slurm_cluster_prolog: expected an executable file" in answer.msg
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_key_that_munge_refuses_is_the_one_problem_and_setup_mends_it(tmp_path, monkeypatch):
    phase = importlib.import_module("ansible.module_utils.phase")
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(phase, "ids", lambda owner: (nobody.pw_uid, nobody.pw_gid) if owner else (0, 0))
    key = tmp_path / "munge" / "munge.key"
    key.parent.mkdir()
    os.chown(key.parent, nobody.pw_uid, nobody.pw_gid)
    monkeypatch.setattr(slurm, "MUNGE_KEY", str(key))
    monkeypatch.setattr(slurm, "services", lambda phase, names: {name: ("failed", "enabled") for name in names})
    key.write_bytes(b"k" * 128)
    os.chown(key, nobody.pw_uid, nobody.pw_gid)
    key.chmod(0o644)
    want = settings(conf_dir=str(tmp_path), state_dir=str(tmp_path / "none"))
    (problem,) = carry_out(slurm.PHASES, "verify", want).problems
    assert problem["what"] == str(key) and problem["found"].startswith("mode 0644") and "setup" in problem["remedy"]
    monkeypatch.setattr(slurm, "start", lambda *arguments: None)
    monkeypatch.setattr(slurm, "SPOOL", str(tmp_path / "spool"))  # this machine's is not touched
    carry_out(
        slurm.PHASES, "configure", settings(conf_dir=str(tmp_path), state_dir=str(tmp_path / "state"), settle_s=0)
    )
    assert key.stat().st_mode & 0o777 == 0o600
    key.parent.chmod(0o777)
    (problem,) = carry_out(slurm.PHASES, "verify", want).problems
    assert (problem["what"], problem["found"]) == (str(key.parent), "mode 0777")
