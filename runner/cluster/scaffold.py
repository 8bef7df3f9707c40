"""`runner inventory init`: generates a commented inventory from the answers to a few questions.

`render` is pure. `create` reads the text with the product's own reader before the file is written, so that every
written inventory is valid and errors are the reader's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from runner.cluster import inventory, profiles
from runner.cluster.backends import BACKENDS, SLURM, SSH, Backend
from runner.errors import RunnerError, UsageError
from runner.system.files import disk_errors, write_text_atomic
from runner.system.nodeset import expand, fold
from runner.system.wording import counted

FILE = "hosts.yml"
PYTHON = f"{profiles.PREFIX}/bin/python"  # of the environment that the role conda_env creates
MAX_HOSTS = 10_000
_SHOWN_GAPS = 4
_LISTED = 16  # more addresses are folded
_GROUPS = ("all", "ungrouped", inventory.GROUP)
_PLAIN = re.compile(r"[A-Za-z0-9._/~@+-]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_NUMBERED = re.compile(r"([A-Za-z0-9._-]*?)(\d{1,18})")


@dataclass(frozen=True)
class Answers:
    """The description of a cluster: node names in order of their positions, and the settings of all nodes.

    `addresses` has one entry per name, or none where names resolve. `gpus` is the number per node, None if unknown.
    `nic_gbit_per_s` is the rate of a NIC, one way, None if unknown. `partition`, `account` and `login` are for the
    backend slurm only.
    """

    names: tuple[str, ...]
    backend: str = SSH
    addresses: tuple[str, ...] = ()
    port: int = 22
    user: str = "root"
    key_file: str | None = None
    python: str = PYTHON
    gpus: int | None = None
    hardware: str = "unknown"
    nics: int = 1
    nic_gbit_per_s: float | None = None
    partition: str | None = None
    account: str | None = None
    login: str | None = None

    @property
    def reached(self) -> Backend:
        """The row of the backend, which says how commands reach these nodes."""
        return BACKENDS[self.backend]


def hosts(text: str) -> tuple[str, ...]:
    """The names of a set such as `gpu[01-04],head`, in its order. Raises UsageError where `text` is not a set."""
    example = "write names with commas, or a set such as 'gpu[01-04]'"
    try:
        if _size(text) > MAX_HOSTS:
            raise UsageError(f"{text} has more than {MAX_HOSTS} hosts; {example}")
        return expand(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a set of hosts; {example}") from None


def _size(text: str) -> int:
    """The number of names that `text` expands to. Raises ValueError for a descending range."""
    total = 0
    for part in re.split(r",(?![^\[\]]*\])", text):
        names = 1
        for ranges in re.findall(r"\[([^\]]*)\]", part):
            bounds = [(int(first), int(last or first)) for first, last in re.findall(r"(\d+)(?:-(\d+))?", ranges)]
            if any(first > last for first, last in bounds):
                raise ValueError(ranges)
            names *= sum(last - first + 1 for first, last in bounds)
        total += names
    return total


# --- the text --------------------------------------------------------------------------------------


def render(answers: Answers) -> str:
    """The inventory as commented YAML; values are quoted where YAML would parse them as another type."""
    if not answers.reached.remote:
        return _LOCAL
    lines = [*_header(answers), "all:"]
    if answers.login and answers.login not in answers.names:
        lines += [
            "  hosts:",
            "    # Slurm's commands run here; it is none of the nodes.",
            f"    {scalar(answers.login)}:",
            *(f"      {line}" for line in _connection(answers)),
        ]
    lines += ["  children:", "    gpu_nodes:", "      hosts:"]
    for position, name in enumerate(answers.names, start=1):
        lines += _host(answers, name, position)
    lines += ["      vars:", *(f"        {line}" if line else "" for line in _variables(answers))]
    return "\n".join([*lines, ""])


_LOCAL = """\
# Written by `runner inventory init`: this machine. It is an ordinary Ansible inventory, yours to edit.
# `runner inventory -i FOLDER` shows it as it is read; docs/guide.md explains every variable.
all:
  children:
    gpu_nodes:
      hosts:
        localhost:
          ansible_connection: local
          ansible_host: 127.0.0.1
          # The one that runs Ansible: what Ansible finds by itself may be a pyenv shim without a Python behind it.
          ansible_python_interpreter: "{{ ansible_playbook_python }}"
          # GPUs are counted when a command starts; without one, 2 ranks run on the CPU. To choose:
          # runner_gpus_per_node: 8
          # runner_device: cuda
