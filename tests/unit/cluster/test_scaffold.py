"""`runner inventory init`: what it writes is what was answered, is read without a complaint, or is not written."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import NAMES
from golden_files import check as golden
from runner.cluster import inventory, scaffold, ssh
from runner.cluster.scaffold import Answers
from runner.errors import UsageError

RUNNER = Path(sys.executable).with_name("runner")
GPUS = Answers(("gpu01", "gpu02", "gpu04"))
EXAMPLES = {
    "ssh": GPUS,
    "fukushimadc-02": Answers(
        tuple(NAMES),
        addresses=tuple(f"10.2.201.{number}" for number in range(1, 9)),
        port=44222,
        key_file="~/my keys/#1: id",
        gpus=8,
        hardware="h200-sxm",
        nics=2,
        nic_gbit_per_s=400.0,
    ),
    "slurm": Answers(("gpu1", "gpu2"), "slurm", python="/shared/env/bin/python", gpus=4),
    "slurm-login": replace(GPUS, backend="slurm", partition="gpu,long", account="1234", login="head", user="alice"),
    "cpu": Answers(("node001", "node002"), gpus=2, hardware="cpu", nic_gbit_per_s=12.5),
    "local": Answers(("localhost",), "local"),
}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RUNNER, "inventory", *arguments], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def parsed(text: str) -> inventory.Inventory:
    """The text as the product's reader takes it, without the second that Ansible needs to list it."""
    data = yaml.safe_load(text)["all"]
    group = data["children"]["gpu_nodes"]
    hostvars = {host: {**group.get("vars", {}), **(own or {})} for host, own in group["hosts"].items()}
    listing = {"_meta": {"hostvars": {**data.get("hosts", {}), **hostvars}}, "gpu_nodes": {"hosts": list(hostvars)}}
    return inventory.parse("x", listing)


def as_answered(read: inventory.Inventory) -> Answers:
    """The answers that `read` came from."""
    first = read.nodes[0]
    (same,) = {
        (n.backend, n.port, n.user, n.key_file, n.python, n.gpus, n.hardware, n.nics, n.nic_gbit_per_s)
        for n in read.nodes
    }
    names, addresses = tuple(n.name for n in read.nodes), tuple(n.address for n in read.nodes)
    backend, *rest = same
    slurm = {key: read.slurm.get(key) for key in ("partition", "account", "login")}
    assert first.device == ("auto" if first.gpus is None else "cpu" if first.hardware == "cpu" else "cuda")
    return Answers(names, backend, () if names == addresses else addresses, *rest, **slurm)


