"""cuda_check: what it reads, how it judges, and that it never guesses."""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from role_modules import ROOT, carry_out, load

module = load("cuda_check")
nvidia = importlib.import_module("ansible.module_utils.nvidia")  # there since role_modules was imported
xids = importlib.import_module("ansible.module_utils.xids")

STAND_IN = ROOT / "molecule" / "resources" / "stand-ins" / "nvidia-smi"
CAPTURED = Path(__file__).resolve().parents[3] / "shared" / "captured"
captured = pytest.mark.skipif(not CAPTURED.exists(), reason="no captured outputs beside this tree")

WANT = {
    "driver_min": "560",
    "cuda_min": "12.5",
    "toolkit_min": "",
    "cuda_home": "/nowhere",
    "required": True,
    "published": True,
    "gpus": 8,
    "gpu_model": "H200",
    "ecc": True,
    "persistence": True,
    "set_persistence": False,
    "nvlinks": 18,
    "nvlink_gb_per_s": 25.0,
    "fabric_manager": "nvidia-fabricmanager",
    "xid_hours": 24.0,
    "answer_s": 20.0,
    "same": ["driver", "cuda", "gpu", "vbios"],
    "driver_package": "",
}


# --- what is judged: the text of `nvidia-smi -q`, here of the stand-in ---


