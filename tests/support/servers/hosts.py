"""Hosts on one machine: network namespaces with addresses and links of their own. Needs Linux, root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Self


def missing() -> str:
    """Why there can be no hosts here; empty if nothing is in the way."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        _run("unshare", "--net", "true")
    except (OSError, subprocess.CalledProcessError):
        return "network namespaces are not permitted"
    lacking = [program for program in ("ip", "tc") if shutil.which(program) is None]
    return f"{' and '.join(lacking)} not installed (iproute2)" if lacking else ""


class Hosts:
    """Hosts at the far ends of links to this process's own network namespace, which is the first of their network.

        with Hosts("merge", 3) as hosts:
            subprocess.run(["ip", "netns", "exec", hosts.names[0], "ping", "-c1", hosts.hub])

    Args:
        prefix: of the names of all that is made; at most eight characters.
        num_hosts: how many.
        network: the first three numbers of their addresses.
        mbit: what each link carries each way, in Mbit/s; None for no limit.
    """

    def __init__(self, prefix: str, num_hosts: int, *, network: str = "10.88.0", mbit: int | None = None) -> None:
        self._bridge = f"{prefix}-br"
        self._mbit = mbit
        self.names = [f"{prefix}-{number}" for number in range(num_hosts)]
        self.addresses = [f"{network}.{10 + number}" for number in range(num_hosts)]
        self.hub = f"{network}.1"

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()

    @staticmethod
    def path(name: str) -> Path:
        """Where the namespace of a host is found."""
        return Path("/run/netns", name)

    def throttle(self, host: str, kbit: int) -> None:
        """Have a host's link carry no more than so many kbit/s each way."""
        limit = ("root", "tbf", "rate", f"{kbit}kbit", "burst", "1600", "latency", "400ms")
        _run("tc", "qdisc", "replace", "dev", f"{host}-v", *limit)
        _run("ip", "netns", "exec", host, "tc", "qdisc", "replace", "dev", "eth0", *limit)

    def _make(self) -> None:
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.hub}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for host, address in zip(self.names, self.addresses, strict=True):
            far = f"{host}-v"
            _run("ip", "netns", "add", host)
            _run("ip", "-n", host, "link", "set", "lo", "up")
            _run("ip", "link", "add", far, "type", "veth", "peer", "name", "eth0", "netns", host)
            _run("ip", "link", "set", far, "master", self._bridge, "up")
            _run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", host, "link", "set", "eth0", "up")
            # Leads nowhere, but programs look for the way to the world to learn their own address.
            _run("ip", "-n", host, "route", "add", "default", "via", self.hub)
            if self._mbit is not None:
                limit = ("root", "tbf", "rate", f"{self._mbit}mbit", "burst", "256k", "latency", "100ms")
                _run("tc", "qdisc", "add", "dev", far, *limit)
                _run("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", "eth0", *limit)

    def _remove(self) -> None:
        for host in self.names:
            # Connections that still wait to end keep a namespace, and with it the link.
            subprocess.run(("ip", "link", "delete", f"{host}-v"), check=False, stderr=subprocess.DEVNULL)
            subprocess.run(("ip", "netns", "delete", host), check=False, stderr=subprocess.DEVNULL)
        subprocess.run(("ip", "link", "delete", self._bridge), check=False, stderr=subprocess.DEVNULL)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