# --- the text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_text(name):
    golden(f"inventory/{name}.yml", scaffold.render(EXAMPLES[name]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_line_is_wider_than_a_screen(name):
    assert max(map(len, scaffold.render(EXAMPLES[name]).splitlines())) <= 132


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_commented_out_is_accepted_too(name):
    """Somebody takes the # away before a variable."""
    text = re.sub(r"^( *)# ( *)(?=[A-Za-z_]+:)", r"\1\2", scaffold.render(EXAMPLES[name]), flags=re.MULTILINE)
    text = text.replace("login: slurm-login ", "login: gpu1 ")  # a host of the inventory
    first = parsed(text).nodes[0]
    assert first.gpus and first.device != "auto"
    assert first.backend == "local" or (first.key_file and first.env == {"NCCL_IB_HCA": "mlx5_0,mlx5_1"})


words = st.from_regex(inventory._NAME, fullmatch=True)
paths = st.from_regex(inventory._PATH, fullmatch=True)
key_files = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(inventory._KEY_FILE.fullmatch)
rates = st.none() | st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@st.composite
def answers(draw) -> Answers:
    names = tuple(draw(st.lists(words, min_size=1, max_size=5, unique=True)))
    addresses = draw(
        st.just(())
        | st.lists(
            st.from_regex(inventory._ADDRESS, fullmatch=True), min_size=len(names), max_size=len(names), unique=True
        )
    )
    backend = draw(st.sampled_from(["ssh", "slurm"]))
    slurm = {}
    if backend == "slurm":
        optional = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*", fullmatch=True)
        slurm = {"partition": draw(optional), "account": draw(optional), "login": draw(st.none() | words)}
    return Answers(
        names,
        backend,
        () if tuple(addresses) == names else tuple(addresses),
        port=draw(st.integers(1, 65535)),
        user=draw(words),
        key_file=draw(st.none() | key_files),
        python=draw(paths),
        gpus=draw(st.none() | st.integers(1, 16)),
        hardware=draw(st.sampled_from(["cpu", "h200-sxm", "unknown"])),
        nics=draw(st.integers(0, 16)),
        nic_gbit_per_s=draw(rates),
        **slurm,
    )


@pytest.mark.parametrize("text", ["@", "@a", "2024-13-45", "0x_", "-", "~", "1_0", "no", "a@b"])
def test_a_word_that_yaml_reads_otherwise_or_refuses_is_quoted(text):
    assert yaml.safe_load(scaffold.scalar(text)) == text


@given(answers())
def test_whatever_is_accepted_is_read_as_it_was_answered(given_):
    text = scaffold.render(given_)
    try:
        read = parsed(text)
    except UsageError as error:  # a name that is another's alias, a placeholder: refused in one line
        assert "both called" in str(error) or "placeholder" in str(error)
    else:
        assert as_answered(read) == replace(given_, key_file=from_here(given_.key_file))


def from_here(file):
    """The path that ssh is given for a key file: a relative one begins in the user's folder."""
    kept = file is None or file == "none" or file[0] in "/~%$"
    return file if kept else str(Path(file).absolute())


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_no_value_gets_out_of_its_place(name, user, key_file):
    """Whatever the reader then says of them, they are one name and two values."""
    data = yaml.safe_load(scaffold.render(Answers((name, f"{name}2"), user=user, key_file=key_file)))
    group = data["all"]["children"]["gpu_nodes"]
    assert list(data) == ["all"] and list(group) == ["hosts", "vars"] and list(group["hosts"]) == [name, f"{name}2"]
    assert group["vars"]["ansible_user"] == user
    assert group["vars"].get("ansible_ssh_private_key_file", "") == key_file


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("gpu01", "gpu02"), ""),
        (("gpu01", "gpu02", "gpu04"), "there is no gpu03, so node003 is gpu04"),
        (("a-0007", "a-0011", "b1"), "there is no a-[0008-0010], so node002 is a-0011"),
        (("gpu2", "gpu1"), ""),
        (("a", "b"), ""),
    ],
)
def test_a_gap_in_the_names_is_pointed_out(names, said):
    assert scaffold.gaps(names) == said


def test_many_gaps_are_not_all_listed():
    assert scaffold.gaps([f"n{number}" for number in range(0, 40, 2)]).count("there is no") == 4


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu[01-03]", ("gpu01", "gpu02", "gpu03")),
        ("fukushimadc-02-hgx-[0001-0007,0009]", tuple(NAMES)),
        ("b,a", ("b", "a")),
        ("10.0.0.[9-10]", ("10.0.0.9", "10.0.0.10")),
    ],
)
def test_a_set_keeps_its_order(text, names):
    assert scaffold.hosts(text) == names


@pytest.mark.parametrize(
    "text", ["", "gpu[", "gpu[3-1]", "gpu[1-999999999]", "a[1-200]b[1-200]", "a b", "a,", "x\ny", f"a[1-{'9' * 5000}]"]
)
def test_what_is_no_set_is_one_line(text):
    with pytest.raises(UsageError) as error:
        scaffold.hosts(text)
    assert len(str(error.value).splitlines()) == 1


# --- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_ansible_and_the_products_reader_accept_it_without_a_complaint(name, tmp_path):
    (tmp_path / "hosts.yml").write_text(scaffold.render(EXAMPLES[name]))
    program = Path(sys.executable).with_name("ansible-inventory")
    listed = subprocess.run(
        [program, "-i", tmp_path, "--list"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert listed.stderr == ""
    read = inventory.parse("mine", json.loads(listed.stdout))
    assert [node.name for node in read.nodes] == list(EXAMPLES[name].names)
    assert read.nodes[0].backend == "local" or as_answered(read) == EXAMPLES[name]


@given(answers())
@settings(max_examples=4)
def test_ansible_itself_gives_the_same_answers(tmp_path_factory, given_):
    """Its YAML has tags and templates of its own."""
    folder = tmp_path_factory.mktemp("any")
    try:
        read = scaffold.create(folder, given_)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1 and not any(folder.iterdir())
    else:
        assert as_answered(read) == replace(given_, key_file=from_here(given_.key_file))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Answers(("all", "b")), "Ansible does not read all"),
        (Answers(("a",), user="x y"), "ansible_user 'x y' has characters that are not allowed"),
        (Answers(("a",), key_file='a"b'), "ansible_ssh_private_key_file"),
        (Answers(("a",), key_file="{{ x }}"), "ansible_ssh_private_key_file"),
        (Answers(("a",), key_file="a\udcffb"), "--key-file"),
        (Answers(("a",), "slurm", partition="<partition>"), "placeholder"),
    ],
)
def test_what_the_reader_refuses_is_not_written(wrong, said, tmp_path):
    with pytest.raises(UsageError) as error:
        scaffold.create(tmp_path / "mine", wrong)
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
    assert "shakedown-" not in str(error.value)  # the folder that it was tried in is nobody's business
    assert not (tmp_path / "mine").exists()