def ask_stand_in(folder, *argv):
    env = {**os.environ, "NVIDIA_SMI_STATE": str(folder / "none.json")}
    return subprocess.run([STAND_IN, *argv], env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return ask_stand_in(tmp_path_factory.mktemp("gpus"), "-q")


@pytest.fixture(scope="module")
def nvlinks(tmp_path_factory):
    return ask_stand_in(tmp_path_factory.mktemp("gpus"), "nvlink", "-s")


def judge(text, **settings):
    """{what: (expected, found)} and warnings of the text of `nvidia-smi -q`, without the node around it."""
    want, said = {**WANT, **settings}, nvidia.parse_query(text)
    findings = module.Findings(len(said.gpus))
    for gpu in said.gpus:
        module.judge_gpu(gpu, want, findings)
    versions, count = module.judge_versions(said, want), module.judge_count(said, want, [])
    problems = [*versions[0], *count[0], *findings.problems()]
    told = {what: (str(expected), str(found)) for what, expected, found, _ in problems}
    return told, [*versions[1], *count[1], *findings.warnings()]


def with_field(report, bus, path, value):
    """The text of a report whose GPU on `bus` has `value` in the field `path`, in a new section where it has none."""
    section, _, name = path.rpartition("/")
    at = report.index(f"GPU 00000000:{bus}")
    end = report.find("\nGPU 0", at) % len(report)
    gpu = report[at:end]
    start = gpu.index(f"\n{' ' * 4 * section.count('/')}    {section.rpartition('/')[2]}\n") if section else 0
    changed, count = re.subn(rf"(\n +{re.escape(name)} +): .*", rf"\1: {value}", gpu[start:], count=1)
    if not count:
        changed = gpu[start:].replace("\n", f"\n    {section}\n        {name} : {value}\n", 1)
    return report[:at] + gpu[:start] + changed + report[end:]


@pytest.mark.parametrize(
    ("field", "value", "what", "expected"),
    [
        ("Product Name", "NVIDIA H100 80GB HBM3", "model", "H200"),
        ("Remapped Rows/Pending", "Yes", "pending row remap or page retirement", "No"),
        ("Remapped Rows/Remapping Failure Occurred", "Yes", "row remap failure", "No"),
        ("ECC Errors/Aggregate/SRAM Threshold Exceeded", "Yes", "SRAM threshold exceeded", "No"),
        ("ECC Errors/Unrepairable Memory", "Yes", "unrepairable memory", "No"),
        ("GPU Reset Status/Reset Required", "Yes", "reset required", "No"),
        ("GPU Recovery Action", "Drain and Reset", "recovery action", "None"),
        ("Fabric/State", "In Progress", "fabric", "Completed"),
        ("Fabric/Status", "Insufficient Resources", "fabric", "Success"),
        ("Clocks Event Reasons/HW Slowdown", "Active", "clocks: HW Slowdown", "Not Active"),
        ("Clocks Event Reasons/HW Thermal Slowdown", "Active", "clocks: HW Thermal Slowdown", "Not Active"),
        ("Clocks Event Reasons/HW Power Brake Slowdown", "Active", "clocks: HW Power Brake Slowdown", "Not Active"),
        ("Clocks Event Reasons/SW Thermal Slowdown", "Active", "clocks: SW Thermal Slowdown", "Not Active"),
    ],
)
def test_each_fault_of_a_gpu_is_told_with_its_address(healthy, field, value, what, expected):
    problems, warnings = judge(with_field(healthy, "DF", field, value))
    assert problems == {f"{what} of GPU 0000:df:00.0": (expected, value)}
    assert warnings == []


@pytest.mark.parametrize(
    "field", ["Idle", "Applications Clocks Setting", "SW Power Cap", "Sync Boost", "Display Clock Setting"]
)
def test_clocks_that_are_low_for_a_good_reason_are_no_fault(healthy, field):
    assert judge(with_field(healthy, "DF", f"Clocks Event Reasons/{field}", "Active")) == ({}, [])


@pytest.mark.parametrize(
    "value", ["N/A", "[N/A]", "ERR!", "[Unknown Error]", "Requested functionality has been deprecated"]
)
@pytest.mark.parametrize(
    "field",
    ["ECC Mode/Current", "Persistence Mode", "Remapped Rows/Pending", "Product Name",
     "PCI/GPU Link Info/Link Width/Current", "Clocks Event Reasons/SW Thermal Slowdown"],
)  # fmt: skip
def test_what_cannot_be_read_is_a_warning_and_neither_a_pass_nor_an_alarm(healthy, field, value):
    problems, warnings = judge(with_field(healthy, "9D", field, value))
    assert problems == {}
    assert len(warnings) == 1 and warnings[0].startswith("unknown on GPU 0000:9d:00.0: ")


# --- a node: the stand-in's nvidia-smi, and small commands for the rest, first in PATH ---


class Node:
    def __init__(self, folder):
        self.bin, self.state, self.fact = folder / "bin", folder / "gpus.json", folder / "cuda.fact"
        self.bin.mkdir()
        (self.bin / "nvidia-smi").symlink_to(STAND_IN)
        self.kernel_says("systemd[1]: Started Journal Service.")
        self.command("dmesg", "echo dmesg: read kernel buffer failed: Operation not permitted >&2; exit 1")
        self.command("systemctl", "echo LoadState=loaded; echo ActiveState=active")

    def command(self, name, script):
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def kernel_says(self, text):
        (self.bin / "kernel.log").write_text(text + "\n")
        self.command("journalctl", f"cat '{self.bin}/kernel.log'")

    def gpus(self, **state):
        self.state.write_text(json.dumps(state))

    def run(self, phase, check=False, **settings):
        phases = {name: functools.partial(f, fact=str(self.fact)) for name, f in module.PHASES.items()}
        return carry_out(phases, phase, {**WANT, **settings}, check)


@pytest.fixture
def node(tmp_path, monkeypatch):
    node = Node(tmp_path)
    monkeypatch.setenv("PATH", f"{node.bin}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("NVIDIA_SMI_STATE", str(node.state))
    return node


def told(answer):
    """{what: (expected, found)} of an answer's problems."""
    return {p["what"]: (p["expected"], p["found"]) for p in answer.problems}


def test_a_healthy_node_passes_without_a_word(node):
    answer = node.run("validate")
    assert answer.ok and not answer.changed and not answer.warnings
    assert answer.msg == "8 × NVIDIA H200, driver 570.124.06, CUDA 12.8"
    assert answer.facts["versions"]["vbios"] == "96.00.BC.00.01"


def test_everything_wrong_is_told_at_once_with_what_was_expected_and_found(node):
    node.gpus(
        driver="535.161.08",
        cuda="12.2",
        missing=[3],
        all={"ECC Mode/Current": "Disabled"},
        gpus={"1": {"PCI/GPU Link Info/Link Width/Current": "8x", "Persistence Mode": "Disabled"}},
    )
    assert told(node.run("validate")) == {
        "driver": ("at least 560", "535.161.08"),
        "CUDA": ("at least 12.5", "12.2"),
        "GPUs": ("8", "7"),
        "ECC mode of all 7 GPUs": ("Enabled", "Disabled"),
        "PCIe width of GPU 0000:43:00.0": ("x16", "x8"),
        "persistence mode of GPU 0000:43:00.0": ("Enabled", "Disabled"),
    }


def test_an_idle_gpu_may_lower_its_pcie_generation_and_a_busy_one_may_not(node):
    slow = {"PCI/GPU Link Info/PCIe Generation/Current": "1"}
    node.gpus(gpus={"0": slow})
    assert node.run("validate").ok
    node.gpus(gpus={"0": {**slow, "Utilization/GPU": "97 %"}})
    assert told(node.run("validate")) == {"PCIe generation under load of GPU 0000:1b:00.0": ("5", "1")}


def test_a_platform_that_limits_pcie_is_told_and_stops_nobody(node):
    node.gpus(all={"PCI/GPU Link Info/PCIe Generation/Max": "4", "PCI/GPU Link Info/PCIe Generation/Current": "4"})
    answer = node.run("validate")
    assert answer.ok
    assert answer.warnings == ["the platform limits PCIe to generation 4 of 5: all 8 GPUs"]


def test_uncorrectable_errors_are_counted_by_kind(node):
    node.gpus(gpus={"2": {"ECC Errors/Volatile/DRAM Uncorrectable": 2, "ECC Errors/Volatile/SRAM Correctable": 9}})
    assert told(node.run("validate")) == {"uncorrectable ECC errors of GPU 0000:52:00.0": ("0", "2 DRAM Uncorrectable")}


def test_nvlinks_that_are_down_or_slow_are_named(node):
    node.gpus(gpus={"0": {"NVLink/Link 3": "<inactive>"}, "1": {"NVLink/Link 17": "13.281 GB/s"}})
    assert told(node.run("validate")) == {
        "NVLink of GPU 0000:1b:00.0": ("18 links up", "17 (inactive: 3)"),
        "NVLink rate of GPU 0000:43:00.0": ("at least 25 GB/s", "13.281 on link 17"),
    }


def test_links_beyond_those_that_must_be_up_may_be_unused(node):
    node.gpus(all={f"NVLink/Link {link}": "<inactive>" for link in range(12, 18)})
    assert node.run("validate", nvlinks=12).ok
    assert told(node.run("validate")) == {
        "NVLink of all 8 GPUs": ("18 links up", "12 (inactive: 12, 13, 14, 15, 16, 17)")
    }


def test_all_nvlinks_down_is_said_once_by_nvidia_smi(nvlinks, healthy):
    header = nvlinks.splitlines()[0]
    text = f"{header}\nNVML: Unable to retrieve NVLink information as all links are inActive\n"
    findings = module.Findings(8)
    module.judge_nvlink(nvidia.parse_query(healthy).gpus[:1], nvidia.parse_nvlink(text), WANT, findings)
    assert [found for _, _, found, _ in findings.problems()] == ["0 (inactive: all)"]


@pytest.mark.parametrize("name", ["driver_min", "cuda_min", "toolkit_min"])
def test_a_least_version_that_is_none_is_refused(node, name):
    assert told(node.run("validate", **{name: "newest"})) == {
        f"cuda_check_{name}": ("a version, such as 12.5, or nothing", "newest")
    }


def test_without_nvlinks_to_expect_nobody_asks_for_them(node):
    node.gpus(all={"NVLink/Link 0": "<inactive>"})
    assert node.run("validate", nvlinks=0).ok


def test_a_gpu_without_nvswitch_needs_no_fabric_manager(node):
    node.gpus(all={"Fabric/State": "N/A", "Fabric/Status": "N/A"})
    node.command("systemctl", "echo LoadState=not-found; echo ActiveState=inactive")
    assert node.run("validate").ok


@pytest.mark.parametrize(
    ("said", "found"), [("loaded ActiveState=failed", "failed"), ("masked ActiveState=inactive", "masked")]
)
def test_a_fabric_manager_that_does_not_run_is_told(node, said, found):
    node.command("systemctl", f"printf 'LoadState=%s\\n%s\\n' {said}")
    assert told(node.run("validate")) == {"nvidia-fabricmanager": ("active", found)}


def test_a_fabric_that_is_up_without_a_local_manager_is_a_virtual_machines(node):
    node.command("systemctl", "echo LoadState=not-found; echo ActiveState=inactive")
    answer = node.run("validate")
    assert answer.ok and "it runs elsewhere" in answer.warnings[0]


# --- nvidia-smi that does not work ---


def test_a_hung_nvidia_smi_is_one_problem_with_the_xid_that_explains_it(node):
    node.gpus(hang_s=30)
    node.kernel_says(
        "kernel: NVRM: Xid (PCI:0000:9b:00): 119, pid=7, name=nvidia-smi, Timeout after 6s of waiting for RPC"
    )
    answer = node.run("validate", answer_s=0.3)
    assert told(answer) == {
        "Xid 119": ("none in the last 24 h", "1 on GPU 0000:9b:00.0: Timeout after 6s of waiting for RPC"),
        "nvidia-smi": ("an answer within 0.3 s", "no answer"),
    }


@pytest.mark.parametrize(
    ("state", "status", "remedy"),
    [({"loaded": False}, 9, "modprobe"), ({"mismatch": True}, 18, "reboot"), ({"lost": [3]}, 15, "reboot")],
)
def test_a_failing_nvidia_smi_is_told_with_what_to_do(node, state, status, remedy):
    node.gpus(**state)
    (problem,) = node.run("validate").problems
    assert problem["found"].startswith(f"status {status}: ") and remedy in problem["remedy"]


def test_a_node_without_nvidia_smi_is_told_once(node):
    (node.bin / "nvidia-smi").unlink()
    assert told(node.run("validate")) == {"nvidia-smi": ("the driver's tools", "nvidia-smi: not found")}


def test_an_answer_that_is_no_report_stops(node):
    (node.bin / "nvidia-smi").unlink()
    node.command("nvidia-smi", "echo hello")
    assert told(node.run("validate")) == {"nvidia-smi -q": ("a report", "6 characters without one")}


def test_before_its_package_is_installed_a_missing_driver_stops_nobody(node):
    (node.bin / "nvidia-smi").unlink()
    assert node.run("validate", driver_package="nvidia-open-570").ok
    assert node.run("configure", check=True, driver_package="nvidia-open-570").ok
    assert not node.run("configure", driver_package="nvidia-open-570").ok


def test_an_old_driver_that_install_will_replace_stops_nobody(node):
    node.gpus(driver="550.54.15")
    assert node.run("validate", driver_package="nvidia-open-570").ok
    assert not node.run("verify", driver_package="nvidia-open-570").ok


# --- the toolkit ---


@pytest.mark.parametrize(("least", "ok"), [("12.4", True), ("12.8", True), ("13.0", False)])
def test_the_toolkit_is_asked_for_its_version(node, least, ok):
    (node.bin.parent / "bin" / "nvcc").touch()
    node.command("nvcc", "echo 'Cuda compilation tools, release 12.8, V12.8.93'")
    answer = node.run("validate", toolkit_min=least, cuda_home=str(node.bin.parent))
    assert answer.ok == ok and answer.facts["toolkit"] == "12.8"


def test_a_toolkit_that_is_not_there_is_told(node):
    assert told(node.run("validate", toolkit_min="12.4")) == {
        "CUDA toolkit": ("at least 12.4", "/nowhere/bin/nvcc: not found")
    }


# --- the kernel log ---


def xid(number, pci="0000:3b:00", text="pid=1, name=python3, Something"):
    return f"kernel: NVRM: Xid (PCI:{pci}): {number}, {text}"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(54, "isolate"), (79, "reboot"), (74, "NVLink"),
     *((n, "reset the GPU") for n in (48, 64, 95, 109, 110, 119, 120, 136, 140, 143))],
)  # fmt: skip
def test_an_xid_that_needs_hands_is_a_problem_with_the_action(number, remedy):
    (problem,), warnings = module.judge_xids(xids.parse(xid(number)), 24.0)
    assert problem[:3] == (f"Xid {number}", "none in the last 24 h", "1 on GPU 0000:3b:00.0: Something")
    assert remedy in problem[3] and warnings == []


