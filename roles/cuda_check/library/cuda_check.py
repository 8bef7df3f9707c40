#!/usr/bin/python
"""Checks driver, CUDA and GPUs of a node, and publishes the values found as cuda.fact.

Nearly everything comes from one `nvidia-smi -q`. Each check has one of three results: as expected (no output), not as
expected (a problem), or unknown (a warning: neither passed nor failed).
"""

from __future__ import annotations

import json
import re
import typing

from ansible.module_utils import xids as kernel_xids
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.nvidia import (
    CUDA_FACT,
    NO_VALUE,
    is_there,
    kernel_log,
    parse_nvlink,
    parse_query,
    query,
    version,
)
from ansible.module_utils.phase import Off, Stop, counted, main, read

REPLACE = "replace the GPU; NVIDIA's field diagnostic decides on the RMA"
SETUP = "run `runner setup --tags cuda_check`"
LATER = "{}: expected {}, found {}; install comes next"

# The remedies for nvidia-smi's return codes. Source: its man page, RETURN VALUE.
REMEDIES = {
    6: "check whether the PCI bus shows them: lspci -d 10de:",
    9: "install the driver and load its kernel module: modprobe nvidia; see dmesg",
    12: "install the driver's NVML library (libnvidia-ml.so)",
    14: "the GPU's InfoROM is corrupted: replace the GPU",
    15: "a GPU fell off the bus: reboot the node, see the kernel log for Xid 79",
    18: "driver and library have different versions: reboot, or reload the kernel modules",
}

CLOCKS = ("Clocks Event Reasons", "Clocks Throttle Reasons")  # the second before driver 535
PAGES_MAX = 64  # page retirements that a GPU before Ampere has room for; NVIDIA GPU Memory Error Management


class Flag(typing.NamedTuple):
    """A field with few values: `paths` in order of preference, `good` and `bad` values; `all`: every GPU has it."""

    what: str
    paths: tuple
    good: str
    bad: tuple
    remedy: str
    all: bool = True


def clocks(name, remedy):
    """The Flag of the clock event reason `name`."""
    paths = tuple(f"{section}/{middle}{name}" for section in CLOCKS for middle in ("HW Slowdown/", ""))
    return Flag(f"clocks: {name}", paths, "Not Active", ("Active",), remedy)


PENDING = ("Remapped Rows/Pending", "Retired Pages/Pending Page Blacklist", "Retired Pages/Pending")
RECOVERY = ("Reset", "GPU Reset", "Reboot", "Node Reboot", "Drain P2P", "Drain and Reset")
FLAGS = (
    Flag("pending row remap or page retirement", PENDING, "No", ("Yes",), kernel_xids.RESET),
    Flag("row remap failure", ("Remapped Rows/Remapping Failure Occurred",), "No", ("Yes",), REPLACE, False),
    Flag("SRAM threshold exceeded", ("ECC Errors/Aggregate/SRAM Threshold Exceeded",), "No", ("Yes",), REPLACE, False),
    Flag("unrepairable memory", ("ECC Errors/Unrepairable Memory",), "No", ("Yes",), REPLACE, False),
    Flag("reset required", ("GPU Reset Status/Reset Required",), "No", ("Yes",), kernel_xids.RESET, False),
    Flag("recovery action", ("GPU Recovery Action",), "None", RECOVERY, "drain the node, then perform it", False),
    Flag("fabric health", ("Fabric/Health/Summary",), "Healthy", ("Unhealthy",), "see the fabric manager's log", False),
    clocks("HW Thermal Slowdown", "look at the node's cooling"),
    clocks("HW Power Brake Slowdown", "look at the node's power supplies and power capping"),
    clocks("SW Thermal Slowdown", "look at the node's cooling"),
)
ECC = Flag("ECC mode", ("ECC Mode/Current",), "Enabled", ("Disabled",), "nvidia-smi -e 1, then reset the GPU")
PERSISTENCE = Flag(
    "persistence mode",
    ("Persistence Mode",),
    "Enabled",
    ("Disabled",),
    "systemctl enable --now nvidia-persistenced, or set cuda_check_set_persistence",
)


