"""Every layer of the fused students on this processor: algorithm, useful rate, share of the rate in registers.

python -m profiling.layers [--out FOLDER]
"""

from dataclasses import asdict

import torch

from advkd.files import write_json

from .bench_student import DTYPES, PARITY_TESTS, SHAPES, plausible_student
from .harness import gated_folder, provenance


def measure(preset, dtype):
    """One preset's plan with measured times, as JSON values."""
    plan = plausible_student(preset).fuse("cpu", DTYPES[dtype]).plan()
    peak = plan.rate[DTYPES[dtype]]
    rows = []
    for row in plan.rows:
        figures = {k: v for k, v in asdict(row).items() if k != "layer"}
        rates = {"gflops": 2e-9 * row.direct_products / row.measured, "of_peak": row.direct_products / row.measured / peak}
        rows.append({**asdict(row.layer), **figures, **rates})
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