@pytest.mark.parametrize("number", [13, 31, 43, 63, 92, 94, 121, 126])
def test_an_xid_to_monitor_is_a_warning(number):
    problems, (warning,) = module.judge_xids(xids.parse(xid(number)), 24.0)
    assert problems == [] and "watch it" in warning


def test_an_unknown_xid_is_a_warning_that_says_so():
    problems, (warning,) = module.judge_xids(xids.parse(xid(999)), 24.0)
    assert problems == [] and "no action is known" in warning


def test_the_kernel_log_is_judged_with_the_gpus(node):
    node.gpus(missing=[3])
    node.kernel_says("\n".join([xid(79), xid(79), xid(63)]))
    answer = node.run("validate")
    assert list(told(answer)) == ["Xid 79", "GPUs"] and answer.problems[0]["found"].startswith("2 on GPU 0000:3b:00.0")
    assert answer.warnings == ["Xid 63 in the last 24 h: 1 on GPU 0000:3b:00.0: Something (watch it)"]


def test_nobody_reads_the_kernel_log_for_0_hours(node):
    node.kernel_says(xid(79))
    assert node.run("validate", xid_hours=0).ok


def test_an_empty_journal_is_not_taken_for_a_healthy_one(node):
    node.command("journalctl", "exit 0")
    answer = node.run("validate")
    assert answer.ok
    assert answer.warnings == ["unknown: Xids (dmesg: read kernel buffer failed: Operation not permitted)"]


