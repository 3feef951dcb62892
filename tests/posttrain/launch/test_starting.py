"""What `--gpus` and `--nodes` come to: refused, one GPU, several processes, or nothing under torchrun."""

import math
import os
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from gemma2.core.errors import OutputError, UsageError
from gemma2.core.outputs.staging import locked
from gemma2.core.progress import SILENT
from gemma2.core.ranks import Ranks
from gemma2.posttrain.launch import starting
from gemma2.posttrain.launch.agreement import check_shares, divides
from gemma2.posttrain.launch.nodes import Meeting
from gemma2.posttrain.launch.shared_disk import check_token
from gemma2.posttrain.launch.starting import devices, started
from gemma2.posttrain.runs.machine import Memory, visible_devices
from gemma2.posttrain.schemas import (
    ConvertConfig,
    DistillConfig,
    EvalConfig,
    GenerateConfig,
    RewardConfig,
    RlhfConfig,
    SftConfig,
    WarpConfig,
)
from gemma2.posttrain.tiny.networks import random_model

HERE = Path("here")
WORDS = ["sft", "--gpus", "2"]


class Notes:
    """Progress that keeps its notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher, no job."""
    for name in list(os.environ):
        if name.startswith(("PET_", "SLURM_", "SKYPILOT_", "CUDA_VISIBLE", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored afterwards, whatever is done to it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")


@pytest.fixture
def runs(monkeypatch):
    """What would be started; the exit code of it is 5."""
    found = []
    monkeypatch.setattr(starting, "run_processes", lambda processes: found.append(processes) or 5)
    return found


def gpus(tmp_path, monkeypatch, *free):
    """A machine with GPUs: a driver's tool that lists them, MiB free."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo 'NVIDIA H, {one}'\n" for one in free), encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def sft(**more):
    return SftConfig(model=HERE, data=(HERE,), **more)


# --- the GPUs of this machine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        (None, "0 1 2"),
        ("2,0", "2 0"),
        ("", ""),
        ("-1", ""),
        ("1,-1,2", "1"),
        ("7", ""),
        ("0,7,1", "0"),
        ("GPU-ab", "GPU-ab"),
    ],
)
def test_visible_gpus_are_those_that_cuda_would_see(tmp_path, monkeypatch, given, keys):
    gpus(tmp_path, monkeypatch, 100, 200, 300)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [gpu.key for gpu in visible_devices()] == keys.split()
    known = [gpu for gpu in visible_devices() if gpu.key.isdigit()]
    assert [gpu.memory for gpu in known] == [Memory((int(gpu.key) + 1) * 100 * 2.0**20, "NVIDIA H") for gpu in known]


def test_accelerators_that_no_tool_names_are_counted_by_torch_only_if_a_flag_asks(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(starting, "COUNT", "print(4)")
    assert devices(asked=False) == ()
    assert [gpu.key for gpu in devices(asked=True)] == ["0", "1", "2", "3"]
    monkeypatch.setattr(starting, "COUNT", "import gone")
    assert devices(asked=True) == ()


@pytest.mark.parametrize(
    ("given", "seen", "keys"),
    [
        ("4,5", 2, "4 5"),
        ("4,5,9", 2, "4 5"),  # torch sees those in front of one that does not exist
        ("GPU-ab, 5", 2, "GPU-ab 5"),
        ("0", 3, "0 1 2"),  # of accelerators that do not go by this variable
    ],
)
@pytest.mark.parametrize("tool", [None, "exit 1", "echo broken"])
def test_gpus_that_the_driver_does_not_list_keep_the_names_that_the_user_has_chosen(
    tmp_path, monkeypatch, runs, given, seen, keys, tool
):
    monkeypatch.setenv("PATH", str(tmp_path))
    if tool is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{tool}\n", encoding="utf-8")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(starting, "COUNT", f"print({seen})")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [gpu.key for gpu in devices(asked=True)] == keys.split()
    assert started(sft(gpus=2), WORDS, SILENT) == 5
    assert list(runs[0].keys) == keys.split()[:2]
    assert started(sft(gpus=1), WORDS, SILENT) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == keys.split()[0]


def test_a_gpu_whose_free_memory_the_driver_does_not_say_is_a_gpu(tmp_path, monkeypatch):
    gpus(tmp_path, monkeypatch, 100, "[N/A]", 300)
    assert [gpu.key for gpu in visible_devices()] == ["0", "1", "2"]
    assert math.isnan(visible_devices()[1].memory.free)


# --- flags ------------------------------------------------------------------------------------------------------------


def test_a_machine_without_gpus_refuses_the_flag_and_names_torchrun(monkeypatch, runs):
    monkeypatch.setattr(starting, "COUNT", "print(0)")
    with pytest.raises(UsageError) as caught:
        started(sft(gpus=3), WORDS, SILENT)
    assert "torchrun --nproc-per-node 3 -m gemma2.cli.main" in str(caught.value)
    with pytest.raises(UsageError, match=r"no GPU that torch can use; drop --gpus$"):
        started(sft(gpus=1), WORDS, SILENT)
    assert started(sft(), WORDS, SILENT) is None
    assert runs == []


@pytest.mark.parametrize(("flags", "here"), [({"nodes": 2}, 1), ({"nodes": 2, "gpus": 4}, 4)])
def test_machines_without_gpus_get_the_line_of_torchrun_which_leads_to_a_run(monkeypatch, runs, flags, here):
    monkeypatch.setattr(starting, "COUNT", "print(0)")
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PET_MASTER_ADDR", "head")
    words = [
        "sft",
        "--data",
        "a b.jsonl",
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]
    with pytest.raises(UsageError, match="and this machine has no GPU that torch can use; to run on CPUs") as caught:
        started(sft(**flags), words, SILENT)
    program, *line = shlex.split(caught.value.hint.partition(": ")[2].replace(" K ", " 1 "))
    asked = get_args_parser().parse_args(line)
    assert (program, asked.module, asked.training_script) == ("torchrun", True, "gemma2.cli.main")
    assert (asked.nnodes, asked.node_rank, asked.nproc_per_node) == ("2", 1, str(here))
    assert (asked.master_addr, asked.master_port, asked.training_script_args) == ("head", 29500, words)
    for name, value in {"RANK": here, "WORLD_SIZE": 2 * here, "LOCAL_WORLD_SIZE": here, "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))  # as torchrun does
    assert started(sft(**flags), words, SILENT) is None
    assert runs == []


def test_more_gpus_than_are_visible_are_refused(tmp_path, monkeypatch, runs):
    gpus(tmp_path, monkeypatch, 100, 200)
    with pytest.raises(UsageError, match=r"--gpus 8, and 2 .* are visible; give --gpus 2, or more"):
        started(sft(gpus=8), WORDS, SILENT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(UsageError, match="1 of this machine are visible, by CUDA_VISIBLE_DEVICES=1; give --gpus 1"):
        started(sft(gpus=2), WORDS, SILENT)
    assert runs == []


def test_several_gpus_are_a_process_each(tmp_path, monkeypatch, runs):
    gpus(tmp_path, monkeypatch, 100, 200, 300)
    assert started(sft(gpus=2), WORDS, SILENT) == 5
    assert (runs[0].words, runs[0].keys, runs[0].meeting) == (("sft", "--gpus", "2"), ("0", "1"), Meeting())
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("PET_MASTER_ADDR", "head")
    assert started(sft(nodes=2, batch_size=12), WORDS, SILENT) == 5  # on several machines all GPUs, if none are named
    assert (runs[1].keys, runs[1].first) == (("0", "1", "2"), 3)


def test_one_gpu_is_the_one_with_most_free_memory_and_nothing_is_started(tmp_path, monkeypatch, runs):
    gpus(tmp_path, monkeypatch, 100, 300, 200)
    assert started(sft(gpus=1), WORDS, SILENT) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # the numbers are those of the driver's list
    assert runs == []


def test_numbers_that_the_user_has_given_keep_their_meaning(tmp_path, monkeypatch, runs):
    gpus(tmp_path, monkeypatch, 100, 300, 200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert started(sft(gpus=1), WORDS, SILENT) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2" and "CUDA_DEVICE_ORDER" not in os.environ


def test_under_a_launcher_nothing_is_started_and_the_flags_have_to_agree(tmp_path, monkeypatch, runs):
    gpus(tmp_path, monkeypatch, 100, 200)
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for config in (sft(), sft(gpus=4), sft(gpus=2, nodes=2), sft(nodes=2)):
        assert started(config, WORDS, SILENT) is None
    for config, said in ((sft(gpus=2), "--gpus 2 --nodes 1 is 2"), (sft(nodes=4), "--nodes 4 is 8")):
        with pytest.raises(UsageError, match=f"WORLD_SIZE is 4, and {said} processes; drop these flags"):
            started(config, WORDS, SILENT)
    with pytest.raises(UsageError, match="--batch-size 6 is not a multiple of the 4 processes; give --batch-size 8"):
        started(sft(batch_size=6), WORDS, SILENT)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and runs == []


def test_commands_without_the_flags_and_warp_are_left_alone(tmp_path, monkeypatch, runs):
    gpus(tmp_path, monkeypatch, 100, 200)
    assert started(ConvertConfig(source=HERE), ["filter"], SILENT) is None
    warp = WarpConfig(sft=HERE, prompts=HERE, heldout=HERE, reward_fn=("m:f",), gpus=2)
    assert started(warp, ["warp"], SILENT) is None
    assert "CUDA_VISIBLE_DEVICES" not in os.environ and runs == []


def test_engines_that_run_elsewhere_are_one_process(tmp_path, monkeypatch, runs):
    gpus(tmp_path, monkeypatch, 100, 200)
    config = GenerateConfig(teacher=HERE, prompts=HERE, engine="openai", gpus=2)
    with pytest.raises(UsageError, match="--engine openai runs them elsewhere; drop these flags"):
        started(config, ["generate"], SILENT)
    assert runs == []


# --- no flag ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny model, 4 bytes of which per weight are far below a GiB."""
    place = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(place)
    return place


def test_without_a_flag_one_gpu_is_used_where_the_model_fits(tmp_path, monkeypatch, runs, model):
    gpus(tmp_path, monkeypatch, 20000, 30000)
    said = Notes()
    assert started(sft().model_copy(update={"model": model, "max_length": 64}), ["sft"], said) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert said.notes == ["2 GPUs are visible, one is used; --gpus 2 uses all"]


def test_without_a_flag_as_many_gpus_as_share_a_step_are_used_where_it_does_not(tmp_path, monkeypatch, runs, model):
    gpus(tmp_path, monkeypatch, *[500] * 5)  # less than CUDA's own share
    said = Notes()
    assert started(sft().model_copy(update={"model": model, "max_length": 64}), ["sft"], said) == 5
    assert len(runs[0].keys) == 4  # a batch of 16
    assert "5 GPUs are visible, 4 are used: one would need" in said.notes[0]
    # Models that are only read are whole on each GPU: several would not help.
    measured = EvalConfig(model=model, sft=model, prompts=HERE, reward_fn=("m:f",))
    assert started(measured, ["eval"], said) is None


# --- the rows of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "processes", "fix"),
    [
        (sft(batch_size=12), 8, "give --batch-size 16, or --batch-size 8"),
        (sft(batch_size=3), 8, "give --batch-size 8"),
        (RewardConfig(model=HERE, data=HERE, batch_size=9), 2, "give --batch-size 10, or --batch-size 8"),
        (
            RlhfConfig(policy=HERE, prompts=HERE, prompts_per_step=6),
            4,
            "give --prompts-per-step 8, or --prompts-per-step 4",
        ),
        (DistillConfig(model=HERE, teacher=HERE, prompts=HERE, batch_size=8, n=4), 4, "give --batch-size 16"),
    ],
)
def test_a_step_that_processes_cannot_share_is_refused_with_a_number_that_works(config, processes, fix):
    with pytest.raises(UsageError) as caught:
        check_shares(config, processes)
    assert caught.value.hint == fix
    check_shares(config, 1)
    words = fix.replace("give ", "").replace("or ", "").split(", ")
    for flag, value in (word.split() for word in words):
        check_shares(config.model_copy(update={flag[2:].replace("-", "_"): int(value)}), processes)


def test_commands_without_steps_are_shared_by_any_number():
    assert divides(GenerateConfig(teacher=HERE, prompts=HERE, batch_size=3), 7)


# --- the disk of several machines -------------------------------------------------------------------------------------


class Pair(Ranks):
    """A rank of two, whose other one sees a disk of its own."""

    def on_main(self, work):
        return work()

    def gather(self, value):
        return [value, ("1", False)]


def test_a_machine_that_does_not_see_the_output_is_named_and_the_token_removed(tmp_path):
    with pytest.raises(UsageError, match="machine 1 of the job does not see it; give a path on a shared disk"):
        check_token(Pair(0, 2), tmp_path / "new" / "out", "0")
    assert list((tmp_path / "new").iterdir()) == []
    check_token(Ranks(), tmp_path / "out", "0")
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_the_token_of_a_start_that_was_killed_is_removed_by_the_next_one_and_that_of_one_at_work_stays(tmp_path):
    left = tmp_path / ".out.token-0123456789abcdef"
    others = [tmp_path / ".out2.token-0123456789abcdef", tmp_path / ".out.token-data"]
    for path in (left, *others):
        path.write_bytes(b"of a user" if path.name.endswith("data") else b"")
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="another gemma2 process is writing"):
        check_token(Ranks(), tmp_path / "out", "0")
    assert left.exists()
    check_token(Ranks(), tmp_path / "out", "0")
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_token_is_looked_for_under_the_lock(tmp_path):
    class Slow(Ranks):
        def gather(self, value):
            with pytest.raises(OutputError, match="another gemma2 process is writing"):
                check_token(Ranks(), tmp_path / "out", "0")  # a second start, which must not remove the token
            assert list(tmp_path.glob(".out.token-*"))
            return [value]

    check_token(Slow(), tmp_path / "out", "0")
    assert list(tmp_path.iterdir()) == []
