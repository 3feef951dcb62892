"""The exchange between the processes of a job, with threads in their place: values in order, one error for all."""

import threading

import pytest

from gemma2.core import ranks as module
from gemma2.core.errors import GuardStop, InputError, OutputError, UsageError
from gemma2.core.ranks import Failure, RankEnd, Ranks


class Together:
    """A table where the ranks of one job leave their values; those of one exchange are read when all have left one."""

    def __init__(self, size):
        self.size = size
        self.values = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def every(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def run(self, work):
        """What `work(ranks)` returned or raised, by rank."""
        found = [None] * self.size

        def one(rank):
            try:
                found[rank] = work(Ranks(rank, self.size))
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a rank waits for ever"
        return found


@pytest.fixture(params=[2, 3])
def job(request, monkeypatch):
    table = Together(request.param)
    monkeypatch.setattr(Ranks, "_every", lambda self, value: table.every(self.rank, value))
    return table


def test_every_rank_gets_all_values_and_what_rank_0_returns(job):
    def work(ranks):
        with ranks.agreed():
            return ranks.gather(ranks.rank), ranks.on_main(lambda: f"of {ranks.rank}")

    assert job.run(work) == [(list(range(job.size)), "of 0")] * job.size


@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_items_are_dealt_in_turns_and_come_back_in_order(job, count):
    computed = [[] for _ in range(job.size)]

    def work(ranks):
        def double(item):
            computed[ranks.rank].append(item)
            return 2 * item

        return list(ranks.dealt(range(count), double))

    assert job.run(work) == [[2 * item for item in range(count)]] * job.size
    assert computed == [list(range(count))[rank :: job.size] for rank in range(job.size)]


@pytest.mark.parametrize("error", [InputError("a row", "fix it", "f:3"), GuardStop("KL"), UsageError("flag", "drop")])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("where", ["before", "between", "in dealt work", "on rank 0", "at the end"])
def test_an_error_of_one_rank_is_raised_by_rank_0_and_ends_the_others_with_its_code(job, error, failing, where):
    failing = 0 if where == "on rank 0" else failing

    def fail(ranks, here):
        if ranks.rank == failing and where == here:
            raise type(error)(error.what, error.hint, error.where)

    def work(ranks):
        with ranks.agreed(), ranks.agreed():  # of the command line, and of the command
            fail(ranks, "before")
            ranks.gather(1)
            fail(ranks, "between")
            list(ranks.dealt(range(7), lambda item: fail(ranks, "in dealt work")))
            ranks.on_main(lambda: fail(ranks, "on rank 0"))
            fail(ranks, "at the end")

    first, *others = job.run(work)
    assert type(first) is type(error)
    assert (first.what, first.hint, first.where) == (error.what, error.hint, error.where)
    assert all(isinstance(other, RankEnd) and other.code == error.exit_code for other in others)


def test_of_several_errors_rank_0_raises_its_own_and_else_the_first(job):
    def work(ranks, start):
        with ranks.agreed():
            if ranks.rank >= start:
                raise InputError(f"rank {ranks.rank}")
            ranks.barrier()

    for start in (0, 1):
        first, *others = job.run(lambda ranks, start=start: work(ranks, start))
        assert str(first) == f"rank {start}"
        assert [other.code for other in others] == [1] * (job.size - 1)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_is_a_failure_of_all(job, failing):
    def work(ranks):
        with ranks.agreed():
            if ranks.rank == failing:
                raise OSError(28, "No space left on device", "out")
            ranks.barrier()

    first, *others = job.run(work)
    if failing == 0:
        assert type(first) is OSError
    else:
        assert str(first).startswith("No space left on device: out; ")
    assert [other.code for other in others] == [1] * (job.size - 1)


def test_a_bug_is_not_sent_and_keeps_its_traceback():
    assert Failure.of(KeyError("x")) is None
    with pytest.raises(KeyError), Ranks(1, 2).agreed():
        raise KeyError("x")


def test_each_class_of_error_comes_back_as_itself():
    for kind in (InputError, OutputError, UsageError, GuardStop):
        made = Failure.of(kind("what", "hint", "where")).error()
        assert type(made) is kind and str(made) == "what; hint" and getattr(made, module.HEARD)