def test_without_a_journal_the_ring_buffer_is_read_as_far_back_as_asked(node):
    (node.bin / "journalctl").write_text("#!/bin/sh\nexit 1\n")
    now = datetime.datetime.now(datetime.UTC)
    lines = [f"{(now - datetime.timedelta(hours=h)):%Y-%m-%dT%H:%M:%S},123456+00:00 {xid(79)}" for h in (2, 30)]
    node.command("dmesg", f"echo '{lines[0]}'; echo '{lines[1]}'")
    assert told(node.run("validate"))["Xid 79"][1].startswith("1 on")
    assert node.run("validate", xid_hours=1).ok


# --- facts and drift ---


def test_configure_publishes_the_fact_once_and_check_mode_only_shows_it(node):
    answer = node.run("configure", check=True)
    assert answer.changed and answer.diff and not node.fact.exists()
    assert node.run("configure").changed
    assert not node.run("configure").changed
    fact = json.loads(node.fact.read_text())
    assert (fact["driver"], fact["cuda"], fact["compute_capability"], fact["nvlink_links"]) == (
        "570.124.06", "12.8", "9.0", 18,
    )  # fmt: skip
    assert fact["gpus"][7] == {
        "index": 7,
        "memory_mib": 143771,
        "name": "NVIDIA H200",
        "pci_bus_id": "0000:df:00.0",
        "uuid": fact["gpus"][7]["uuid"],
        "vbios": "96.00.BC.00.01",
    }
    assert node.fact.stat().st_mode & 0o777 == 0o644


