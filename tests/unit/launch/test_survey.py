"""`runner check` where nodes are reached through Slurm only: what it has, and what a benchmark would be refused for."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner

from conftest import ROOT
from golden_files import check as golden
from runner import errors
from runner.cli import setup
from runner.cli.main import cli
from runner.cluster import slurm as slurm_settings
from runner.errors import InfrastructureError, UsageError
from runner.launch.slurm import answers as slurm
from runner.launch.slurm import commands as jobs
from runner.launch.slurm import survey
from runner.system.process import Outcome

EXAMPLE = ROOT / "inventory" / "slurm-example"
PARTITIONS = (
    "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 Nodes=node[001-008] State=UP\n"
    "PartitionName=debug Default=NO MaxNodes=2 MaxTime=UNLIMITED Nodes=node001 State=UP\n"
)
DRAINED = ("drained", "bad cable on mlx5_3 | port 2, seen by the night shift")


def sinfo(count=8, **states):
    rows = ((f"node{n:03d}", *states.get(f"node{n:03d}", ("idle", "none"))) for n in range(1, count + 1))
    return "".join(
        slurm.SEPARATOR.join((name, state, "gpu:h200:8", "224", "2063937", reason)) + "\n"
        for name, state, reason in rows
    )


class Commands:
    """Slurm's commands with one answer each: stdout, or the error that sbatch gives."""

    def __init__(self, nodes=None, sbatch=""):
        self.answers = {"scontrol": PARTITIONS, "sinfo": nodes or sinfo(), "sbatch": ""}
        self.refusal = sbatch
        self.scripts = []

    def __call__(self, argv, *, input="", **options):
        if argv[0] == "sbatch":
            assert "--test-only" in argv  # nothing is ever submitted
            self.scripts.append(input)
            if self.refusal:
                return Outcome(tuple(argv), 1, 0.0, "", f"sbatch: error: {self.refusal}\n")
        return Outcome(tuple(argv), 0, 0.0, self.answers[argv[0]], "")


def ask(commands, nodes, named=False, **settings):
    return survey.ask(jobs.SlurmClient(slurm_settings.Settings(**settings), run=commands), nodes, named)


def test_a_cluster_that_can_run_a_benchmark_on_all_nodes(cluster):
    commands = Commands()
    found = ask(commands, cluster.nodes)
    assert (found.state, found.num_nodes, found.down, found.unknown, found.refusals) == ("usable", 8, [], [], [])
    (script,) = commands.scripts
    assert "#SBATCH --gres=gpu:8" in script and "#SBATCH --nodes=8" in script and "nodelist" not in script


def test_named_nodes_are_asked_for_and_no_others(cluster):
    commands = Commands(sinfo(node003=DRAINED))
    assert ask(commands, cluster.nodes[3:5], named=True).state == "usable"
    assert '--nodelist="node004,node005"' in commands.scripts[0] or "--nodelist=node004,node005" in commands.scripts[0]
    found = ask(commands, cluster.nodes[2:4], named=True)
    assert found.state == "down" and found.refusals[0].startswith("named but not usable: node003 drained (bad cable")


@pytest.mark.parametrize(
    ("answers", "count", "settings", "state", "said"),
    [
        ({"nodes": sinfo(node003=DRAINED)}, 8, {}, "down", "of which 7 are usable: node003 drained"),
        ({"nodes": sinfo(node003=DRAINED)}, 5, {}, "down", None),  # others would do, but it is one of the inventory's
        ({"nodes": sinfo(node008=DRAINED)}, 5, {}, "usable", None),
        ({}, 8, {"partition": "gup"}, "refused", "did you mean 'gpu'?"),
        ({}, 8, {"partition": "debug"}, "refused", "allows 2 (MaxNodes)"),
        ({}, 8, {"gres": "gpu:a100:8"}, "refused", "found: node[001-008] gpu:h200:8"),
        ({}, 8, {"time_limit_s": 172800}, "refused", "(MaxTime)"),
        ({"nodes": sinfo(node003=DRAINED)}, 8, {"gres": "gpu:a100:8"}, "refused", "gpu:a100:8"),
        ({"sbatch": "Invalid account or account/partition combination specified"}, 8, {"account": "physics"}, "refused",
         "sbatch says: Invalid account"),
    ],
)  # fmt: skip
def test_what_would_be_refused_is_told_apart_from_nodes_that_are_down(cluster, answers, count, settings, state, said):
    found = ask(Commands(**answers), cluster.nodes[:count], **settings)
    assert found.state == state
    assert any(said in reason for reason in found.refusals) if said else found.refusals == []


