"""Forked children end as fresh processes do."""

import time

import pytest

from ..conftest import fork, fork_ranks, start

ENDS = ("sys.exit()", "sys.exit(3)", "sys.exit('a text')", "sys.exit([])", "raise KeyboardInterrupt", "1 / 0", "pass")


@pytest.mark.parametrize("end", ENDS)
def test_ends_are_those_of_a_fresh_interpreter(end):
    code = f"import atexit, sys; atexit.register(print, 'the end'); {end}"
    forked, fresh = (by("-c", code).finish(60) for by in (fork, start))
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_hash_seeds_differ():
    code = "import os; print(os.environ['PYTHONHASHSEED'], hash('a'))"
    one, two = (fork("-c", code).finish(60).stdout for _ in range(2))
    again = fork("-c", code, environment={"PYTHONHASHSEED": one.split()[0]}).finish(60).stdout
    fresh = start("-c", code, environment={"PYTHONHASHSEED": one.split()[0]}).finish(60).stdout
    assert one.split()[1] != two.split()[1] and one == again == fresh


def test_threads_are_those_of_the_warm_process():
    with pytest.raises(AssertionError, match="one thread"):
        fork("-c", "pass", environment={"OMP_NUM_THREADS": "2"})


def test_the_others_of_a_group_are_ended_after_a_failure(monkeypatch):
    monkeypatch.setattr("tests.conftest.GRACE", 0.2)
    code = "import os, time; rank = int(os.environ['RANK']); print('rank', rank, flush=True); rank or time.sleep(100); 1 / 0"
    begin = time.monotonic()
    first, second = fork_ranks("-c", code)
    assert (first.returncode, second.returncode, first.stdout) == (-9, 1, "rank 0\n") and "ZeroDivisionError" in second.stderr
    assert time.monotonic() - begin < 60
