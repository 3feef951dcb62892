"""Which machines run a command together: their number, which one this is, and where they meet. Torch-free.

Nothing but the environment says so, in the words of whoever started the job, read in this order:

    torchrun    PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT (or PET_RDZV_ENDPOINT)
    SLURM       SLURM_NNODES, SLURM_NODEID, the first name of SLURM_JOB_NODELIST
    SkyPilot    SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK, the first line of SKYPILOT_NODE_IPS
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma2.core.errors import UsageError

__all__ = ["PORT", "Meeting", "first_host", "meeting_of"]

PORT = 29500  # torchrun's own
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


@dataclass(frozen=True)
class JobVariables:
    """The variables of one kind of job: number of machines, number of this one, addresses, number of the job."""

    name: str
    count: str
    node: str
    hosts: str
    port: str = ""
    number: str = ""


JOBS = (
    JobVariables("torchrun", "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", port="PET_MASTER_PORT"),
    JobVariables("SLURM", "SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_NODELIST", number="SLURM_JOB_ID"),
    JobVariables("SkyPilot", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"),
)


def meeting_of(nodes: int, words: Sequence[str], environment: Mapping[str, str]) -> Meeting:
    """Return this machine's place among `nodes`, which `--nodes` gives.

    words  the command line after `gemma2`, for the line to start elsewhere

    Raises UsageError if the environment does not say who is where, or says another number.
    """
    if nodes == 1:
        return Meeting()
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    if "PET_RDZV_ENDPOINT" in given and "PET_MASTER_ADDR" not in given:
        host, _, port = given["PET_RDZV_ENDPOINT"].rpartition(":")
        given |= {"PET_MASTER_ADDR": host, "PET_MASTER_PORT": port} if host else {"PET_MASTER_ADDR": port}
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
    count, node = _number(job.count, given, str(nodes)), _number(job.node, given, "")
    if count != nodes:
        raise UsageError(
            f"--nodes {nodes}, but {job.count} of {job.name} is {count}", f"give --nodes {count}", "--nodes"
        )
    if not 0 <= node < nodes:
        raise UsageError(
            f"{job.node} is {node}, and --nodes {nodes} are 0 .. {nodes - 1}",
            "start one command on each machine, and no more",
        )
    head = first_host(given.get(job.hosts, ""))
    if not head:
        raise UsageError(f"{job.node} is set and {job.hosts} is not", "set it to the address of node 0")
    port = PORT
    if job.port in given:
        port = _number(job.port, given, "")
    elif given.get(job.number, "").isdigit():
        port += int(given[job.number]) % PORTS
    return Meeting(nodes, node, head, port)


def _number(name: str, given: Mapping[str, str], default: str) -> int:
    """The number that a variable holds; torchrun allows `2:2`, the least and the most machines."""
    text = given.get(name, default)
    least, _, most = text.partition(":")
    if not least.isdigit() or (most and most != least):
        raise UsageError(f"{name} is {text!r}", "set it to a whole number")
    return int(least)


def first_host(hosts: str) -> str:
    """Return the first name of a list: by lines, by commas, or in SLURM's short form.

    >>> first_host("gpu[003-006,9],login1")
    'gpu003'
    """
    first = re.match(r"(?:[^,\s\[]|\[[^\]]*\])*", hosts.strip())
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""