class Findings:
    """The findings of the checks, by GPU (`total` of them); equal findings of several GPUs are reported once."""

    def __init__(self, total):
        self.total, self.bad, self.unreadable, self.notes = total, {}, {}, {}

    def problem(self, gpu, what, expected, found, remedy):
        """Record a problem of `gpu`."""
        self.bad.setdefault((what, str(expected), str(found), remedy), []).append(gpu.pci)

    def unknown(self, gpu, what, instead):
        """Record that `what` could not be read of `gpu`, which has the text `instead`."""
        self.unreadable.setdefault((what, instead), []).append(gpu.pci)

    def note(self, gpu, text):
        """Record a warning about `gpu`."""
        self.notes.setdefault(text, []).append(gpu.pci)

    def problems(self):
        """[(what, expected, found, remedy)] of the problems, with their GPUs in `what`."""
        return [(f"{what} of {self.where(pcis)}", *rest) for (what, *rest), pcis in self.bad.items()]

    def warnings(self):
        """One line per set of GPUs and reason with all checks that are unknown there, then the other warnings."""
        lines = {}
        for (what, instead), pcis in self.unreadable.items():
            lines.setdefault((self.where(pcis), instead), []).append(what)
        unknown = [f"unknown on {where}: {', '.join(whats)} ({instead})" for (where, instead), whats in lines.items()]
        return [*unknown, *(f"{text}: {self.where(pcis)}" for text, pcis in self.notes.items())]

    def where(self, pcis):
        """The GPUs with the PCI addresses `pcis`, as text."""
        if len(pcis) == self.total > 1:
            return f"all {self.total} GPUs"
        return f"GPU{'s' if len(pcis) > 1 else ''} {', '.join(pcis)}"


# --- checks of one GPU; `want` are the role's settings ---


def judge_gpu(gpu, want, findings):
    """Run all checks of one GPU; `findings` (Findings) receives the results."""
    name, instead = gpu.get("Product Name")
    if name is None:
        findings.unknown(gpu, "model", instead)
    elif want["gpu_model"] and not re.search(rf"\b{re.escape(want['gpu_model'])}\b", name, re.IGNORECASE):
        findings.problem(gpu, "model", want["gpu_model"], name, "correct cuda_check_gpu_model or the inventory")
    flags = [flag for flag, enabled in ((ECC, want["ecc"]), (PERSISTENCE, want["persistence"])) if enabled]
    for flag in (*flags, *FLAGS):
        judge_flag(gpu, flag, findings)
    judge_slowdown(gpu, findings)
    judge_errors(gpu, findings)
    judge_pages(gpu, findings)
    judge_pcie(gpu, findings)
    judge_fabric(gpu, want, findings)


def judge_flag(gpu, flag, findings):
    """Check one Flag: a bad value is a problem, a missing or another one is unknown."""
    value, instead = gpu.get(*flag.paths)
    if value in flag.bad:
        findings.problem(gpu, flag.what, flag.good, value, flag.remedy)
    elif value != flag.good and (flag.all or instead not in ("missing", "N/A")):
        findings.unknown(gpu, flag.what, value or instead)


def judge_slowdown(gpu, findings):
    """Check HW Slowdown, unless one of the more specific reasons below it is active and reported instead."""
    paths = tuple(f"{section}/HW Slowdown" for section in CLOCKS)
    reasons = ("HW Thermal Slowdown", "HW Power Brake Slowdown")
    if "Active" not in [gpu.get(*(f"{path}/{name}" for path in paths))[0] for name in reasons]:
        judge_flag(gpu, clocks("HW Slowdown", "look at the node's power and cooling"), findings)


def judge_errors(gpu, findings):
    """Check for uncorrectable ECC errors since the driver was loaded ("Double Bit" on GPUs before Turing)."""
    mode, instead = gpu.get("ECC Mode/Current")
    if mode == "Disabled" or instead == "N/A":
        return
    counts, unreadable = {}, ""
    for path in gpu.fields:
        if not path.startswith("ECC Errors/Volatile/") or not re.search("Uncorrectable|Double Bit", path):
            continue
        count, instead = gpu.number(path)
        if count is not None:
            counts[path.split("/", 2)[2]] = count
        elif instead != "N/A":
            unreadable = instead
    counts.pop("Double Bit/Total", None)
    nonzero = [f"{count} {name}" for name, count in counts.items() if count]
    if nonzero:
        remedy = f"{kernel_xids.RESET}; if they return, {REPLACE}"
        findings.problem(gpu, "uncorrectable ECC errors", 0, ", ".join(nonzero), remedy)
    elif unreadable or not counts:
        findings.unknown(gpu, "uncorrectable ECC errors", unreadable or "missing")


