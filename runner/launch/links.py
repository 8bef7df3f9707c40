"""Whether nodes reach each other and are connected alike: asked of all at once for `runner check`, judged here.

Each node listens while each of the others tries it, so that both directions of every pair are known. `survey` asks,
everything else is a pure function of the answers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.cluster.backends import BACKENDS
from runner.cluster.environments import numbers
from runner.cluster.inventory import Node
from runner.launch import talk
from runner.node import links
from runner.node.protocol import SILENCE_S, Linked, Message, Reached, Word
from runner.node.requests import LinksRequest
from runner.plan.engines.ranks import PORTS
from runner.system.nodeset import fold
from runner.system.wording import counted

# Of torchrun's own rendezvous, of this product's, and one of those that the kernel gives out, where gloo and NCCL
# listen. Ports that another process has are no fault: what has it says so.
TRIED = (29500, PORTS[0], 47123)
SLOWEST_MBIT_PER_S = 1000
_LISTEN_S, _CONNECT_S = 30.0, 30.0

Failed = Mapping[str, Mapping[str, Mapping[str, str]]]  # source -> target -> port -> reason


@dataclass(frozen=True)
class Survey:
    """The answers of `nodes`, by name: what each says of itself, and which connections failed from it to others.

    A node that has not answered is in neither; why is known to who asked whether nodes can be reached.
    """

    nodes: Sequence[Node]
    linked: Mapping[str, Linked] = field(default_factory=dict)
    failed: Failed = field(default_factory=dict)

    def blocked(self) -> dict[tuple[str, str], dict[str, str]]:
        """{(source, target): {port: reason}} of what does not come through, by names, in the inventory's order.

        A refusal of a port that another process has on the target came from there, so the way is open.
        """
        found = {}
        for source in self.nodes:
            for target in self.nodes:
                taken = {str(port) for port in self.linked[target.name].taken} if target.name in self.linked else set()
                reasons = {
                    port: reason
                    for port, reason in self.failed.get(source.name, {}).get(target.name, {}).items()
                    if not (port in taken and reason == links.REFUSED)
                }
                if reasons:
                    found[source.name, target.name] = reasons
        return found

    def problems(self) -> dict[str, list[dict[str, str]]]:
        """By a node's name, its problems as roles tell them: what, expected, found, remedy."""
        found: dict[str, list[dict[str, str]]] = {}
        if len(self.nodes) > 1:
            for name, problem in [*self._unreached(), *self._of_links(), *self._of_drivers()]:
                found.setdefault(name, []).append(problem)
        for node in self.nodes:
            found.setdefault(node.name, []).extend(self._of_power(node))
        return {name: problems for name, problems in found.items() if problems}

    def matrix(self) -> dict[str, dict[str, Any]]:
        """{source: {target: {}, or {port: reason}}} by alias, of the nodes that have answered."""
        blocked, tried = self.blocked(), [node for node in self.nodes if node.name in self.failed]
        there = [node for node in self.nodes if node.name in self.linked]
        return {
            source.alias: {
                target.alias: blocked.get((source.name, target.name), {}) for target in there if target is not source
            }
            for source in tried
        }

    def to_json(self) -> dict[str, Any]:
        """What `runner check --json` has of it."""
        return {
            "ports": list(TRIED),
            "matrix": self.matrix(),
            "nodes": {node.alias: vars(self.linked[node.name]) for node in self.nodes if node.name in self.linked},
        }

    def described(self) -> str:
        """The matrix as text, rows from and columns to a node, with only those that are concerned; "" for one node."""
        from tabulate import tabulate

        matrix = self.matrix()
        if len(matrix) < 2:
            return ""
        ports = ", ".join(map(str, TRIED))
        concerned = {alias for s, row in matrix.items() for t, reasons in row.items() if reasons for alias in (s, t)}
        if not concerned:
            return f"{counted(len(matrix), 'node')} reach each other in both directions, TCP ports {ports}"
        shown = [node.alias for node in self.nodes if node.alias in concerned]
        rows = [[source, *(_cell(matrix.get(source, {}), source, target) for target in shown)] for source in shown]
        title = f"from (rows) to (columns), TCP ports {ports}"
        rest = len(matrix) - len(shown)
        more = f"\n{counted(rest, 'further node')} reached and reach all" if rest > 0 else ""
        return f"{title}\n{tabulate(rows, headers=['', *shown])}{more}"

    # --- what is wrong ---

    def _unreached(self) -> Iterable[tuple[str, dict[str, str]]]:
        blocked = self.blocked()
        by_name = {node.name: node for node in self.nodes}
        for source in self.nodes:
            targets = [target for s, target in blocked if s == source.name]
            others = [node.name for node in self.nodes if node.name in self.linked and node is not source]
            of_others = {t for s, t in blocked if s != source.name}
            if len(others) > 1 and set(others) == set(targets) and not set(targets) <= of_others:
                reasons = {port: why for t in targets for port, why in blocked[source.name, t].items()}
                yield source.name, self._way([source], [by_name[t] for t in targets], reasons, source)
                blocked = {pair: why for pair, why in blocked.items() if pair[0] != source.name}
        for target in self.nodes:
            alike: dict[tuple[tuple[str, str], ...], list[Node]] = {}
            for (source_name, t), reasons in blocked.items():
                if t == target.name:
                    alike.setdefault(tuple(reasons.items()), []).append(by_name[source_name])
            for told, sources in alike.items():
                yield target.name, self._way(sources, [target], dict(told), target)

    def _way(
        self, sources: Sequence[Node], targets: Sequence[Node], reasons: Mapping[str, str], at: Node
    ) -> dict[str, str]:
        """The problem that the way from `sources` to `targets` is blocked; `at` is the node where it is looked for."""
        way = f"{fold([node.alias for node in sources])} → {fold([node.alias for node in targets])}"
        by_reason: dict[str, list[str]] = {}
        for port, reason in reasons.items():
            by_reason.setdefault(reason, []).append(port)
        told = "; ".join(f"{reason} on {', '.join(ports)}" for reason, ports in by_reason.items())
        no_route = links.NO_ROUTE in by_reason
        source, target = sources[0], targets[0]
        if no_route:
            shows = f"`ip route get {target.address}` on {source.alias}"
            fixes = f"`sudo ip route del {target.address}` there where that is a blackhole, else with a route to it"
        else:
            shows, fixes = self._firewall(at, [node.address for node in (sources if at is target else targets)])
            if at is not target:
                fixes = f"{fixes}, and what it lets out"
        return {
            "what": f"{way} ({target.address}): TCP {told}" if len(targets) == 1 else f"{way}: TCP {told}",
            "expected": "",
            "found": "",
            "remedy": f"see {shows}; fix it with {fixes}",
        }

    def _firewall(self, node: Node, peers: Sequence[str]) -> tuple[str, str]:
        """The command that shows what `node` lets in, and the one that lets in all that `peers` send, as text."""
        linked = self.linked[node.name]
        first = peers[0]
        each = " for each of them" if len(peers) > 1 else ""
        if linked.firewall == "ufw":
            shows, fixes = "sudo ufw status verbose", f"sudo ufw allow from {first}"
        elif linked.firewall == "firewall-cmd":
            shows = "sudo firewall-cmd --list-all"
            fixes = f"sudo firewall-cmd --permanent --zone=trusted --add-source={first} && sudo firewall-cmd --reload"
        elif linked.firewall == "nft":
            family = "ip6" if ":" in first else "ip"
            shows = "sudo nft list ruleset"
            fixes = f"sudo nft insert rule {linked.chain or 'inet filter input'} {family} saddr {first} accept"
        elif linked.firewall == "iptables":
            shows, fixes = "sudo iptables -S INPUT", f"sudo iptables -I INPUT -s {first} -j ACCEPT"
        else:
            return (
                f"`tracepath {node.address}` on the others: {node.alias} has no firewall of its own",
                f"a rule for TCP from {', '.join(peers)} where the network is managed (security group, switch, router)",
            )
        return f"`{shows}` on {node.alias}", f"`{fixes}` there{each}"

    def _of_links(self) -> Iterable[tuple[str, dict[str, str]]]:
        of_name: dict[str, list[int]] = {}  # interfaces of one name are alike: a fabric's and that of management differ
        fastest: dict[str, int] = {}
        for name, linked in self.linked.items():
            for nic in linked.nics:
                if speed := _speed(nic):
                    of_name.setdefault(nic["name"], []).append(speed)
                    fastest[name] = max(speed, fastest.get(name, 0))
        for name, linked in self.linked.items():
            for nic in linked.nics:
                speeds = of_name.get(nic["name"], [])
                if len(speeds) < 2:
                    speeds = list(fastest.values()) if _speed(nic) == fastest.get(name) else []
                yield from ((name, problem) for problem in _of_nic(nic, _usual(speeds)))

    def _of_drivers(self) -> Iterable[tuple[str, dict[str, str]]]:
        found = {node.name: self.linked[node.name].driver for node in self.nodes if node.name in self.linked}
        versions = Counter(driver for driver in found.values() if driver)
        if len(versions) < 2:
            return
        usual = max(versions, key=lambda version: (versions[version], numbers(version)))
        package = f"nvidia-driver-{usual.partition('.')[0]}"
        remedy = (
            "see `nvidia-smi --query-gpu=driver_version --format=csv,noheader` there; fix it with the package manager "
            f"that has installed it, such as `sudo apt install {package}`, and a restart"
        )
        for name, driver in found.items():
            if driver and driver != usual:
                told = {"expected": f"{usual} as most nodes", "found": driver, "remedy": remedy}
                yield name, {"what": "NVIDIA driver", **told}

    def _of_power(self, node: Node) -> Iterable[dict[str, str]]:
        for path, value in self.linked[node.name].power.items() if node.name in self.linked else ():
            fast = "balanced or performance" if path.endswith("platform_profile") else "performance"
            fixes = {
                "platform_profile": "powerprofilesctl set performance",
                "energy_performance_preference": "sudo cpupower set --epp performance",
            }.get(path.rpartition("/")[2], "sudo cpupower frequency-set --governor performance")
            yield {
                "what": "power plan",
                "expected": fast,
                "found": value,
                "remedy": f"see `cat {path}` there; fix it with `{fixes}`",
            }