def test_a_cut_report_is_not_published(node):
    node.gpus(truncate=9000)
    assert told(node.run("configure")) == {"GPUs in nvidia-smi -q": ("8", "2")}
    assert not node.fact.exists()


def test_verify_reports_what_changed_since_the_fact_was_published(node):
    node.run("configure")
    assert node.run("verify").ok
    node.gpus(driver="575.57.08", gpus={"2": {"VBIOS Version": "96.00.BC.00.02"}})
    assert told(node.run("verify")) == {
        "cuda.fact: driver": ("570.124.06", "575.57.08"),
        "cuda.fact: vbios of GPU 0000:52:00.0": ("96.00.BC.00.01", "96.00.BC.00.02"),
    }


def test_a_gpu_that_is_gone_is_named_by_its_address(node):
    node.run("configure")
    node.gpus(missing=[3])
    assert told(node.run("verify")) == {"GPUs": ("8", "7 (gone: 0000:61:00.0)")}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gpus": 7}', '{"gpus": [1, {}, {"pci_bus_id": []}]}'])
def test_a_damaged_fact_is_drift_and_no_crash(node, text):
    node.fact.write_text(text)
    answer = node.run("verify")
    assert not answer.ok and all(what.startswith("cuda.fact: ") for what in told(answer))
    node.gpus(missing=[3])
    assert told(node.run("validate")) == {"GPUs": ("8", "7")}


def test_without_a_number_there_must_be_as_many_gpus_as_were_published(node):
    assert node.run("configure", gpus=0).ok and node.run("verify", gpus=0).ok
    node.gpus(missing=[3])
    assert told(node.run("verify", gpus=0)) == {"GPUs": ("at least 8", "7 (gone: 0000:61:00.0)")}
    node.gpus(count=9)
    assert "GPUs" not in told(node.run("validate", gpus=0))


@pytest.mark.parametrize("phase", module.PHASES)
def test_a_machine_that_needs_no_gpu_and_has_none_has_nothing_to_check(node, phase, monkeypatch):
    monkeypatch.setattr(module, "is_there", lambda phase: False)
    answer = node.run(phase, required=False, gpus=0)
    assert answer.ok and answer.off == answer.msg == "no NVIDIA GPU here" and not answer.changed
    monkeypatch.setattr(module, "is_there", lambda phase: True)
    (node.bin / "nvidia-smi").unlink()
    assert told(node.run(phase, required=False, gpus=0))["nvidia-smi"][0] == "the driver's tools"