def test_nodes_of_the_inventory_that_slurm_does_not_know_are_named(cluster):
    found = ask(Commands(), (replace(cluster.nodes[0], name="other", alias="other"), *cluster.nodes[1:8]))
    assert (found.state, found.unknown) == ("usable", ["other"])


def test_where_slurm_does_not_answer_it_is_said(cluster):
    def silent(argv, **options):
        return Outcome(tuple(argv), 1, 0.0, "", "Unable to contact slurm controller (connect failure)\n")

    with pytest.raises(InfrastructureError, match="Unable to contact"):
        survey.ask(jobs.SlurmClient(slurm_settings.Settings(), patience_s=0.0, run=silent), cluster.nodes, named=False)


@pytest.mark.parametrize("width", [50, 80])
def test_what_people_see(cluster, width):
    other = replace(cluster.nodes[0], name="other", alias="other")
    nodes = (*cluster.nodes, other)
    commands = Commands(
        sinfo(node003=DRAINED, node006=("down*", "Not responding"), node007=("down*", "Not responding"))
    )
    text = survey.describe(ask(commands, nodes), slurm_settings.Settings(), width)
    assert max(map(len, text.splitlines())) <= width
    golden(f"slurm/check-{width}.txt", text + "\n")


def test_the_exit_code_says_the_same():
    assert setup._SURVEYED == {
        "usable": errors.EXIT_OK, "down": errors.EXIT_INFRASTRUCTURE, "refused": errors.EXIT_USAGE
    }  # fmt: skip


def check(*arguments):
    return CliRunner().invoke(cli, ["check", "-i", str(EXAMPLE), *arguments])


def test_a_dry_run_of_the_example_inventory_shows_what_slurm_would_be_asked():
    done = check("--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["host"] == "this machine"
    assert [argv[0] for argv in plan["commands"]] == ["scontrol", "sinfo", "scontrol", "sbatch"]
    assert json.loads(check("--dry-run", "--json", "--set", "slurm.login=gpu001").stdout)["host"] == "gpu001"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tags", "verify"), "--tags selects roles"),
        (("--set", "slurm.partion=gpu"), "did you mean 'partition'"),
        (("--set", "sft.steps=3"), "unknown setting"),
        (("--backend", "slum"), "did you mean 'slurm'"),
        (("--backend", "local"), "unknown backend 'local'"),
        (("--backend", "ssh", "--set", "slurm.partition=gpu"), "requires --backend slurm, this backend is ssh"),
        (("--hosts", "gpu009"), "unknown node 'gpu009'"),
        (("--set", "slurm.login=elsewhere"), "slurm.login: unknown host 'elsewhere'"),
    ],
)
def test_a_mistake_is_said_before_anything_is_asked(arguments, said):
    error = check(*arguments).exception
    assert isinstance(error, UsageError) and said in str(error) and "\n" not in str(error)


def test_the_commented_settings_of_the_example_hold_too():
    """Somebody removes the # in front of them."""
    text = re.sub(r"^( +)# (?=[a-z_]+: .*)", r"\1", (EXAMPLE / "hosts.yml").read_text(), flags=re.MULTILINE)
    variables = yaml.safe_load(text)["all"]["children"]["gpu_nodes"]["vars"]["runner_slurm"]
    assert set(slurm_settings.Settings.model_fields) - set(variables) == {"stuck_s"}
    assert slurm_settings.settings(variables, "example").wait_s == 12 * 3600