def survey(nodes: Sequence[Node], ssh_config: str | None) -> Survey:
    """Ask the agents of all `nodes`. Raises InfrastructureError if a command cannot be started.

    The first that is silent is not waited for longer than _LISTEN_S, and then tried by nobody.
    """
    if not BACKENDS[nodes[0].backend].remote:
        return Survey(nodes, {node.name: links.observe(node.env) for node in nodes})

    def request(node: Node) -> LinksRequest:
        return LinksRequest(TRIED, {each.name: each.address for each in nodes if each is not node}, node.env)

    sessions = talk.sessions(nodes, nodes[0].backend, ssh_config, request)
    linked: dict[str, Linked] = {}
    failed: dict[str, Mapping[str, Mapping[str, str]]] = {}
    began = time.monotonic()
    went: list[float] = []

    def note(session: talk.AgentSession, message: Message) -> None:
        if isinstance(message, Linked):
            linked[session.name] = message
        elif isinstance(message, Reached):
            failed[session.name] = message.failed

    def word(session: talk.AgentSession) -> Word | None:
        now = time.monotonic()
        alive = {each.name for each in sessions if each.alive}
        if not went and (alive <= linked.keys() or now - began > _LISTEN_S):
            went.append(now)
        if not went:
            return None
        if session.name not in linked:
            return Word.STOP  # it is given up
        return Word.STOP if alive <= failed.keys() or now - went[0] > _CONNECT_S + SILENCE_S else Word.GO

    talk.converse(sessions, note, word, patience_s=2.0)
    listened = {name: {t: why for t, why in each.items() if t in linked} for name, each in failed.items()}
    return Survey(nodes, linked, listened)


