"""Every layer of the fused students on this processor: algorithm, useful rate, share of the rate in registers.

python -m profiling.cases.layers [--out FOLDER]
"""

from dataclasses import asdict

import torch

from advkd.runtime.files import write_json
from advkd.runtime.timing import percentiles

from ..harness import gated_folder, provenance
from .student import DTYPES, PARITY_TESTS, SHAPES, plausible_student

REPEATS = 5
"""Plans measured of each student."""


def measure(preset, dtype):
    """One preset's plan with measured times, as JSON values."""
    fused = plausible_student(preset).fuse("cpu", DTYPES[dtype])
    plans = [fused.plan() for _ in range(REPEATS)]
    plan = plans[0]
    peak = plan.rate[DTYPES[dtype]]
    rows = []
    for same in zip(*(plan.rows for plan in plans)):
        row, seconds = same[0], percentiles([other.measured for other in same])
        figures = {k: v for k, v in asdict(row).items() if k not in ("layer", "measured")}
        rate = row.direct_products / seconds["median"]
        rows.append({**asdict(row.layer), **figures, "seconds": seconds, "gflops": 2e-9 * rate, "of_peak": rate / peak})
    rate = {str(kind).removeprefix("torch."): value for kind, value in plan.rate.items()}
    return {"preset": preset, "dtype": dtype, "isa": plan.isa, "products_per_second": rate, "layers": rows}


def main():
    out = gated_folder(__doc__.splitlines()[0], PARITY_TESTS)
    students = [measure(preset, dtype) for preset in SHAPES for dtype in DTYPES]
    threads = torch.get_num_threads()
    result = {"students": students, "threads": threads, "parity_tests": PARITY_TESTS, "provenance": provenance()}
    write_json(out / "layers.json", result)


if __name__ == "__main__":
    main()
