"""Cost of bfloat16 for the shipped student: PSNR against float32, and the Frechet distance of both.

python -m profiling.cases.precision [--num 2000] [--processes 2] [--out FOLDER]   (minutes: the teacher draws 2 num images once)
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch

from advkd import EvaluationConfig, Student, evaluate_student
from advkd.runtime.files import write_json

from ..harness import device_folder, provenance


def measure(num, processes):
    """The figures of both dtypes, on the same noise and the same teacher's samples."""
    student = Student.from_pretrained("digits")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            config = EvaluationConfig(num=num, processes=processes, dtype=dtype, real="none")
            rows[dtype] = evaluate_student("digits", "digits", config, Path(folder) / dtype)["rows"][0]
    z = student.latents(256, seed=1)
    single, narrow = (student.fuse(dtype=dtype)(z).double() for dtype in (torch.float32, torch.bfloat16))
    psnr = 10 * math.log10(4 / (single - narrow).square().mean().item())
    kept = ("frechet", "frechet_interval", "times_floor", "precision", "recall")
    figures = {dtype: {name: row[name] for name in kept} for dtype, row in rows.items()}
    ratio = rows["bfloat16"]["frechet"] / rows["float32"]["frechet"]
    return {"student": "digits", "num": num, "psnr": psnr, "rows": figures, "ratio": ratio, "provenance": provenance()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", help="folder for precision.json (default: profiling/results/<device>)")
    options = parser.parse_args()
    result = measure(options.num, options.processes)
    write_json(Path(options.out or device_folder()) / "precision.json", result)
    print(f"PSNR {result['psnr']:.1f} dB, Frechet distance {result['ratio']:.4f} times that of float32")


if __name__ == "__main__":
    main()