def judge_pages(gpu, findings):
    """Check that fewer than PAGES_MAX pages are retired."""
    counts = [gpu.number(f"Retired Pages/{kind} Bit ECC")[0] for kind in ("Single", "Double")]
    if sum(count or 0 for count in counts) >= PAGES_MAX:
        findings.problem(gpu, "retired pages", f"fewer than {PAGES_MAX}", sum(count or 0 for count in counts), REPLACE)


def judge_pcie(gpu, findings):
    """Check the PCIe width, and the generation under load only, since an idle GPU lowers it to save power."""
    link = "PCI/GPU Link Info"
    now, instead = gpu.number(f"{link}/Link Width/Current")
    most, instead_most = gpu.number(f"{link}/Link Width/Max")
    if now is None or most is None:
        findings.unknown(gpu, "PCIe width", instead or instead_most)
    elif now < most:
        findings.problem(gpu, "PCIe width", f"x{most}", f"x{now}", "reseat or replace the GPU's board or riser")
    now, _ = gpu.number(f"{link}/PCIe Generation/Current")
    most, instead = gpu.number(f"{link}/PCIe Generation/Max")
    device, _ = gpu.number(f"{link}/PCIe Generation/Device Max")
    busy, _ = gpu.number("Utilization/GPU", "Utilization/Gpu")
    if most is None:
        findings.unknown(gpu, "PCIe generation", instead)
    elif now is not None and now < most and busy:
        findings.problem(gpu, "PCIe generation under load", most, now, "look for PCIe errors in the kernel log (AER)")
    if most and device and most < device:
        findings.note(gpu, f"the platform limits PCIe to generation {most} of {device}")


def judge_fabric(gpu, want, findings):
    """Check the NVSwitch fabric. "N/A" is a GPU without one; an old driver does not report it."""
    state, instead = gpu.get("Fabric/State")
    status, instead_status = gpu.get("Fabric/Status")
    remedy = "see systemctl status nvidia-fabricmanager and its log; its version must be the driver's"
    if state in ("Not Started", "In Progress"):
        findings.problem(gpu, "fabric", "Completed", state, remedy)
    elif state == "Completed" and status not in ("Success", None):
        findings.problem(gpu, "fabric", "Success", status, remedy)
    elif state == "Completed" and status is None:
        findings.unknown(gpu, "fabric", instead_status)
    elif state != "Completed" and instead != "N/A" and want["nvlinks"]:
        findings.unknown(gpu, "fabric", state or instead)


def judge_nvlink(gpus, links, want, findings):
    """Check the NVLinks of `gpus`; `links` is the result of parse_nvlink.

    The list of the last GPU may be truncated: missing links there are unknown.
    """
    last = list(links)[-1] if links else None
    for gpu in gpus:
        uuid = gpu.get("GPU UUID")[0]
        rates = links.get(uuid)
        if not rates:
            findings.unknown(gpu, "NVLink", "not listed by nvidia-smi nvlink -s")
            continue
        up = [link for link, rate in rates.items() if rate != 0]
        down = [link for link, rate in rates.items() if rate == 0]
        remedy = "look for Xid 74 and SXids in the kernel log, restart the fabric manager, reset the GPUs"
        if len(up) < want["nvlinks"]:
            if uuid == last and not down:
                findings.unknown(gpu, "NVLink", f"{len(up)} of {counted(want['nvlinks'], 'link')} listed")
            else:
                names = f" (inactive: {', '.join(map(str, down)) if up else 'all'})" if down else ""
                findings.problem(gpu, "NVLink", f"{counted(want['nvlinks'], 'link')} up", f"{len(up)}{names}", remedy)
        slow = {link: rate for link, rate in rates.items() if rate and rate < want["nvlink_gb_per_s"]}
        if slow:
            found = ", ".join(f"{rate:g} on link {link}" for link, rate in slow.items())
            findings.problem(gpu, "NVLink rate", f"at least {want['nvlink_gb_per_s']:g} GB/s", found, remedy)
        if None in rates.values():
            names = ", ".join(str(link) for link, rate in rates.items() if rate is None)
            findings.unknown(gpu, f"rate of NVLinks {names}", "no number")


# --- checks of the node ---


