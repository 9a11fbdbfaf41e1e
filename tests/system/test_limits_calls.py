"""Random calls of the public functions: the cases that a campaign begins with, through the same code."""

import tempfile

import pytest

pytest.importorskip("diffusers")

from advkd import ops  # noqa: E402
from profiling.limits import calls  # noqa: E402
from profiling.limits.call_modes import MODES  # noqa: E402
from profiling.limits.record import Campaign  # noqa: E402

CASES = 700


def test_random_calls_are_right_or_refused():
    campaign = Campaign("calls", seed=0)
    calls.run(campaign, range(CASES))
    assert not campaign.failures
    tried = {row["kind"]: row["right"] for row in campaign.rows()}
    assert set(ops.__all__) <= set(tried) and all(tried[name] for name in ops.__all__)
    assert sum(row["tried"] for row in campaign.rows()) == CASES


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_cases_that_are_right_or_refused(mode, tmp_path, monkeypatch):
    """The first case in which the mode has a meaning."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for number in range(CASES, 2 * CASES):
        call, _, spoilt, draw = calls.case(0, number)
        if spoilt is not None:
            continue
        outcome, detail, tried = calls.judge(call, mode, draw)
        assert outcome in ("right", "refused"), detail
        if tried == mode:
            return
    raise AssertionError(f"no case of mode {mode}")


def test_a_case_is_the_same_in_every_run():
    (one, mode, spoilt, _), (other, *also, _) = calls.case(0, 5), calls.case(0, 5)
    assert one.name == other.name and [mode, spoilt] == also and list(one.arguments) == list(other.arguments)
    assert calls.case(1, 5)[0].arguments is not one.arguments


def test_a_call_that_ends_its_process_is_one_finding(monkeypatch):
    """The cases behind it are judged all the same."""
    real = calls.judge

    def judge(call, mode, draw):
        if draw.generator.initial_seed() == victim:
            calls.os._exit(7)
        return real(call, mode, draw)

    victim = calls.case(0, 2)[3].generator.initial_seed()
    monkeypatch.setattr(calls, "judge", judge)
    campaign = Campaign("calls", seed=0)
    calls.run(campaign, range(5))
    assert [(failure["case"], failure["outcome"]) for failure in campaign.failures] == [(2, "crashed")]
    assert sum(row["tried"] for row in campaign.rows()) == 5