@pytest.mark.parametrize(
    ("devices", "smi", "there"),
    [
        ({"01:00.0": ("0x030000", "0x10de")}, "", True),  # with no driver yet
        ({"00:02.0": ("0x030000", "0x8086"), "01:00.1": ("0x040300", "0x10de")}, "", False),  # its sound only
        ({"1b:00.0": ("0x030200", "0x10de")}, "", True),  # without a display
        ({"01:00.0": ("0x068000", "0x10de")}, "", False),  # an NVSwitch
        ({}, "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)", True),  # WSL
        ({}, "No devices were found", False),
        ({}, None, False),
    ],
)
def test_a_gpu_is_there_as_the_bus_or_the_driver_says(node, tmp_path, devices, smi, there):
    for address, (kind, vendor) in devices.items():
        folder = tmp_path / "sys/bus/pci/devices" / f"0000:{address}"
        folder.mkdir(parents=True)
        (folder / "class").write_text(f"{kind}\n")
        (folder / "vendor").write_text(f"{vendor}\n")
    (node.bin / "nvidia-smi").unlink()
    if smi is not None:
        node.command("nvidia-smi", f"echo '{smi}'")
    found = []
    carry_out({"verify": lambda phase: found.append(nvidia.is_there(phase, str(tmp_path)))}, "verify", {})
    assert found == [there]


def test_without_a_fact_verify_says_what_to_run(node):
    assert node.run("verify", published=False).ok
    assert told(node.run("verify")) == {str(node.fact): ("a published fact", "none")}


def test_persistence_mode_is_set_only_when_asked(node):
    node.gpus(gpus={"1": {"Persistence Mode": "Disabled"}})
    assert not node.run("validate").ok
    assert node.run("validate", set_persistence=True).ok
    checked = node.run("configure", check=True, set_persistence=True)
    assert next(d["before_header"] for d in checked.diff) == "persistence mode of GPU 0000:43:00.0"
    assert not node.run("validate").ok
    if os.geteuid() == 0:
        assert node.run("configure", set_persistence=True).changed
        assert node.run("verify", set_persistence=True).ok
        assert not node.run("configure", set_persistence=True).changed


# --- the readers, on what real tools printed ---


def capture(path):
    return (CAPTURED / path).read_text(errors="replace")


OLD = {"driver_min": "", "cuda_min": "", "gpu_model": ""}


@captured
@pytest.mark.parametrize("name", ["h200x1-590-q-load", "h100x1-590-q-idle"])
def test_real_healthy_gpus_pass_idle_and_under_load(name):
    problems, warnings = judge(capture(f"nvidia-smi/{name}.txt"), gpus=1, gpu_model="")
    assert (problems, warnings) == ({}, [])


@captured
def test_a_real_power_brake_is_the_only_fault_of_eight_gpus():
    problems, warnings = judge(capture("nvidia-smi/h100x8-535.161-q-hw-slowdown-active.txt"), **OLD)
    assert problems == {"clocks: HW Power Brake Slowdown of all 8 GPUs": ("Not Active", "Active")}
    assert warnings == []


@captured
def test_a_real_old_driver_is_refused_with_its_versions():
    problems, _ = judge(capture("nvidia-smi/h100x8-535.161-q-hw-slowdown-active.txt"), gpu_model="H100")
    assert problems["driver"] == ("at least 560", "535.161.08")
    assert problems["CUDA"] == ("at least 12.5", "12.2")


@captured
def test_real_pending_row_remaps_are_found():
    what = "pending row remap or page retirement of GPU"
    problems, warnings = judge(capture("nvidia-smi/a10x1-535-q-remap-pending.txt"), **OLD, gpus=1)
    assert problems == {f"{what} 0000:07:00.0": ("No", "Yes")}
    assert warnings == []
    problems, _ = judge(capture("nvidia-smi/a100x8-510-q-ecc-correctable-remap-pending.txt"), **OLD)
    assert problems == {f"{what} 0000:10:1c.0": ("No", "Yes")}


@captured
def test_real_retired_pages_are_found_where_they_are():
    assert judge(capture("nvidia-smi/a100x8-535-q-retired-pages-good.txt"), **OLD)[0] == {}
    problems, _ = judge(capture("nvidia-smi/a100x8-535-q-retired-pages-bad.txt"), **OLD)
    pending = ", ".join(f"000{n}:00:00.0" for n in (2, 4, 6, 8))
    assert problems.pop(f"pending row remap or page retirement of GPUs {pending}") == ("No", "Yes")
    assert {what: found for what, (_, found) in problems.items()} == {
        "retired pages of GPUs 0001:00:00.0, 0006:00:00.0": "65",
        "retired pages of GPU 0008:00:00.0": "64",
    }


