"""Which machines run a command together: their number, which one this is, and where they meet. Torch-free.

Nothing but the environment says so, in the words of whoever started the job, read in this order:

    torchrun    PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR (or PET_RDZV_ENDPOINT, with the port)
    SLURM       SLURM_STEP_NUM_NODES, SLURM_NODEID, the first name of SLURM_STEP_NODELIST
    SkyPilot    SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK, the first line of SKYPILOT_NODE_IPS

SLURM_NODEID counts the machines of a job step (srun), and a step may run on some machines of the job: SLURM_NNODES and
SLURM_JOB_NODELIST, which are those of the job, are read where nothing says what the step has. PET_MASTER_PORT is the
port of the head for each kind of job.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma2.core.errors import UsageError

__all__ = ["PORT", "Meeting", "first_host", "meeting_of"]

PORT = 29500  # torchrun's own
PORT_NAME = "PET_MASTER_PORT"
LAST_PORT = 65535
ADDRESS = r"[\w.:-]+"  # what torch's rendezvous takes
PORTS = 1000  # a job of a scheduler takes the one that its number gives, so that two on a machine differ


@dataclass(frozen=True)
class Meeting:
    """One machine among those of a job.

    nodes  how many there are
    node   the number of this one; 0 is the head, where all meet
    head   address of the head; empty on a single machine
    port   of the head
    """

    nodes: int = 1
    node: int = 0
    head: str = ""
    port: int = PORT

    @property
    def place(self) -> str:
        """Address and port of the head."""
        return f"[{self.head}]:{self.port}" if ":" in self.head else f"{self.head}:{self.port}"


@dataclass(frozen=True)
class JobVariables:
    """The variables of one kind of job: number of machines, number of this one, addresses, number of the job.

    Of several names the first one that is set counts. endpoint: address and port in one, where no address is set.
    """

    name: str
    count: tuple[str, ...]
    node: str
    hosts: tuple[str, ...]
    endpoint: str = ""
    number: str = ""


JOBS = (
    JobVariables("torchrun", ("PET_NNODES",), "PET_NODE_RANK", ("PET_MASTER_ADDR",), endpoint="PET_RDZV_ENDPOINT"),
    JobVariables(
        "SLURM",
        ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
        "SLURM_NODEID",
        ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
        number="SLURM_JOB_ID",
    ),
    JobVariables("SkyPilot", ("SKYPILOT_NUM_NODES",), "SKYPILOT_NODE_RANK", ("SKYPILOT_NODE_IPS",)),
)


def meeting_of(nodes: int, words: Sequence[str], environment: Mapping[str, str]) -> Meeting:
    """Return this machine's place among `nodes`, which `--nodes` gives.

    words  the command line after `gemma2`, for the line to start elsewhere

    Raises UsageError if the environment does not say who is where, or says another number.
    """
    if nodes == 1:
        return Meeting()
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    for job in JOBS:
        if job.node in given:
            return _of_job(job, nodes, given)
    line = shlex.join(["gemma2", *words])
    raise UsageError(
        f"--nodes {nodes}: nothing says which of the machines this is",
        f"start this on each, K = 0 .. {nodes - 1}, HOST the address of number 0: "
        f"PET_NODE_RANK=K PET_MASTER_ADDR=HOST {line}",
        "--nodes",
    )


def _of_job(job: JobVariables, nodes: int, given: Mapping[str, str]) -> Meeting:
    counted = _first_set(job.count, given)
    count, node = _number(counted, given) if counted else nodes, _number(job.node, given)
    if count != nodes:
        raise UsageError(f"--nodes {nodes}, but {counted} of {job.name} is {count}", f"give --nodes {count}", "--nodes")
    if not 0 <= node < nodes:
        raise UsageError(
            f"{job.node} is {node}, and --nodes {nodes} are 0 .. {nodes - 1}",
            "start one command on each machine, and no more",
        )
    named = _first_set(job.hosts, given)
    head, port = (first_host(given[named]), "") if named else _parted(given.get(job.endpoint, ""))
    if not head:
        raise UsageError(f"{job.node} is set and {job.hosts[-1]} is not", "set it to the address of node 0")
    if not re.fullmatch(ADDRESS, head):
        raise UsageError(
            f"{named or job.endpoint} gives {head!r} as the address of node 0", "set it to a name or an IP"
        )
    if PORT_NAME in given:
        return Meeting(nodes, node, head, _port(PORT_NAME, given[PORT_NAME], ""))
    if port:
        return Meeting(nodes, node, head, _port(job.endpoint, port, "HOST:PORT, PORT "))
    number = given.get(job.number, "")
    return Meeting(nodes, node, head, PORT + int(number) % PORTS if number.isdecimal() else PORT)


def _first_set(names: Sequence[str], given: Mapping[str, str]) -> str:
    return next((name for name in names if name in given), "")


def _number(name: str, given: Mapping[str, str]) -> int:
    """The number that a variable holds; torchrun allows `2:2`, the least and the most machines."""
    least, _, most = given[name].partition(":")
    if not least.isdecimal() or (most and most != least):
        raise UsageError(f"{name} is {given[name]!r}", "set it to a whole number")
    return int(least)


def _port(name: str, text: str, form: str) -> int:
    """The port that a variable holds. form: what its value looks like around the port."""
    if not text.isdecimal() or not 1 <= int(text) <= LAST_PORT:
        raise UsageError(f"the port in {name} is {text!r}", f"set it to {form}a whole number from 1 to {LAST_PORT}")
    return int(text)


def _parted(endpoint: str) -> tuple[str, str]:
    """Return (address, port) of `HOST`, `HOST:PORT`, `[IPV6]`, `[IPV6]:PORT` or a bare IPv6 address; "" for no port."""
    if bracketed := re.fullmatch(r"\[([^\]]*)\]:?(.*)", endpoint):
        return bracketed[1], bracketed[2]
    host, _, port = endpoint.partition(":")
    return (endpoint, "") if ":" in port else (host, port)


def first_host(hosts: str) -> str:
    """Return the first name of a list: by lines, by commas, or in SLURM's short form.

    >>> first_host("gpu[003-006,9],login1")
    'gpu003'
    >>> first_host("[fd00::4]")
    'fd00::4'
    """
    if address := re.match(
        r"\[([^\]]*:[^\]]*)\]", hosts.strip()
    ):  # SLURM's brackets hold numbers, and have a name first
        return address[1]
    first = re.match(r"(?:[^,\s\[]|\[[^\]]*\])*", hosts.strip())
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""
