"""Who is where: what torchrun, SLURM and SkyPilot say of a job with several machines."""

from dataclasses import replace

import pytest
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from gemma2.core.errors import UsageError
from gemma2.posttrain.launch.nodes import PORT, Meeting, first_host, meeting_of

# A step on machines 3 and 4 of a job on four: SLURM_NODEID counts from the third.
STEP = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[09-10]", "SLURM_NNODES": "4"}
WORDS = ["sft", "--data", "a b.jsonl", "--gpus", "8", "--nodes", "2"]
PET = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head"}
ENDPOINT = {"PET_NODE_RANK": "0"}
SLURM = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123042"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n"}


@pytest.mark.parametrize(
    ("environment", "meeting"),
    [
        (PET, Meeting(2, 1, "head", PORT)),
        (PET | {"PET_MASTER_PORT": "1234", "PET_NNODES": "2:2"}, Meeting(2, 1, "head", 1234)),
        ({"PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "head:77"}, Meeting(2, 0, "head", 77)),
        ({"PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "head"}, Meeting(2, 0, "head", PORT)),
        ({"PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "[fd00::1]:77"}, Meeting(2, 0, "fd00::1", 77)),
        ({"PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "[fd00::1]"}, Meeting(2, 0, "fd00::1", PORT)),
        ({"PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "fd00::1"}, Meeting(2, 0, "fd00::1", PORT)),
        (PET | {"PET_MASTER_ADDR": "[fd00::1]"}, Meeting(2, 1, "fd00::1", PORT)),
        (PET | {"PET_RDZV_ENDPOINT": "other:77"}, Meeting(2, 1, "head", PORT)),
        (SLURM, Meeting(2, 1, "gpu07", PORT + 42)),
        (SLURM | STEP, Meeting(2, 1, "gpu09", PORT + 42)),
        (SKY, Meeting(2, 1, "10.0.0.4", PORT)),
        (SKY | SLURM | PET, Meeting(2, 1, "head", PORT)),  # what is given by hand counts first
    ],
)
def test_a_job_says_who_is_where(environment, meeting):
    assert meeting_of(2, WORDS, environment) == meeting


@pytest.mark.parametrize(
    "job",
    [
        PET,
        PET | {"PET_MASTER_PORT": ""},
        {"PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "head:77"},
        SLURM,
        SLURM | STEP,
        SKY,
        SLURM | {"PET_RDZV_ENDPOINT": "head:77"},
    ],
)
def test_the_port_that_errors_advise_to_set_counts_for_each_kind_of_job(job):
    before = meeting_of(2, WORDS, job)
    assert before.port != 1234
    assert meeting_of(2, WORDS, job | {"PET_MASTER_PORT": "1234"}) == replace(before, port=1234)


def test_torch_reads_the_address_and_the_port_of_the_head():
    for head in ("head", "10.0.0.4", "fd00::4"):
        assert parse_rendezvous_endpoint(Meeting(2, 0, head, 77).place, -1) == (head, 77)


def test_one_machine_asks_nobody():
    assert meeting_of(1, WORDS, SLURM | {"SLURM_NODEID": "nonsense"}) == Meeting()


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-006,9],login1", "gpu003"),
        ("gpu[9,12-14]", "gpu9"),
        ("rack[1-2]gpu[03-04]-ib,other", "rack1gpu03-ib"),
        ("10.0.0.4\n10.0.0.5", "10.0.0.4"),
        ("fd00::4 fd00::5", "fd00::4"),
        ("", ""),
    ],
)
def test_the_first_name_of_a_list_is_the_head(listed, first):
    assert first_host(listed) == first


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (SLURM | {"SLURM_NNODES": "4"}, "--nodes 2, but SLURM_NNODES of SLURM is 4; give --nodes 4"),
        (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID is 2, and --nodes 2 are 0 .. 1"),
        (SLURM | {"SLURM_JOB_NODELIST": ""}, "SLURM_NODEID is set and SLURM_JOB_NODELIST is not"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, "--nodes 2, but SLURM_STEP_NUM_NODES of SLURM is 1; give --nodes 1"),
        (PET | {"PET_MASTER_PORT": "here"}, "the port in PET_MASTER_PORT is 'here'; set it to a whole number from 1"),
        (PET | {"PET_MASTER_PORT": "99999"}, "the port in PET_MASTER_PORT is '99999'; set it to a whole number from 1"),
        (SLURM | {"PET_MASTER_PORT": "0"}, "the port in PET_MASTER_PORT is '0'; set it to a whole number from 1"),
        (
            ENDPOINT | {"PET_RDZV_ENDPOINT": "head:x"},
            "the port in PET_RDZV_ENDPOINT is 'x'; set it to HOST:PORT, PORT a",
        ),
        (PET | {"PET_MASTER_ADDR": "fe80::1%eth0"}, "PET_MASTER_ADDR gives 'fe80::1%eth0' as the address of node 0"),
        (PET | {"PET_NODE_RANK": "²"}, "PET_NODE_RANK is '²'; set it to a whole number"),
        (PET | {"PET_NNODES": "1:4"}, "PET_NNODES is '1:4'"),
    ],
)
def test_what_does_not_fit_is_one_line(environment, said):
    with pytest.raises(UsageError) as caught:
        meeting_of(2, WORDS, environment)
    assert said in str(caught.value)


def test_without_a_job_the_line_to_start_on_each_machine_is_shown_and_leads_to_a_meeting():
    with pytest.raises(UsageError, match="nothing says which") as caught:
        meeting_of(2, WORDS, {})
    line = caught.value.hint.partition(": ")[2]
    assert line == "PET_NODE_RANK=K PET_MASTER_ADDR=HOST gemma2 sft --data 'a b.jsonl' --gpus 8 --nodes 2"
    given = dict(word.split("=") for word in line.split()[:2]) | {"PET_NODE_RANK": "1"}
    assert meeting_of(2, WORDS, given) == Meeting(2, 1, "HOST", PORT)