def judge_versions(report, want):
    """([(what, expected, found, remedy)], [warning]) of the driver and the CUDA it supports; `report` is the Query."""
    problems, warnings = [], []
    for what, found, least in (("driver", report.driver, want["driver_min"]), ("CUDA", report.cuda, want["cuda_min"])):
        if not least:
            continue
        if not version(found):
            warnings.append(f"unknown: version of the {what} (nvidia-smi -q does not report it)")
        elif version(found) < version(least):
            problems.append((what, f"at least {least}", found, "upgrade the driver: its branch fixes both versions"))
    return problems, warnings


def judge_count(report, want, before):
    """([(what, expected, found, remedy)], [warning]) of the number of GPUs; `before` are the addresses in cuda.fact."""
    problems, warnings = [], []
    listed = [gpu.pci for gpu in report.gpus]
    for pci in report.twice:
        warnings.append(f"nvidia-smi -q lists GPU {pci} twice: counted once")
    if report.attached is None:
        warnings.append("unknown: number of GPUs (nvidia-smi -q does not report it)")
        return problems, warnings
    if len(listed) + len(report.twice) < report.attached:
        warnings.append(f"nvidia-smi -q lists {len(listed)} of {report.attached} GPUs: the others are unknown")
        gone = []
    else:
        gone = [pci for pci in before if pci not in listed]
    found = report.attached - len(report.twice)
    expected = want["gpus"] or max(len(before), 1)
    if found != expected and (want["gpus"] or found < expected):
        where = f" (gone: {', '.join(gone)})" if gone else ""
        remedy = "check whether lspci -d 10de: shows it and the kernel log has Xid 79; reboot or reseat"
        problems.append(("GPUs", want["gpus"] or f"at least {expected}", f"{found}{where}", remedy))
    return problems, warnings


def judge_xids(xids, hours):
    """([(what, expected, found, remedy)], [warning]) of the `xids` (xids.parse) of the last `hours`."""
    problems, warnings = [], []
    for xid in xids:
        found = f"{xid.count} on {'NVSwitch' if xid.switch else 'GPU'} {xid.pci}: {xid.text[:60]}"
        serious, advice = kernel_xids.action(xid)
        if serious:
            problems.append((xid.name, f"none in the last {hours:g} h", found, advice))
        else:
            warnings.append(f"{xid.name} in the last {hours:g} h: {found} ({advice})")
    return problems, warnings


def judge_drift(published, observed):
    """[(what, expected, found, remedy)] of the differences of `observed` from `published`, the content of cuda.fact.

    Unknown values are not compared. A missing GPU is reported by judge_count.
    """
    problems = []
    remedy = f"if the change is intended, publish it: {SETUP}"
    for key, value in observed.items():
        before = published.get(key)
        if key != "gpus" and None not in (value, before) and value != before:
            problems.append((f"cuda.fact: {key}", before, value, remedy))
    known = gpus_of(published)
    for gpu in observed["gpus"]:
        before = known.get(gpu["pci_bus_id"])
        if before is None:
            problems.append((f"cuda.fact: GPU {gpu['pci_bus_id']}", "none there", gpu["name"], remedy))
            continue
        for key in ("name", "uuid", "vbios", "memory_mib"):
            if None not in (gpu[key], before.get(key)) and gpu[key] != before[key]:
                problems.append((f"cuda.fact: {key} of GPU {gpu['pci_bus_id']}", before[key], gpu[key], remedy))
    return problems


# --- querying the node ---


def ask(phase):
    """The Query of `nvidia-smi -q`. Raises Stop where it does not answer, fails, or prints anything else."""
    limit = phase.want["answer_s"]
    outcome = phase.run(["nvidia-smi", "-q"], limit)
    if outcome.rc is None:
        hung = "gave no answer" in outcome.reason
        expected = f"an answer within {limit:g} s" if hung else "the driver's tools"
        found = "no answer" if hung else outcome.last_line
        remedy = "the driver hangs: see the kernel log, reboot the node" if hung else "install the NVIDIA driver"
        raise Stop("nvidia-smi", expected, found, remedy)
    report = parse_query(outcome.stdout)
    if not outcome.ok:
        remedy = REMEDIES.get(outcome.rc, "see the kernel log: journalctl -k --grep NVRM")
        broken = ("nvidia-smi", "status 0", f"status {outcome.rc}: {outcome.last_line}", remedy)
        if not report.gpus:
            raise Stop(*broken)
        phase.problem(*broken)
    elif not report.driver and not report.gpus:
        raise Stop(
            "nvidia-smi -q", "a report", f"{counted(len(outcome.stdout), 'character')} without one", "run it manually"
        )
    return report


