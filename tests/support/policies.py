"""NetworkPolicies of a rendered chart, enforced on the hosts of `tests.support.hosts` by the kernel's packet filter.

As Kubernetes means them: a pod that a policy selects gets, and sends, what one of its policies allows, and answers to
that. All pods are of one namespace, so that whoever is selected by a namespace's labels is not here. Knows ports by
number only. Needs nft.
"""

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from tests.support.chart import Object, of_kind
from tests.support.hosts import Host

Labels = Mapping[str, str]


def missing() -> str:
    """Why policies cannot be enforced here; empty when they can."""
    return "" if shutil.which("nft") else "nft is missing (Debian: apt-get install nftables)"


def selects(selector: Object, labels: Labels) -> bool:
    """Whether a selector by labels, the only kind that the chart has, means a pod with these."""
    assert set(selector) <= {"matchLabels"}, selector
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def enforce(objects: Sequence[Object], pods: Mapping[str, tuple[Host, Labels]]) -> None:
    """Puts the policies in force for pods, by name, that run on these hosts."""
    for host, labels in pods.values():
        mine = [
            policy["spec"]
            for policy in of_kind(list(objects), "NetworkPolicy").values()
            if selects(policy["spec"]["podSelector"], labels)
        ]
        rules = "\n".join(
            _chain(name, hook, way, peers, address, port, mine, pods)
            for name, hook, way, peers, address, port in (
                ("Ingress", "input", "iif", "from", "saddr", "dport"),
                ("Egress", "output", "oif", "to", "daddr", "dport"),
            )
            if any(name in policy["policyTypes"] for policy in mine)
        )
        host.run(["nft", "-f", "-"], stdin=f"table inet policies {{\n{rules}\n}}\n")


def _chain(
    name: str,
    hook: str,
    way: str,
    peers: str,
    address: str,
    port: str,
    policies: Sequence[Object],
    pods: Mapping[str, tuple[Host, Labels]],
) -> str:
    lines = [
        f"type filter hook {hook} priority 0; policy drop;",
        "ct state established,related accept",
        f'{way} "lo" accept',
    ]
    for policy in policies:
        for rule in policy.get(name.lower(), []):
            ports = [f"{asked['protocol'].lower()} {port} {asked['port']}" for asked in rule.get("ports", [])] or [""]
            where = [f"ip {address} {one}" for one in _addresses(rule[peers], pods)] if peers in rule else [""]
            lines += [f"{one} {what} accept" for one in where for what in ports]
    body = "\n".join(lines)
    return f"chain {hook} {{\n{body}\n}}"


def _addresses(peers: Sequence[Object], pods: Mapping[str, tuple[Host, Labels]]) -> Iterator[str]:
    for peer in peers:
        if "ipBlock" in peer:
            assert set(peer["ipBlock"]) == {"cidr"}, peer
            yield peer["ipBlock"]["cidr"]
        elif "namespaceSelector" not in peer:
            for host, labels in pods.values():
                if selects(peer["podSelector"], labels):
                    yield host.address


def reaches(source: Host, target: Host, port: int) -> bool:
    """Whether a connection can be made; a packet that is dropped tells nobody, so that this waits two seconds."""
    program = f"import socket; socket.create_connection(({target.address!r}, {port}), timeout=2)"
    return subprocess.run(source.command(["python3", "-c", program]), capture_output=True).returncode == 0
