"""Random calls of the public functions: the cases that a campaign begins with, through the same code."""

import importlib
import itertools
import os
import tempfile
import time

import pytest
import torch

pytest.importorskip("diffusers")

from advkd import ops  # noqa: E402
from advkd.errors import InputError  # noqa: E402
from advkd.models.fused_student import FusedStudent  # noqa: E402
from profiling.limits import calls  # noqa: E402
from profiling.limits.call_modes import MODES, QUOTAS, has_meaning  # noqa: E402
from profiling.limits.record import Campaign, judge_in_processes  # noqa: E402

CASES = 700


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Folders that cases draw go with the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_random_calls_are_right_or_refused():
    campaign = Campaign("calls", seed=0)
    calls.run(campaign, range(CASES))
    assert not campaign.failures
    tried = {row["kind"]: row["right"] for row in campaign.rows()}
    assert set(ops.__all__) <= set(tried) and all(tried[name] for name in ops.__all__)
    assert sum(row["tried"] for row in campaign.rows()) == CASES


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_cases_that_are_right_or_refused(mode):
    """The first case in which the mode has a meaning."""
    for number in range(CASES, 2 * CASES):
        call, _, _, draw = calls.case(0, number)
        if call.spoilt or not has_meaning(mode, call):
            continue
        outcome, detail, tried = calls.judge(call, mode, draw)
        assert outcome in ("right", "refused"), detail
        assert tried == mode
        return
    raise AssertionError(f"no case of mode {mode}")


@pytest.mark.parametrize("mode", QUOTAS)
def test_costly_modes_come_regularly_and_mean_something(mode):
    numbers = range(QUOTAS[mode] - 1, 3 * QUOTAS[mode], QUOTAS[mode])
    for call, drawn, spoilt, _ in (calls.case(3, number) for number in numbers):
        assert drawn == mode and spoilt is None and has_meaning(mode, call)


def _faults(name, count=40):
    """The findings in the first calls of a function."""
    found = []
    for number in itertools.count():
        call, mode, _, draw = calls.case(0, number)
        if call.name == name and mode in ("plain", "no_grad"):
            count -= 1
            outcome, detail, _ = calls.judge(call, mode, draw)
            found += [detail] * (outcome not in ("right", "refused"))
        if count == 0:
            return found


def test_images_that_are_scaled_are_found(monkeypatch):
    forward = FusedStudent.forward
    assert not _faults("FusedStudent")
    scale = {torch.bfloat16: 0.8, torch.float64: 1.0}
    monkeypatch.setattr(FusedStudent, "forward", lambda self, z: forward(self, z) * scale.get(self.dtype, 1 - 1e-3))
    assert _faults("FusedStudent")


def test_statistics_that_stay_are_found(monkeypatch):
    assert not _faults("norm_act")
    monkeypatch.setattr(importlib.import_module("advkd.ops.norm_act"), "_move", lambda *given: None)
    assert any("afterwards" in fault for fault in _faults("norm_act"))


def test_an_out_that_is_ignored_is_found(monkeypatch):
    step = ops.sampler_step
    monkeypatch.setattr(ops, "sampler_step", lambda *given, out=None, **options: step(*given, **options))
    assert "a result is not in out" in _faults("sampler_step")


def test_a_valid_call_that_is_refused_is_found(monkeypatch):
    real = ops.mask_mul

    def mask_mul(x, *given, **options):
        if isinstance(x, torch.Tensor) and not x.is_contiguous():
            raise InputError("x must be contiguous")
        return real(x, *given, **options)

    monkeypatch.setattr(ops, "mask_mul", mask_mul)
    assert "a valid call is refused: x must be contiguous" in _faults("mask_mul")


def test_a_message_names_an_argument_and_not_just_its_letter():
    call, *_ = next(case for case in (calls.case(0, number) for number in range(500)) if case[0].name == "interpolate")
    call.spoilt = ["a"]
    named, other = "a must be (2,), got 3", "this is a wrong number"
    assert calls._is_clear(call, "plain", InputError(named), named)
    assert not calls._is_clear(call, "plain", InputError(other), other)
    assert not calls._is_clear(call, "plain", ValueError(named), named)


def test_a_case_is_the_same_in_every_run():
    (one, mode, spoilt, _), (other, *also, _) = calls.case(0, 5), calls.case(0, 5)
    assert one.name == other.name and [mode, spoilt] == also and list(one.arguments) == list(other.arguments)
    assert calls.case(1, 5)[0].arguments is not one.arguments


def test_a_call_that_ends_its_process_is_one_finding(monkeypatch):
    """The cases after it are judged all the same."""
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


def test_cases_that_hang_or_die_are_one_finding_each():
    def judge(number):
        yield {"kind": "some", "detail": "so far:"}
        if number == 1:
            time.sleep(600)
        if number == 3:
            os._exit(7)
        yield {"kind": "some", "outcome": "right", "detail": ""}

    campaign = Campaign("some", seed=0)
    judge_in_processes(campaign, range(6), judge, size=3, seconds=2, memory=2**31)
    found = [(failure["case"], failure["outcome"], failure["detail"]) for failure in campaign.failures]
    assert found == [(1, "crashed", "so far: a hang"), (3, "crashed", f"so far: the process ended with status {7 << 8}")]
    assert [(row["tried"], row["right"]) for row in campaign.rows()] == [(6, 4)]
