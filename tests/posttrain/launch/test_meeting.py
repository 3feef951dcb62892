"""Who is where: what torchrun, SLURM and SkyPilot say of a job with several machines."""

import pytest

from gemma2.core.errors import UsageError
from gemma2.posttrain.launch.nodes import PORT, Meeting, first_host, meeting_of

WORDS = ["sft", "--data", "a b.jsonl", "--gpus", "8", "--nodes", "2"]
PET = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head"}
SLURM = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123042"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5\n"}


@pytest.mark.parametrize(
    ("environment", "meeting"),
    [
        (PET, Meeting(2, 1, "head", PORT)),
        (PET | {"PET_MASTER_PORT": "1234", "PET_NNODES": "2:2"}, Meeting(2, 1, "head", 1234)),
        ({"PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "head:77"}, Meeting(2, 0, "head", 77)),
        ({"PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "head"}, Meeting(2, 0, "head", PORT)),
        (SLURM, Meeting(2, 1, "gpu07", PORT + 42)),
        (SKY, Meeting(2, 1, "10.0.0.4", PORT)),
        (SKY | SLURM | PET, Meeting(2, 1, "head", PORT)),  # what is given by hand counts first
    ],
)
def test_a_job_says_who_is_where(environment, meeting):
    assert meeting_of(2, WORDS, environment) == meeting


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
        (PET | {"PET_MASTER_PORT": "here"}, "PET_MASTER_PORT is 'here'; set it to a whole number"),
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
