"""The parts that run benchmarks: each case with its floor and provenance, behind the gate of its parity tests."""

import functools
import importlib
import time

import torch

from ..cases import student
from ..evidence import module_of
from ..harness import absent_package, format_case, is_green, run_case
from ..limits import predictions
from . import kept
from .parity import GATES, parity_gate
from .summary import read_json

QUICK = {
    "bench_student": [
        "paper-256, batch 8, bfloat16",
        "pyramid-256, batch 1, bfloat16",
        "digits, batch 1, bfloat16",
        "paper-256, batch 1, bfloat16",
        "pyramid-256, batch 8, bfloat16",
        "digits, batch 64, bfloat16",
        "paper-256, batch 64, bfloat16",
        "pyramid-256, batch 64, bfloat16",
        "paper-256, batch 8, float32",
        "paper-256, batch 8, bfloat16, max-autotune",
        "pyramid-256, batch 1, bfloat16, max-autotune",
    ],
    "bench_conv_block": [
        "128 to 128 at 256, batch 8, bfloat16",
        "128 to 128 up to 256, batch 8, bfloat16",
        "48 to 48 up to 128, and at 128, batch 8, bfloat16",
        "32 to 32 at 256, to 3, batch 8, bfloat16",
        "the stem of pyramid-256 up to 16, batch 1, bfloat16",
        "144 to 144 at 8, batch 1, bfloat16",
        "128 to 3 at 256, batch 8, bfloat16",
        "128 to 128 at 128, batch 8, float32",
    ],
    "bench_sampler_step": ["deterministic, float32", "with noise, float32", "pooled by 4, float32"],
    "bench_gradient_penalty": ["penalty, narrow, 64, 64", "update, narrow, 64, 64"],
    "bench_norm_act": ["with up-sampling, bfloat16", "without up-sampling, float32"],
}
"""The cases that a short run measures, the most telling first; ``--full`` takes all."""
REHEARSED_CASES = {"bench_student": ["digits, batch 1, bfloat16", "digits, batch 64, bfloat16"]}
"""Cases that a rehearsal enters, where the others take a processor minutes."""
ALL = ", with costly peers"
"""Ends the name of a case that is measured once more with all contestants, until it stands for the one with fewer."""
UNDECIDED = {"incomplete": "the parity tests are not through yet", "none ran": "no parity test of these kernels has run"}
"""State of a gate that is neither green nor red -> why the part is not finished."""
LEAST = 5.0
"""Seconds that must be left for a case to begin."""


def bench(name):
    """A part that runs a benchmark's cases: all of them without their costly contestants first, then with all."""

    def run(part):
        module = importlib.import_module(module_of(name))
        cases = module.cases("cuda") if part.full or not hasattr(module, "quick_cases") else module.quick_cases()
        chosen = REHEARSED_CASES.get(name, QUICK[name]) if part.rehearse else QUICK[name]
        wanted = list(cases) if part.full else [case for case in chosen if case in cases]
        _use_measured_rates(part)
        gate = parity_gate(GATES[name], part)
        print(f"parity tests: {gate}", flush=True)
        part.red = gate["state"] == "red"
        part.result |= {"benchmark": name, "gate": gate, "parity_tests": GATES[name], "wanted": wanted}
        known = kept.cases(part.kept, name) if part.kept else {}
        for case in wanted:
            if part.left() > LEAST:
                work = functools.partial(_measured, part, cases[case], False)
                part.run(case, lambda case=case, work=work: known[case] if case in known else work())
        for case in filter(functools.partial(_is_pending, part), wanted):
            if part.left() > LEAST:
                found = part.run(case + ALL, functools.partial(_measured, part, cases[case], True))
                if found["state"] == "done":
                    part.keep(case, part.items.pop(case + ALL))
        missing, pending = ([c for c in wanted if c not in part.items], [c for c in wanted if _is_pending(part, c)])
        notes = [f"no time for {len(missing)} cases: {', '.join(missing)}"] if missing else []
        notes += [f"no time for the costly peers of {', '.join(pending)}"] if pending else []
        notes += [UNDECIDED[gate["state"]]] if gate["state"] in UNDECIDED else []
        if notes:
            part.result["unfinished"] = "; ".join(notes)
        return {"said": f"{sum('contestants' in item for item in part.items.values())} cases, parity tests {gate['state']}"}

    return run


def _is_pending(part, case):
    return any("pending" in entry for entry in part.items.get(case, {}).get("contestants", ()))


def _use_measured_rates(part):
    """Floors are counted with the card's own rates where part ``rates`` has them."""
    stored = read_json(part.out / "gpu_rates.json", kept.NOTHING)
    found = stored["result"].get("items", {}).get("rates", {})
    if "flops" in found:
        student.MEASURED_RATES[:] = [predictions.H200.measured(found["flops"], found["bandwidth"])]


def _measured(part, build_case, costly):
    begin = time.monotonic()
    if part.rehearse:
        from tests import gpu_dry_run

        with gpu_dry_run.stand_in(most_bytes=2**30):
            return rehearsed(build_case())
    result = _described(run_case(build_case(), costly=costly or part.full), part.place)
    print(format_case(result) + f"\n  ({time.monotonic() - begin:.0f} s)", flush=True)
    torch.cuda.empty_cache()
    return {**result, "red": not is_green(result)}


def rehearsed(case):
    """Run a case's contestants on a stand-in for a GPU; red where one stops for another reason than the lack of a device."""
    from tests import gpu_dry_run

    entries, red = [], False
    for contestant in case.contestants:
        how, error = gpu_dry_run.how_far(lambda: contestant.prepare()())
        absent = error is not None and absent_package(error)
        said = f"needs {absent}, which is not installed" if absent else how
        entries.append({"name": contestant.name, "kind": contestant.kind, "missing": said})
        red |= error is not None and not absent
        print(f"  {case.name}: {contestant.name}: {said}", flush=True)
    return {"case": case.name, "moved_bytes": None, "ratio": None, "contestants": entries, "red": red}


def _described(result, place):
    """A case's result with its provenance and a floor."""
    result = {**result, "provenance": place}
    if "floor" not in result and result["moved_bytes"]:
        seconds = result["moved_bytes"] / student.gpu_rates().bandwidth
        result["floor"] = {"seconds": seconds, "bytes": result["moved_bytes"]}
    return result