@captured
def test_a_real_sram_error_is_found_in_a_fragment():
    text = (
        "GPU 00000000:01:00.0\n    "
        + capture("nvidia-smi/a100-q-sram-uncorrectable-fragment.txt").replace("\n", "\n    ")
        + "\n"
    )
    assert judge(text, **OLD)[0] == {"uncorrectable ECC errors of GPU 0000:01:00.0": ("0", "1 SRAM Uncorrectable")}


@captured
def test_a_real_cut_report_alarms_nobody_and_passes_nobody():
    problems, warnings = judge(capture("nvidia-smi/h100x8-535-q-truncated-Invalid-keys.txt"), **OLD)
    assert problems == {}
    assert "nvidia-smi -q lists 1 of 8 GPUs: the others are unknown" in warnings
    assert any("clocks: HW Slowdown" in warning and "ECC mode" in warning for warning in warnings)


@captured
@pytest.mark.parametrize("path", ["rtx2080-465-q-and-csv-console", "h100x8-550-table-idle", "rtx-525-table-fan-ERR"])
def test_another_output_is_not_taken_for_a_report(path):
    said = nvidia.parse_query(capture(f"nvidia-smi/{path}.txt"))
    assert (said.driver, said.gpus, said.attached) == ("", [], None)


@captured
@pytest.mark.parametrize(
    ("name", "gpus", "links", "rate"),
    [("a100x8-nvlink-s", 8, 12, 25.0), ("a100-nvlink-s-one-gpu", 1, 12, 25.0), ("h200x1-590-nvlink-s", 1, 18, 26.562)],
)
def test_real_nvlinks_are_read(name, gpus, links, rate):
    read = nvidia.parse_nvlink(capture(f"nvidia-smi/{name}.txt") + "\n")
    assert [list(rates.values()) for rates in read.values()] == [[rate] * links] * gpus


@captured
@pytest.mark.parametrize(
    ("name", "problems", "warnings"),
    [
        ("kmsg-raw-healthy", [], []),
        ("kmsg-raw-peermem-invalid-context", [], []),
        ("nccl-segfault-decode-iso", [], []),
        ("pcie-limited-by-gen4-switch", [], []),
        ("pstore-erst-panic", [], []),
        ("ib-lost-carrier-syslog", [], []),
        ("fabricmanager-h100-healthy", [], []),
        ("xid119-gsp-timeout-h100-dmesgT", ["Xid 119: 5 on GPU 0000:9b:00.0"], []),
        ("xid13-43-and-oom-decode-iso", [], ["Xid 13", "Xid 43"]),
        ("xid48-63-94-iso-with-peermem-noise", ["Xid 48: 1 on GPU 0000:19:00.0"], ["Xid 63", "Xid 94"]),
        (
            "sxid20034-ltssm-h100",
            [
                "Xid 79: 1 on GPU 0000:91:00.0",
                *(f"SXid 20034: {n} on NVSwitch 0000:0{b}:00.0" for b, n in ((6, 1), (5, 2), (7, 1))),
            ],
            [],
        ),
        (
            "xid145-149-nvlink5-nonfatal-mix",
            [f"Xid 149: {n} on GPU {pci}:01:00.0" for pci, n in (("0018", 6), ("0008", 4), ("0019", 2))],
            ["Xid 145"] * 3,
        ),
    ],
)
def test_real_kernel_logs_get_their_verdict(name, problems, warnings):
    found, warned = module.judge_xids(xids.parse(capture(f"kernel/{name}.txt")), 24)
    assert sorted(f"{what}: {text.partition(': ')[0]}" for what, _, text, _ in found) == sorted(problems)
    assert sorted(" ".join(text.split()[:2]) for text in warned) == sorted(warnings)


# --- the readers, on anything ---


@given(st.data())
def test_a_healthy_report_that_is_cut_anywhere_alarms_nobody(healthy, data):
    cut = data.draw(st.integers(0, len(healthy)))
    problems, warnings = judge(healthy[:cut])
    assert problems == {}
    if cut < healthy.rindex("Fabric"):  # nothing behind it is judged
        assert warnings


