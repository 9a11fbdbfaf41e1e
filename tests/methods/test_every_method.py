"""Properties of every registered method: a killed run goes on bit for bit, two processes do what one does, pages of help."""

import json

import pytest
from click.testing import CliRunner

from advkd.cli.main import main
from advkd.errors import InputError
from advkd.methods import METHODS, method_class

from ..conftest import fork, fork_ranks
from .worker import follow, tiny_run

UPDATES, KILL_AT = 6, 5
"""Updates of a tiny run, which writes a checkpoint every second one, and the one before which it is killed."""

RUNS = [*((name, "trajectories") for name in METHODS), ("adv-kd", "labelled_paths"), ("pairs", "labelled_paths")]
"""Methods with their data: those whose generator takes classes learn from labelled trajectories, too."""


def work(name, data, out, how):
    return fork("-m", "tests.methods.worker", name, data, out, how).finish(240)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of a method on trajectories in one process, made once."""
    runs = {}

    def run(name, data):
        if (name, data) not in runs:
            done = work(name, data, out := tmp_path_factory.mktemp("whole") / "run", "-")
            assert done.returncode == 0, done.stderr[-3000:]
            runs[name, data] = json.loads(out.with_name("run.json").read_text())
            assert len(runs[name, data]["history"]) == UPDATES
        return runs[name, data]

    return run


@pytest.fixture
def data(request):
    """The trajectories that a row of :data:`RUNS` names."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("name", "data"), RUNS, indirect=["data"])
def test_a_killed_run_goes_on_bit_for_bit(name, data, whole, tmp_path):
    out = tmp_path / "run"
    assert work(name, data, out, str(KILL_AT)).returncode == -9
    with pytest.raises(InputError, match="add --resume"):
        tiny_run(name, data, out)
    done = work(name, data, out, "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = json.loads((tmp_path / "run.json").read_text())
    assert resumed["state"] == whole(name, data)["state"]
    assert 0 < len(resumed["history"]) < UPDATES
    assert resumed["history"] == whole(name, data)["history"][-len(resumed["history"]) :]


@pytest.mark.parametrize(("name", "data"), RUNS, indirect=["data"])
def test_two_processes_do_what_one_does(name, data, whole, tmp_path):
    ranks = fork_ranks("-m", "tests.methods.worker", name, data, tmp_path / "run", "-")
    if not method_class(name).parallel:
        assert all(done.returncode and "runs in one process" in done.stderr for done in ranks)
        return
    assert all(done.returncode == 0 for done in ranks), ranks[0].stderr[-3000:]
    both = json.loads((tmp_path / "run.json").read_text())["history"]
    for one, two in zip(whole(name, data)["history"], both, strict=True):
        assert one.keys() == two.keys()
        assert all(abs(one[key] - two[key]) <= 1e-9 * max(1.0, abs(one[key])) for key in one)


@pytest.mark.parametrize("name", METHODS)
def test_seeds_give_other_runs(name, whole, trajectories, tmp_path):
    """Equality above is not that of runs that do nothing."""
    history, other = follow(tiny_run(name, trajectories, tmp_path, seed=1))["history"], whole(name, trajectories)["history"]
    assert history[0]["loss"] != other[0]["loss"] and len({row["loss"] for row in history}) == UPDATES


@pytest.mark.parametrize("name", METHODS)
def test_a_method_describes_itself(name):
    kind = method_class(name)
    assert kind.name == name and kind.reference and kind.Config.__doc__
    page = CliRunner().invoke(main, ["distill", name, "--help"])
    assert (page.exit_code == 0) == kind.distils
    if kind.distils:
        assert " ".join(kind.reference.split()) in " ".join(page.output.split())
        assert name in CliRunner().invoke(main, ["distill"]).output


@pytest.mark.parametrize("name", METHODS)
def test_a_complete_run_does_not_go_on(name, trajectories, tmp_path):
    run = tiny_run(name, trajectories, tmp_path)
    for number in range(UPDATES):
        assert run.done == number
        run.step()
    with pytest.raises(RuntimeError, match="the run is complete"):
        run.step()
    assert run.done == UPDATES and run.stage_index == len(run.stages)


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match="method must be one of adv-kd, "):
        method_class("no-such")
