"""No kernel takes more instructions than the committed baseline says, under the baseline's compiler."""

import json
import platform
import warnings

import pytest

from profiling.limits import instruction_counts as counts

COMPILER, OTHER = (f"g++ {version}, {platform.machine()}" for version in (12, 13))


def entry(op="mask_mul, float32", instructions=1000, form="portable", elements=64):
    return {"op": op, "form": form, "instructions": instructions, "elements": elements}


def a_baseline(*entries, compiler=COMPILER):
    return {compiler: {"counts": list(entries), "provenance": {}}}


@pytest.mark.parametrize(
    "instructions, fails, noted", [(1050, False, False), (1051, True, False), (950, False, False), (949, False, True)]
)
def test_growth_fails_and_shrinking_is_noted(instructions, fails, noted):
    verdict = counts.judge([entry(instructions=instructions)], COMPILER, a_baseline(entry()))
    assert (bool(verdict.failures), bool(verdict.notes)) == (fails, noted)
    for line in verdict.failures:
        assert line == "mask_mul, float32 (portable, 64 elements): 1,051 instructions, 1,000 in the baseline (+5.1 %)"


def test_each_form_has_its_own_count():
    found = [entry(), entry(instructions=600, form="avx2")]
    failures, notes = counts.compare(found, [entry(), entry(instructions=500, form="avx2")])
    assert len(failures) == 1 and "avx2" in failures[0] and not notes
    # A processor without AVX2 cannot count that form.
    assert counts.compare([entry()], [entry(), entry(form="avx2")]) == ([], [])


def test_baseline_and_kernels_are_the_same_set():
    failures, _ = counts.compare([entry(), entry("new")], [entry(), entry("gone")])
    assert len(failures) == 2 and "new (" in failures[0] and "not in the baseline" in failures[0]
    assert "gone (" in failures[1] and "not counted any more" in failures[1]
    # Another size is not comparable.
    assert len(counts.compare([entry(elements=65)], [entry()])[0]) == 2


def test_another_compiler_only_reports():
    verdict = counts.judge([entry(instructions=2000), entry("new")], COMPILER, a_baseline(entry(), compiler=OTHER))
    assert verdict.baseline == OTHER and not verdict.failures
    assert COMPILER in verdict.notes[0] and counts.UPDATE in verdict.notes[0] and len(verdict.notes) == 3
    elsewhere = a_baseline(entry(), compiler="g++ 12, sparc64")
    for baseline in ({}, elsewhere):
        verdict = counts.judge([entry()], COMPILER, baseline)
        assert verdict.baseline is None and not verdict.failures and len(verdict.notes) == 1


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    if reason := counts.obstacle():
        pytest.skip(reason)
    return counts.build(tmp_path_factory.mktemp("drivers"))


@pytest.fixture(scope="module")
def measured(drivers):
    return {(name, form): counts.count(path, form) for name, path in drivers.items() for form in counts.FORMS}


def test_no_kernel_takes_more_than_the_baseline(measured):
    found = [entry for entries in measured.values() for entry in entries]
    verdict = counts.judge(found, counts.compiler(), counts.stored())
    for note in verdict.notes:
        warnings.warn(note, stacklevel=1)
    text = "\n".join(verdict.failures)
    assert not text, f"against the baseline of {verdict.baseline}:\n{text}\nif that is meant: {counts.UPDATE}"


@pytest.mark.parametrize("name", counts.DRIVERS)
def test_counts_repeat_whatever_the_environment(drivers, measured, name, tmp_path, monkeypatch):
    """Another length of the environment moves the stack, another folder changes the paths."""
    monkeypatch.chdir(tmp_path)
    assert counts.count(drivers[name], "portable", {"SOMETHING": "long" * 333}) == measured[name, "portable"]
    assert len({entry["op"] for entry in measured[name, "portable"]}) == len(measured[name, "portable"]) > 9


def test_an_update_replaces_one_compiler_and_keeps_what_was_not_counted(drivers, measured, tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({**a_baseline(entry(), entry(form="avx2")), **a_baseline(entry(), compiler=OTHER)}))
    counts.update([entry(instructions=3000)], COMPILER, path)
    baseline = counts.stored(path)
    assert (
        baseline[COMPILER]["counts"] == [entry(form="avx2"), entry(instructions=3000)]
        and "commit" in baseline[COMPILER]["provenance"]
    )
    assert baseline[OTHER]["counts"] == [entry()]
    counts.update(measured["step", "portable"], OTHER, path)
    assert counts.judge(measured["step", "portable"], OTHER, counts.stored(path)).failures == []


def test_the_table_has_every_kernel_once():
    lines = counts.table()
    for name, kept in counts.stored().items():
        assert any(f": {name}, instructions per element" in line for line in lines)
        for op in {entry["op"] for entry in kept["counts"]}:
            assert any(line.startswith(f"| {op} |") for line in lines)
