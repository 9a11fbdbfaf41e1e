"""Straightness of flows, one after another reflow.

python -m profiling.cases.straightness --students v,rf2,rf3 --num 256

A v network is a flow before any training as one: the first row may be the result of reparametrize. All paths begin at one start
noise. The table is ``profiling/results/<device>/straightness.json``.
"""

import argparse
from pathlib import Path

from advkd.diffusion.denoiser_student import DenoiserStudent
from advkd.evaluation.evaluate import REFERENCE_SEED
from advkd.methods.rectified_flow import straightness
from advkd.runtime.files import write_json
from advkd.runtime.timing import provenance

from ..evidence import NOTHING, markdown, source, stored
from ..harness import device_folder


def lines():
    """The table of stored results."""
    found = []
    for result in stored("straightness"):
        found += source(result, [], f"{result['config']['num']} paths of {result['config']['steps']} Euler steps")
        rows = [(f"`{row['student']}`", row["method"], f"{row['straightness']:.4f}") for row in result["rows"]]
        found += [*markdown(("flow", "last trained by", "straightness S"), rows), ""]
    return found[:-1] or NOTHING


def main():
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", required=True, help="folders of denoiser students, separated by commas")
    parser.add_argument("--num", type=int, default=256, help="paths")
    parser.add_argument("--steps", type=int, default=16, help="Euler steps of a path")
    parser.add_argument("--results", help="folder of straightness.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    rows = []
    for folder in options.students.split(","):
        student = DenoiserStudent.from_pretrained(folder)
        model, record = student.model, student.training_record or {"runs": [{}]}
        found = straightness(model, model.noise(options.num, REFERENCE_SEED), steps=options.steps)
        row = {"student": folder, "method": record["runs"][-1].get("method", "unknown"), "straightness": found}
        rows.append(row | {"identity": student.identity()})
    result = {"rows": rows, "config": {"num": options.num, "steps": options.steps}, "provenance": provenance()}
    write_json(Path(options.results or device_folder()) / "straightness.json", result)


if __name__ == "__main__":
    main()
