"""Whose address a node has wrongly: the node that is misled is named, and nobody for what may be meant so."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cluster import addresses


@dataclass(frozen=True)
class Named:
    name: str
    alias: str
    address: str


def cluster(count, by_address=True):
    return [Named(f"gpu-{i}", f"node{i:03d}", f"10.0.0.{i}" if by_address else f"gpu-{i}") for i in range(1, count + 1)]


def right(nodes):
    """What all resolve where all is well; a node has its own name at 127.0.1.1, which is left out."""
    return {
        node.name: {
            word: [f"10.0.0.{other.name.removeprefix('gpu-')}"]
            for other in nodes
            if other != node
            for word in (other.name, other.alias)
        }
        for node in nodes
    }


def moved(seen, asked, name, address):
    """`seen`, where the node `asked` has another address for both words of the node `name`."""
    words = (name, f"node{int(name.removeprefix('gpu-')):03d}")
    return {**seen, asked: {**seen[asked], **{word: [address] for word in words}}}


@given(st.integers(2, 9), st.booleans(), st.data())
def test_swapped_entries_are_told_of_the_node_that_has_them_and_of_no_other(count, by_address, data):
    nodes = cluster(count + 2, by_address)
    asked, one, other = data.draw(st.permutations([node.name for node in nodes]))[:3]
    seen = moved(right(nodes), asked, one, f"10.0.0.{other.removeprefix('gpu-')}")
    seen = moved(seen, asked, other, f"10.0.0.{one.removeprefix('gpu-')}")
    told = addresses.wrong(nodes, seen)
    if len(nodes) > 4 or by_address:
        assert told.keys() == {asked} and one in told[asked] and other in told[asked]
    assert not addresses.wrong(nodes, right(nodes))


@pytest.mark.parametrize(
    ("nodes", "seen", "said"),
    [
        # A former address, which is nobody's now.
        (cluster(4), moved(right(cluster(4)), "gpu-3", "gpu-1", "10.9.9.9"),
         {"gpu-3": "has gpu-1 at 10.9.9.9, which the others have at 10.0.0.1: correct its /etc/hosts or DNS"}),
        (cluster(4, False), moved(right(cluster(4)), "gpu-3", "gpu-1", "10.9.9.9"), {"gpu-3": "has gpu-1 at 10.9.9.9"}),
        # Two nodes are enough where the inventory knows the addresses.
        (cluster(2), moved(right(cluster(2)), "gpu-1", "gpu-2", "10.0.0.1"), {"gpu-1": "has gpu-2 at 10.0.0.1, which is node001"}),
        # All are misled alike.
        (cluster(3), {node.name: {"gpu-1": ["10.0.0.2"]} for node in cluster(3)},
         {"gpu-2": "has gpu-1 at 10.0.0.2, which is node002", "gpu-3": "has gpu-1"}),
        # An alias alone.
        (cluster(3), {**right(cluster(3)), "gpu-3": {"node001": ["10.0.0.2"]}}, {"gpu-3": "has node001 at 10.0.0.2"}),
        # Nothing to say: a name on another network, on all nodes; one that only some know; one with both addresses.
        (cluster(3), {node.name: {"gpu-1": ["192.168.0.1"]} for node in cluster(3)}, {}),
        (cluster(3), {"gpu-2": {"gpu-1": ["10.0.0.1"]}, "gpu-3": {}}, {}),
        (cluster(3), moved(right(cluster(3)), "gpu-3", "gpu-1", "10.0.0.1"), {}),
        (cluster(3), {"gpu-2": {"gpu-1": ["10.0.0.1", "192.168.0.1"]}, "gpu-3": {"gpu-1": ["192.168.0.1"]}}, {}),
        # Two that differ, of names alone: either may be wrong.
        (cluster(3, False), {"gpu-2": {"gpu-1": ["10.0.0.1"]}, "gpu-3": {"gpu-1": ["10.0.0.9"]}}, {}),
        (cluster(3), {}, {}),
    ],
)  # fmt: skip
def test_a_wrong_address_is_told_with_whose_it_is_or_what_the_others_have(nodes, seen, said):
    told = addresses.wrong(nodes, seen)
    assert told.keys() == said.keys()
    assert all(told[name].startswith(text) for name, text in said.items())


def test_names_are_resolved_but_addresses_and_loopback_are_none():
    nodes = [*cluster(2), Named("h", "node003", "h.example"), Named("i", "i", "fd00::1")]
    assert addresses.names(nodes) == ["gpu-1", "node001", "gpu-2", "node002", "h", "node003", "h.example", "i"]
    assert addresses.resolve(["localhost", "no-such-name.invalid", "x" * 300, "a..b"]) == {}
    assert addresses.resolve(["10.1.2.3", "localhost"]) == {"10.1.2.3": ["10.1.2.3"]}
    assert addresses.resolve([]) == {}


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    block = threading.Event()
    monkeypatch.setattr(addresses, "LIMIT_S", 0.2)
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: [block.wait(20)] * 0)
    try:
        assert addresses.resolve(["a", "b"]) == {}
    finally:
        block.set()