def _cell(row: Mapping[str, Mapping[str, str]], source: str, target: str) -> str:
    if source == target:
        return "–"
    if target not in row:
        return "?"
    reasons = row[target]
    if not reasons:
        return "ok"
    whys = sorted(set(reasons.values()))
    return f"{', '.join(whys)}" if len(reasons) == len(TRIED) else f"{', '.join(whys)} ({', '.join(reasons)})"


def _speed(nic: Mapping[str, Any]) -> int:
    """In Mbit/s; 0 where the driver does not say."""
    return max(0, nic.get("speed_mbit_per_s") or 0)


def _usual(speeds: Sequence[int]) -> int:
    """The speed that most have, the higher one of two."""
    counts = Counter(speeds)
    return max(counts, key=lambda speed: (counts[speed], speed), default=0)


def _of_nic(nic: Mapping[str, Any], usual: int) -> Iterable[dict[str, str]]:
    """What is wrong with an interface; `usual` is the speed that those like it have, in Mbit/s."""
    name, speed = nic["name"], _speed(nic)
    if nic.get("wireless"):
        yield {
            "what": f"{name}, which carries messages between ranks",
            "expected": "a wired link",
            "found": "a wireless one",
            "remedy": f"see `iw dev {name} link` there; fix it with a cable, and in the inventory "
            "`runner_env: {NCCL_SOCKET_IFNAME: NAME, GLOO_SOCKET_IFNAME: NAME}` of the wired interface",
        }
        return
    fixes = f"see `ethtool {name}` there; fix it with `sudo ethtool -s {name} autoneg on` and a good cable and port"
    if nic.get("duplex") == "half":
        yield {"what": f"duplex of {name}", "expected": "full", "found": "half", "remedy": fixes}
    expected = max(usual, SLOWEST_MBIT_PER_S)
    if 0 < speed < expected:
        yield {
            "what": f"speed of {name}",
            "expected": f"{expected / 1000:g} Gbit/s {'as most nodes' if usual == expected else 'or more'}",
            "found": f"{speed / 1000:g} Gbit/s",
            "remedy": fixes,
        }