def check_fabric_manager(phase, gpus):
    """Record a problem where the node has an NVSwitch fabric and the fabric manager is not active."""
    fabric = {(gpu.get("Fabric/State")[0], gpu.get("Fabric/Status")[0]) for gpu in gpus}
    unit = phase.want["fabric_manager"]
    if not unit or not any(state for state, _ in fabric):
        return
    outcome = phase.run(["systemctl", "show", "--property=LoadState,ActiveState", unit], 10)
    values = dict(line.split("=", 1) for line in outcome.stdout.splitlines() if "=" in line)
    load, active = values.get("LoadState"), values.get("ActiveState")
    if not outcome.ok or not load or not active:
        phase.warn(f"unknown: state of {unit} ({outcome.last_line})")
    elif load == "not-found" and fabric == {("Completed", "Success")}:
        phase.warn(f"{unit} is not on this node, though the fabric is up: it runs elsewhere, as on a VM's host")
    elif (load, active) != ("loaded", "active"):
        found = active if load == "loaded" else load
        remedy = f"install it in the driver's version, then systemctl enable --now {unit}"
        phase.problem(unit, "active", found, remedy)


def check_toolkit(phase):
    """Record a problem where the CUDA toolkit is missing or too old. facts: toolkit."""
    least = phase.want["toolkit_min"]
    if not least:
        return
    nvcc = f"{phase.want['cuda_home']}/bin/nvcc"
    outcome = phase.run([nvcc, "--version"], 20)
    match = re.search(r"\brelease (\d+\.\d+)", outcome.stdout)
    found = match[1] if outcome.ok and match else outcome.last_line
    phase.facts["toolkit"] = match[1] if outcome.ok and match else None
    if not (outcome.ok and match) or version(found) < version(least):
        phase.problem("CUDA toolkit", f"at least {least}", found, "install it, or correct cuda_check_cuda_home")


def ask_nvlink(phase, report):
    """The result of parse_nvlink; None where NVLinks are not checked, or nvidia-smi fails, with a warning."""
    if not phase.want["nvlinks"] or not report.gpus:
        return None
    outcome = phase.run(["nvidia-smi", "nvlink", "-s"], phase.want["answer_s"])
    if outcome.ok:
        return parse_nvlink(outcome.stdout)
    phase.warn(f"unknown: NVLinks ({outcome.last_line})")
    return None


def describe(report, links, capabilities):
    """The content of cuda.fact as a dictionary; None for values that nvidia-smi does not report."""
    rows = [
        {
            "index": index,
            "name": gpu.get("Product Name")[0],
            "uuid": gpu.get("GPU UUID")[0],
            "pci_bus_id": gpu.pci,
            "vbios": gpu.get("VBIOS Version")[0],
            "memory_mib": gpu.number("FB Memory Usage/Total")[0],
        }
        for index, gpu in enumerate(report.gpus)
    ]
    return {
        "driver": report.driver or None,
        "cuda": report.cuda or None,
        "compute_capability": ",".join(sorted(set(capabilities))) or None,
        "nvlink_links": max(map(len, links.values())) if links else None,
        "gpus": rows,
    }


def capabilities(phase):
    """The compute capability of each GPU, such as "9.0"; [] with a warning where it is unknown."""
    rows, reason = query(phase, ["compute_cap"], phase.want["answer_s"])
    if reason:
        phase.warn(f"unknown: compute capability ({reason})")
    return [row["compute_cap"] for row in rows if not NO_VALUE.fullmatch(row["compute_cap"])]