"""


def scalar(text: str) -> str:
    """`text` as a YAML scalar on one line, quoted where needed so that every reader parses it as this string."""
    import yaml

    with suppress(yaml.YAMLError, ValueError):  # such as `@`, and an invalid date
        if _PLAIN.fullmatch(text) and yaml.safe_load(text) == text:
            return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")


def gaps(names: Sequence[str]) -> str:
    """A note about missing numbers in `names`: `there is no gpu03, so node003 is gpu04`; "" where none is missing."""
    found = []
    for position, (one, other) in enumerate(pairwise(names), start=2):
        a, b = _NUMBERED.fullmatch(one), _NUMBERED.fullmatch(other)
        if a and b and a[1] == b[1] and int(b[2]) > int(a[2]) + 1:
            first, last = (str(number).zfill(len(a[2])) for number in (int(a[2]) + 1, int(b[2]) - 1))
            missing = f"{a[1]}{first}" if first == last else f"{a[1]}[{first}-{last}]"
            found.append(f"there is no {missing}, so node{position:03d} is {other}")
    more = ["and so on"] if len(found) > _SHOWN_GAPS else []
    return "; ".join([*found[:_SHOWN_GAPS], *more])


def _header(answers: Answers) -> list[str]:
    way = {SSH: "reached over ssh", SLURM: "reached through Slurm"}[answers.backend]
    count = counted(len(answers.names), "node")
    lines = [
        f"# Written by `runner inventory init`: {count} {way}. It is an ordinary Ansible inventory, yours to edit.",
        "# `runner inventory -i FOLDER` shows the nodes as they are read; docs/guide.md explains every variable.",
        "# What is commented out shows the default, or an example where there is none.",
    ]
    if found := gaps(answers.names):
        lines += [f"# Mind the gaps in the names: {found}."]
    if answers.reached.by_ssh or answers.login:
        lines += [
            "# Host keys are always checked: against known_hosts beside this file if it has the host, else your own.",
            f"#   ssh-keyscan -p {answers.port} HOST … > known_hosts   (compare the fingerprints first)",
        ]
    return lines


def _host(answers: Answers, name: str, position: int) -> list[str]:
    alias = f"node{position:03d}"
    # A host whose own name is node001 keeps that name; then no host gets it as an alias.
    inside = [f"runner_alias: {alias}"] if alias not in answers.names else []
    if answers.addresses:
        inside.append(f"ansible_host: {scalar(answers.addresses[position - 1])}")
    elif position == 1 and answers.reached.by_ssh:
        inside.append("# ansible_host: 10.0.0.1   # for a name that does not resolve")
    if position == 1 and inside and inside[0][0] != "#":
        inside[0] += "   # its position, a second name for it; it stays when another host is taken out"
    return [f"        {scalar(name)}:", *(f"          {line}" for line in inside)]


def _connection(answers: Answers) -> list[str]:
    key = "# ansible_ssh_private_key_file: ~/.ssh/id_ed25519   # left out: as ssh chooses"
    if answers.key_file:
        key = f"ansible_ssh_private_key_file: {scalar(answers.key_file)}"
    return [f"ansible_port: {answers.port}", f"ansible_user: {scalar(answers.user)}", key]


def _variables(answers: Answers) -> list[str]:
    """The lines of the variables of all nodes, section by section."""
    over = (
        "over ssh" if answers.reached.by_ssh else "over ssh, which only setup and fetching results (shared: false) do"
    )
    sections = [
        _slurm(answers) if answers.reached.scheduled else [],
        [f"# How nodes are reached {over}.", *_connection(answers)],
        [*_ANSIBLE],
        [
            "# The Python of the environment that ranks run in, the same on all nodes. `runner setup` makes this one:"
            if answers.python == PYTHON
            else "# The Python of the environment that ranks run in, the same on all nodes.",
            f"runner_python: {scalar(answers.python)}",
        ],
        _gpus(answers),
        _nics(answers),
        [*_REST],
    ]
    return [line for section in sections if section for line in ("", *section)][1:]


_ANSIBLE = (
    "# For ansible-playbook without `runner`: the system's Python, and the pinned host keys.",
    "ansible_python_interpreter: /usr/bin/python3",
    "ansible_ssh_common_args: >-",
    "  -o StrictHostKeyChecking=yes",
    "  -o 'UserKnownHostsFile=\"{{ inventory_dir }}/known_hosts\" ~/.ssh/known_hosts'",
)

_REST = (
    "# Where nodes keep data and artefacts until they are gathered, and how many GiB must be free there.",
    "# runner_scratch: /var/tmp/shakedown",
    "# runner_min_free_disk_gib: 1",
    "",
    "# Environment of the ranks; no secrets.",
    "# runner_env:",
    "#   NCCL_IB_HCA: mlx5_0,mlx5_1",
    "",
    "# The NCCL of the ranks: torch's own, or the one that role nccl_build built. Left out: built, where there is one.",
    "# runner_nccl: torch",
    "",
    "# The roles of `runner setup` have variables of their own: docs/provisioning.md.",
)


def _gpus(answers: Answers) -> list[str]:
    device = "cpu" if answers.hardware == "cpu" else "cuda"
    lines = ["# Ranks per node, and what they run on: cuda or cpu. `runner bench` needs to know both."]
    if answers.gpus is None:
        lines += ["# runner_gpus_per_node: 8", f"# runner_device: {device}"]
    else:
        lines += [f"runner_gpus_per_node: {answers.gpus}", f"runner_device: {device}"]
    return [
        *lines,
        "# The ceilings that results are shown against: a file of configs/hardware.",
        f"runner_hardware: {scalar(answers.hardware)}",
    ]


def _nics(answers: Answers) -> list[str]:
    rate = answers.nic_gbit_per_s
    return [
        "# NICs of a node in the fabric between nodes, and the rate of one in Gb/s, one way.",
        f"runner_nics_per_node: {answers.nics}",
        "# runner_nic_gbit_per_s: 400   # left out: not known, and no ceiling is drawn"
        if rate is None
        else f"runner_nic_gbit_per_s: {int(rate) if rate.is_integer() else rate}",
    ]


def _slurm(answers: Answers) -> list[str]:
    """The lines of Slurm's settings; those left to Slurm's defaults are commented out."""
    set_ = {"partition": answers.partition, "account": answers.account}
    examples = {"partition": "gpu", "account": "physics"}
    lines = [
        "# Jobs are submitted with these settings; what is left out is Slurm's own default. docs/slurm.md has them all."
    ]
    lines += ["runner_backend: slurm"]
    inside = [f"{key}: {scalar(value)}" if value else f"# {key}: {examples[key]}" for key, value in set_.items()]
    inside += [
        '# gres: "gpu:h200:8"        # what a node must have; default: gpu:<runner_gpus_per_node>',
        '# time_limit_s: "04:00:00"  # of a job; default: what its cells may take',
    ]
    if answers.login:
        inside += [
            f"login: {scalar(answers.login)}   # Slurm's commands run there, over ssh",
            "# shared: false   # nodes do not see the results: they are fetched over ssh; default: as seen from there",
        ]
    else:
        inside += [
            "# login: slurm-login        # run Slurm's commands there, over ssh; default: on this machine",
            "# shared: false             # where nodes do not see this folder: results are fetched over ssh",
        ]
    has_values = any(line[0] != "#" for line in inside)
    return [
        *lines,
        "runner_slurm:" if has_values else "# runner_slurm:",
        *(f"  {line}" if has_values else f"#   {line.removeprefix('# ')}" for line in inside),
    ]


# --- the file --------------------------------------------------------------------------------------


def create(folder: Path, answers: Answers, force: bool = False) -> inventory.Inventory:
    """Write `folder`/hosts.yml and return it as read by the product's own reader.

    An existing file that is not empty is replaced only with `force`; a known_hosts beside it is never changed.
    Raises UsageError for an existing file or invalid answers, and InfrastructureError for a full disk; then nothing is
    written.
    """
    path = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: name one, new or empty, for the inventory")
    if not force and path.exists() and path.stat().st_size:
        raise UsageError(f"{path} exists: name another folder, or replace it with --force")
    for option, value in (("--user", answers.user), ("--key-file", answers.key_file), ("--python", answers.python)):
        if value and _SURROGATE.search(value):  # Python's representation of invalid bytes in a command line
            raise UsageError(f"{option} {value!r} is not valid UTF-8, which the file must be")
    text = render(answers)
    with tempfile.TemporaryDirectory(prefix="shakedown-") as temporary:
        trial = Path(temporary, "inventory")
        trial.mkdir()
        write_text_atomic(trial / FILE, text)
        try:
            read = inventory.read(str(trial), Path(temporary, "cache"))
        except RunnerError as error:
            raise UsageError(str(error).replace(str(trial), str(folder))) from None
    _compare(answers, read)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    # The file names its folder by a template, which was rendered where it was tried.
    here = str(folder.absolute())
    nodes = tuple(replace(n, known_hosts_files=n.known_hosts_files.replace(str(trial), here)) for n in read.nodes)
    return replace(read, source=str(folder), nodes=nodes)


def _compare(answers: Answers, read: inventory.Inventory) -> None:
    """Raise UsageError where the names in `read` differ from the answers: some words are special to Ansible."""
    if not answers.reached.remote:
        return
    names = tuple(node.name for node in read.nodes)
    if names != answers.names:
        odd = [name for name in answers.names if name in _GROUPS or name not in names]
        raise UsageError(f"--hosts: Ansible does not read {', '.join(odd)} as the name of a host")


def keyscan(read: inventory.Inventory) -> str | None:
    """The shell command that fetches the host keys to pin; None where no host is reached over ssh."""
    backend = BACKENDS[read.nodes[0].backend]
    if not backend.remote or (backend.scheduled and "login" not in read.slurm):
        return None
    addresses = [node.address for node in read.hosts]
    listed = " ".join(addresses) if len(addresses) <= _LISTED else f"$(nodeset -e '{fold(addresses)}')"
    return f"ssh-keyscan -p {read.nodes[0].port} {listed}"