def test_a_file_that_is_there_is_kept_unless_forced(tmp_path):
    assert scaffold.create(tmp_path, GPUS).source == str(tmp_path)
    (tmp_path / "known_hosts").write_text("gpu01 ssh-ed25519 AAAA\n")
    with pytest.raises(UsageError, match="exists"):
        scaffold.create(tmp_path, Answers(("other",)))
    assert "gpu01" in (tmp_path / "hosts.yml").read_text()
    scaffold.create(tmp_path, Answers(("other",)), force=True)
    assert "gpu01" not in (tmp_path / "hosts.yml").read_text() and (tmp_path / "known_hosts").exists()
    (tmp_path / "hosts.yml").write_text("")
    scaffold.create(tmp_path, GPUS)
    with pytest.raises(UsageError, match="is not a folder"):
        scaffold.create(tmp_path / "hosts.yml", GPUS)


def test_the_keys_that_keyscan_would_write_are_pins(tmp_path):
    """The next step that is named: `ssh-keyscan -p 44222 ADDRESS…` writes [ADDRESS]:44222."""
    read = scaffold.create(tmp_path, EXAMPLES["fukushimadc-02"])
    command = scaffold.keyscan(read)
    assert command == f"ssh-keyscan -p 44222 {' '.join(f'10.2.201.{n}' for n in range(1, 9))}"
    (tmp_path / "known_hosts").write_text(
        "".join(f"[{address}]:44222 ssh-ed25519 AAAA\n" for address in command.split()[3:])
    )
    pinned = ssh.known_hosts(inventory.read(str(tmp_path), tmp_path / "cache"))
    assert pinned.splitlines() == [f"{name} ssh-ed25519 AAAA" for name in NAMES]


def test_only_what_is_reached_over_ssh_has_keys_to_pin(tmp_path):
    scan = {name: scaffold.keyscan(parsed(scaffold.render(EXAMPLES[name]))) for name in EXAMPLES}
    assert scan["local"] is scan["slurm"] is None
    assert scan["slurm-login"] == "ssh-keyscan -p 22 gpu01 gpu02 gpu04 head"
    many = parsed(scaffold.render(Answers(scaffold.hosts("n[001-100]"))))
    assert scaffold.keyscan(many) == "ssh-keyscan -p 22 $(nodeset -e 'n[001-100]')"


# --- the command -----------------------------------------------------------------------------------


def test_options_alone_where_nobody_can_be_asked(tmp_path):
    done = run("init", "my inv", "--hosts", "gpu[01-02,04]", "--gpus", "8", "--hardware", "h200-sxm", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "wrote my inv/hosts.yml: gpu[01-02,04]",
        "next:",
        "  runner inventory -i 'my inv'",
        "      the nodes as they are read",
        "  ssh-keyscan -p 22 gpu01 gpu02 gpu04 > 'my inv/known_hosts'",
        "      pin host keys; compare the fingerprints first",
        "  runner check -i 'my inv'",
        "      what the nodes are now",
    ]
    shown = run("-i", "my inv", "--json", cwd=tmp_path)
    assert [(n["name"], n["alias"], n["gpus"]) for n in json.loads(shown.stdout)] == [
        ("gpu01", "node001", 8),
        ("gpu02", "node002", 8),
        ("gpu04", "node003", 8),
    ]