@given(st.data())
def test_a_list_of_nvlinks_that_is_cut_anywhere_alarms_nobody(healthy, nvlinks, data):
    gpus = nvidia.parse_query(healthy).gpus
    findings = module.Findings(8)
    cut = data.draw(st.integers(0, len(nvlinks)))
    module.judge_nvlink(gpus, nvidia.parse_nvlink(nvlinks[:cut]), WANT, findings)
    assert findings.problems() == []
    assert findings.warnings() or cut == len(nvlinks)


@given(
    st.text()
    | st.lists(
        st.sampled_from(
            [
                "GPU 00000000:1B:00.0",
                "    ECC Mode",
                "        Current : ERR!",
                " :",
                ":",
                "    : :",
                "Attached GPUs : x",
            ]
        )
    ).map("\n".join)
)
def test_the_readers_take_any_text(text):
    nvidia.parse_query(text)
    nvidia.parse_nvlink(text)
    xids.parse(text)
    judge(text)


def test_a_gpu_that_is_listed_twice_counts_once(healthy):
    one = healthy[healthy.index("GPU 00000000:1B") : healthy.index("GPU 00000000:43")]
    text = healthy.replace(healthy[healthy.index("GPU 00000000:DF") :], one)
    problems, warnings = judge(text)
    assert problems == {"GPUs": ("8", "7")}
    assert warnings == ["nvidia-smi -q lists GPU 0000:1b:00.0 twice: counted once"]


def test_drivers_before_535_name_the_clocks_section_otherwise(healthy):
    text = healthy.replace("Clocks Event Reasons", "Clocks Throttle Reasons")
    assert judge(text) == ({}, [])
    text = text.replace(
        "SW Thermal Slowdown               : Not Active", "SW Thermal Slowdown               : Active", 1
    )
    assert list(judge(text)[0]) == ["clocks: SW Thermal Slowdown of GPU 0000:1b:00.0"]


def test_gpus_before_turing_count_double_bit_errors():
    text = """GPU 00000000:01:00.0
    Ecc Mode
    ECC Errors
        Volatile
            Single Bit
                Device Memory : 4
                Total         : 4
            Double Bit
                Device Memory : 1
                Register File : N/A
                Total         : 1
"""
    assert judge(text)[0] == {"uncorrectable ECC errors of GPU 0000:01:00.0": ("0", "1 Double Bit/Device Memory")}


# --- the versions of all nodes ---


def _versions():
    path = ROOT / "roles" / "cuda_check" / "action_plugins" / "cuda_check_versions.py"
    spec = importlib.util.spec_from_file_location("cuda_check_versions", path)
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    return plugin


compare = _versions().compare


def drivers(*versions):
    return {f"node{number:03}": {"driver": version} for number, version in enumerate(versions, 1)}


def test_the_node_that_differs_from_the_majority_is_the_one_to_blame():
    problems, warnings = compare(drivers("570", "570", "560", "570"), ["driver"])
    assert list(problems) == ["node003"] and warnings == []
    (problem,) = problems["node003"]
    assert (problem["expected"], problem["found"]) == ("570 as on node[001-002,004]", "560")


def test_without_a_majority_nobody_is_blamed():
    problems, warnings = compare(drivers("570", "570", "560", "560"), ["driver"])
    assert problems == {}
    assert warnings == [
        "versions of driver differ, not identifiable which nodes are wrong: 560 on node[003-004]; 570 on node[001-002]"
    ]


def test_unknown_versions_have_no_vote_and_no_blame():
    assert compare(drivers("570", "", "", "570"), ["driver"]) == ({}, [])
    assert list(compare(drivers("570", "", "560", "570"), ["driver"])[0]) == ["node003"]


@given(st.lists(st.sampled_from(["560", "570", "580", ""]), max_size=9))
def test_blame_needs_more_than_half_of_those_who_answered(versions):
    problems, warnings = compare(drivers(*versions), ["driver"])
    known = [version for version in versions if version]
    most = max(map(known.count, known), default=0)
    assert bool(problems) == (most < len(known) < 2 * most)
    assert bool(warnings) == (len(set(known)) > 1 and not problems)


def test_the_mode_of_the_fact_is_named_by_verify_and_put_right_by_configure(node):
    node.run("configure")
    node.fact.chmod(0o755)  # Ansible would execute it
    assert told(node.run("verify"))[str(node.fact)] == ("mode 0644", "mode 0755")
    assert node.run("configure").changed and node.run("verify").ok