def published(fact):
    """cuda.fact as a dictionary, empty where it is damaged; None where there is none."""
    text = read(fact)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def gpus_of(fact):
    """{PCI address: GPU} of the content of cuda.fact; invalid entries are ignored."""
    gpus = fact.get("gpus")
    rows = [gpu for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    return {gpu["pci_bus_id"]: gpu for gpu in rows if isinstance(gpu.get("pci_bus_id"), str)}


def record(phase, problems, warnings):
    """Record `problems`, as (what, expected, found, remedy), and `warnings` in `phase`."""
    for problem in problems:
        phase.problem(*problem)
    for warning in warnings:
        phase.warn(warning)


def need_gpus(phase):
    """Raise Off on a machine without a GPU, where the settings do not say that it must have one."""
    if not phase.want["required"] and not phase.want["gpus"] and not is_there(phase):
        raise Off("no NVIDIA GPU here")


def inspect(phase, fact):
    """Run all checks; `fact` is the path of cuda.fact. Returns (the Query, the result of parse_nvlink). Raises Stop.

    facts: versions.
    """
    want = dict(phase.want)
    for name in ("driver_min", "cuda_min", "toolkit_min"):
        if want[name] and not version(want[name]):
            raise Stop(f"cuda_check_{name}", "a version, such as 12.5, or nothing", want[name], "correct the variable")
    if phase.name == "validate" and want["set_persistence"]:
        want["persistence"] = False  # configure fixes it
    if want["xid_hours"]:  # first: it says why nvidia-smi hangs
        text, reason = kernel_log(phase, want["xid_hours"])
        if reason:
            phase.warn(f"unknown: Xids ({reason})")
        record(phase, *judge_xids(kernel_xids.parse(text), want["xid_hours"]))
    check_toolkit(phase)
    report = ask(phase)
    problems, warnings = judge_versions(report, want)
    if phase.name == "validate" and want["driver_package"]:
        warnings += [LATER.format(*problem) for problem in problems]
        problems = []
    record(phase, problems, warnings)
    record(phase, *judge_count(report, want, gpus_of(published(fact) or {})))
    findings = Findings(len(report.gpus))
    for gpu in report.gpus:
        judge_gpu(gpu, want, findings)
    links = ask_nvlink(phase, report)
    if links is not None:
        judge_nvlink(report.gpus, links, want, findings)
    record(phase, findings.problems(), findings.warnings())
    check_fabric_manager(phase, report.gpus)
    several = {
        what: ", ".join(sorted({value for gpu in report.gpus if (value := gpu.get(path)[0])}))
        for what, path in (("gpu", "Product Name"), ("vbios", "VBIOS Version"))
    }
    phase.facts["versions"] = {"driver": report.driver, "cuda": report.cuda, **several}
    phase.done.append(f"{len(report.gpus)} × {several['gpu'] or 'GPU'}, driver {report.driver}, CUDA {report.cuda}")
    return report, links


# --- phases ---


def validate(phase, fact=CUDA_FACT):
    """Run all checks; without a driver that install will add, problems are warnings. `fact`: the path of cuda.fact."""
    need_gpus(phase)
    try:
        inspect(phase, fact)
    except Stop as stop:
        if not phase.want["driver_package"]:
            raise
        phase.warn(LATER.format(*stop.problem))


def configure(phase, fact=CUDA_FACT):
    """Set persistence mode where the settings say so, and publish cuda.fact at the path `fact`. Raises Stop."""
    need_gpus(phase)
    try:
        report = ask(phase)
    except Stop:
        if phase.check and phase.want["driver_package"]:
            phase.warn("cuda.fact: not known before the driver is installed")
            return
        raise
    if report.attached != len(report.gpus) + len(report.twice):
        expected = "their number" if report.attached is None else report.attached
        raise Stop("GPUs in nvidia-smi -q", expected, len(report.gpus), f"its output was truncated: {SETUP} again")
    if phase.want["set_persistence"]:
        set_persistence(phase, report.gpus)
    facts = describe(report, ask_nvlink(phase, report), capabilities(phase))
    phase.write(fact, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    phase.facts.update(facts)


def set_persistence(phase, gpus):
    """Enable persistence mode of the `gpus` that have it disabled."""
    off = [gpu.pci for gpu in gpus if gpu.get("Persistence Mode")[0] == "Disabled"]
    if not off or not all([phase.change(f"persistence mode of GPU {pci}", "Disabled", "Enabled") for pci in off]):
        return
    outcome = phase.run(["nvidia-smi", "-pm", "1"], phase.want["answer_s"])
    if not outcome.ok:
        phase.problem("persistence mode", "Enabled", outcome.last_line, "run as root; see nvidia-smi -pm 1")


def verify(phase, fact=CUDA_FACT):
    """Run all checks, and compare the node with cuda.fact at the path `fact`. Raises Stop."""
    need_gpus(phase)
    report, links = inspect(phase, fact)
    before = published(fact)
    if before is None:
        if phase.want["published"]:
            phase.problem(fact, "a published fact", "none", SETUP)
        return
    phase.own(fact, 0o644, remedy=SETUP)
    record(phase, judge_drift(before, describe(report, links, capabilities(phase))), [])


PHASES = {"validate": validate, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