def test_json_is_the_path_and_the_nodes(tmp_path):
    done = run("init", "mine", "--hosts", "a", "--json", cwd=tmp_path)
    answer = json.loads(done.stdout)
    assert answer["path"] == "mine/hosts.yml" and [node["name"] for node in answer["nodes"]] == ["a"]
    assert answer["nodes"] == json.loads(run("-i", "mine", "--json", cwd=tmp_path).stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "mine"], "--hosts is missing"),
        (["init"], "Missing argument 'DIR'"),
        (["init", "mine", "--backend", "slm"], "did you mean 'slurm'"),
        (["init", "mine", "--hosts", "gpu["], "not a set of hosts"),
        (["init", "mine", "--hosts", "a", "--hardware", "h200"], "did you mean 'h200-sxm'"),
        (["init", "mine", "--hosts", "a", "--gpus", "0"], "--gpus"),
        (["init", "mine", "--hosts", "a", "--port", "0"], "--port"),
        (["init", "mine", "--hosts", "a", "--nic-gbit", "nan"], "nan"),
        (["init", "mine", "--hosts", "a", "--partition", "gpu"], "--partition requires --backend slurm"),
        (["init", "mine", "--backend", "local", "--hosts", "a"], "--hosts requires --backend ssh or slurm"),
        (["init", "mine", "--hosts", "a,b", "--address", "10.0.0.1"], "--address has 1 address, --hosts 2 names"),
        (["init", "mine", "--hosts", "a", "--user", "x;y"], "ansible_user 'x;y'"),
        (["--hosts", "a", "init", "mine"], "--hosts is an option of `runner inventory` only"),
        (["initt"], "initt"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("runner: ")
    assert not any(tmp_path.iterdir())


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [RUNNER, "inventory", *arguments], cwd=cwd, stdin=slave, stdout=subprocess.PIPE, stderr=slave
        )
        os.close(slave)
        self.seen = ""

    def answer(self, question: str, text: str) -> None:
        """Wait for `question`, and type."""
        deadline = time.monotonic() + 60
        before = len(self.seen)
        while question not in self.seen[before:]:
            assert time.monotonic() < deadline and select.select([self._master], [], [], 60)[0], self.seen
            self.seen += os.read(self._master, 4096).decode()
        os.write(self._master, f"{text}\n".encode())

    def end(self) -> tuple[int, str]:
        """The exit code, and what it wrote to stdout."""
        stdout, _ = self._process.communicate(timeout=60)
        os.close(self._master)
        return self._process.returncode, stdout.decode()


def test_on_a_terminal_it_asks_for_what_was_not_given(tmp_path):
    """By default values and with a mistake, which is asked again; stdout stays for programs."""
    terminal = Terminal("init", "mine", "--port", "44222", "--json", cwd=tmp_path)
    for question, text in [
        ("ssh", ""),
        ("Names of the nodes", "gpu[01-"),
        ("Names of the nodes", "gpu[01-02]"),
        ("User", "admin"),
        ("Private key", ""),
        ("Python", ""),
        ("GPUs", "many"),
        ("GPUs", "8"),
        ("Hardware", "h200-sxm"),
        ("NICs", "2"),
        ("Rate", "400"),
    ]:
        terminal.answer(question, text)
    code, stdout = terminal.end()
    assert code == 0 and "Port" not in terminal.seen
    assert terminal.seen.count("not a set of hosts") == 1 and terminal.seen.count("neither a number") == 1
    nodes = json.loads(stdout)["nodes"]
    told = ("name", "port", "user", "key_file", "gpus", "device", "hardware", "nics", "nic_gbit_per_s")
    assert [nodes[0][key] for key in told] == ["gpu01", 44222, "admin", None, 8, "cuda", "h200-sxm", 2, 400.0]


def test_the_questions_of_slurm_are_others(tmp_path):
    terminal = Terminal("init", "mine", "--hosts", "gpu[1-2]", "--gpus", "4", cwd=tmp_path)
    for question, text in [
        ("ssh", "slurm"),
        ("Partition", "gpu"),
        ("Account", ""),
        ("Host for Slurm", ""),
        ("Python", "/shared/env/bin/python"),
        ("Hardware", ""),
        ("NICs", ""),
        ("Rate", ""),
    ]:
        terminal.answer(question, text)
    code, stdout = terminal.end()
    assert code == 0 and "wrote mine/hosts.yml: gpu[1-2]" in stdout
    read = inventory.read(str(tmp_path / "mine"), tmp_path / "cache")
    assert dict(read.slurm) == {"partition": "gpu"} and read.nodes[0].python == "/shared/env/bin/python"


def test_ctrl_c_at_a_question_writes_nothing(tmp_path):
    terminal = Terminal("init", "mine", cwd=tmp_path)
    terminal.answer("ssh", "\x04")  # the end of the input, as Ctrl-D gives it
    assert terminal.end()[0] == 130 and not any(tmp_path.iterdir())
