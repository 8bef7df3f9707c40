"""Who is at fault where one node does not reach another: the broken ends and nobody else, or nobody."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from role_modules import ROOT, load

_spec = importlib.util.spec_from_file_location("pairs", ROOT / "roles/ssh_mesh/action_plugins/ssh_mesh_pairs.py")
role = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(role)
mesh = load("ssh_mesh")

REFUSED = "ssh: connect to host 10.0.0.2 port 44222: Connection refused"
DENIED = "root@10.0.0.2: Permission denied (publickey)."
CHANGED = "Host key verification failed."


def names(count):
    return [f"n{number:02d}" for number in range(count)]


def grid(count, broken=(), most=15, single=()):
    """{(from, to): whether it works} of a mesh with these broken ends, and these single broken pairs."""
    return {
        (one, other): not {(role.FROM, one), (role.TO, other)} & {*broken} and (one, other) not in single
        for one in names(count)
        for other in mesh.chosen(names(count), one, most)
        if one != other
    }


@st.composite
def meshes(draw):
    """A mesh whose ends are broken on less than half of the other nodes of each, so that all can be told."""
    count, most = draw(st.integers(4, 24)), draw(st.integers(6, 15))
    few = min(most, count - 1)
    nodes = draw(st.lists(st.sampled_from(names(count)), unique=True, max_size=max(1, (few - 1) // 2)))
    broken = {end for node in nodes for end in draw(st.sampled_from([[role.FROM], [role.TO], [role.FROM, role.TO]]))
              for end in [(end, node)]}  # fmt: skip
    return count, most, broken


@given(meshes())
def test_the_broken_ends_are_found_and_no_other(given_mesh):
    count, most, broken = given_mesh
    assert role.attribute(grid(count, broken, most)) == (broken, [])


@given(meshes(), st.data())
def test_a_pair_alone_blames_nobody(given_mesh, data):
    count, most, broken = given_mesh
    whole = grid(count, broken, most)
    pair = data.draw(st.sampled_from(sorted(whole)))
    one, other = pair
    # Both its nodes reach and are reached by others.
    if any(whole[p] for p in whole if p[0] == one and p != pair) and any(
        whole[p] for p in whole if p[1] == other and p != pair
    ):
        ends, unclear = role.attribute({**whole, pair: False})
        assert ends == broken and unclear == ([pair] if whole[pair] else [])


@given(st.integers(2, 12), st.data())
def test_whatever_fails_nobody_is_blamed_for_an_end_that_works_and_no_failure_is_lost(count, data):
    pairs = {pair: data.draw(st.booleans()) for pair in grid(count)}
    ends, unclear = role.attribute(pairs)
    for (one, other), good in pairs.items():
        assert not (good and {(role.FROM, one), (role.TO, other)} & ends)
        assert good or (one, other) in unclear or {(role.FROM, one), (role.TO, other)} & ends


def test_of_two_nodes_one_is_told_by_its_connection_to_itself():
    both = {("a", "b"): False, ("b", "a"): True, ("a", "a"): True}
    assert role.attribute({**both, ("b", "b"): True}) == (set(), [("a", "b")])
    assert role.attribute({**both, ("b", "b"): False}) == ({(role.TO, "b")}, [])


def test_who_is_named_already_explains_what_fails_at_it():
    pairs = {("a", "b"): False, ("b", "a"): True}
    assert role.attribute(pairs, known={"b"}) == ({(role.TO, "b")}, [])
    assert role.attribute(pairs, known={"a"}) == ({(role.FROM, "a")}, [])
    # A node that has lost one other's key says so itself.
    assert role.attribute(grid(4, single=[("n00", "n01")]), known={"n01"}) == (set(), [])
    assert role.attribute(grid(4, single=[("n00", "n01")]), known={"n02"}) == (set(), [("n00", "n01")])


ALIASES = {f"n{number:02d}": f"node{number + 1:03d}" for number in range(24)}
SETUP = "`runner setup -i lab --tags ssh_mesh`"


def verdicts(count, reason, broken=(), single=(), known=(), alone=()):
    found = {name: {name: {reason: [name]} if name in alone else {}} for name in names(count)}
    for (one, other), good in grid(count, broken, single=single).items():
        found[one][other] = {} if good else {reason.replace("10.0.0.2", f"10.0.0.{other[1:]}"): [other]}
    return role.verdicts(found, known, ALIASES, SETUP)


@pytest.mark.parametrize(
    ("reason", "direction", "said", "advice"),
    [
        (REFUSED, role.TO, "Connection refused", "start sshd there"),
        (
            "ssh: connect to host 10.0.0.2 port 22: Connection timed out",
            role.TO,
            "Connection timed out",
            "its port is open",
        ),
        (CHANGED, role.TO, CHANGED, SETUP),
        (DENIED, role.TO, "Permission denied (publickey).", "the log of sshd"),
        (DENIED, role.FROM, "Permission denied (publickey).", SETUP),
        (CHANGED, role.FROM, CHANGED, SETUP),
        (
            "ssh: connect to host 10.0.0.2 port 22: No route to host",
            role.FROM,
            "No route to host",
            "network and firewall",
        ),
        ("ssh: Could not resolve hostname n02: Name or service not known", role.FROM, "Could not resolve", "network"),
    ],
)
def test_one_cause_is_one_line_on_one_node(reason, direction, said, advice):
    ((name, (problem,)),) = verdicts(8, reason, {(direction, "n02")}).items()
    assert name == "n02" and problem["what"] == f"ssh {direction} this node"
    assert problem["found"].startswith(said) and problem["found"].endswith("(7 of 7)")
    assert advice in problem["remedy"]


def test_a_node_cut_off_both_ways_is_one_line():
    ((name, (problem,)),) = verdicts(8, REFUSED, {(role.TO, "n02"), (role.FROM, "n02")}).items()
    assert (name, problem["what"], problem["found"]) == ("n02", "ssh to and from this node", "Connection refused")


def test_equal_faults_of_two_nodes_can_be_folded():
    told = verdicts(8, REFUSED, {(role.TO, "n02"), (role.TO, "n05")})
    assert told.keys() == {"n02", "n05"} and told["n02"] == told["n05"]


def test_a_pair_of_which_nobody_is_to_blame_is_one_line_of_both():
    told = verdicts(8, REFUSED, single=[("n02", "n05")])
    assert told.keys() == {"n02", "n05"} and told["n02"] == told["n05"]
    assert told["n02"][0]["what"] == "ssh from node003 to node006" and "either" in told["n02"][0]["remedy"]


def test_a_node_that_does_not_reach_itself_says_so():
    ((name, (problem,)),) = verdicts(8, REFUSED, alone=["n02"]).items()
    assert name == "n02" and problem["what"] == "ssh from this node to itself"


def test_where_all_is_well_nothing_is_said():
    assert verdicts(8, REFUSED) == {}
