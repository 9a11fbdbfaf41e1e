"""Forty-two faults to seed, one at a time, and the tests that see them: a proof that a change of the tests loses none of them.

``python -m tests.seeded_faults [--only NAME ...] [--out FILE.json]`` works on a copy of the tree. A fault is ``caught`` by a
target of the Makefile if its tests there, which pass without it, fail or hang; those of ``--out`` that are not run keep their
results.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from advkd.runtime.files import read_json, write_json

ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")
TARGETS = ("test", "test-kernels")
"""Targets of the Makefile that share the tests by marks; ``test-profiling`` has a folder."""

NONE_RAN = "no test ran"

LIST = """
flag-of-a-wider-state | advkd/ops/sampler_step.py | tests/ops/test_sampler_step.py -k not_finite
- ~torch.isfinite(x_next.to(x.dtype))
+ ~torch.isfinite(x_next)

philox-half-a-key | advkd/ops/philox.py | tests/ops/test_philox.py -k parity
- (seed & _MASK, (seed >> 32) & _MASK)
+ (seed & _MASK, seed >> 63)

masks-of-other-rows | advkd/ops/critic | tests/system/test_critic_update.py -k equals_autograd
- self.masks[i][rows[0] : rows[1]]
+ self.masks[i][: rows[1] - rows[0]]

stale-plan-of-a-critic | advkd/ops/critic | tests/ops/test_gradient_penalty.py -k "traced_again or are_seen"
- kept.append(value)
+ kept.append(name)

running-variance-biased | advkd/ops/norm_act.py | tests/ops/test_norm_act.py -k "running_statistics or torchs"
- (variance * (count / (count - 1)))
+ variance

zero-counts-as-positive | advkd/ops/conv_bias_act_mask.py | tests/ops/test_conv_bias_act_mask.py -k "zero_and_nan or parity"
- positive = values > 0
+ positive = values >= 0

details-from-fine-to-coarse | advkd/ops/latents.py | tests/system/test_latents.py tests/methods/test_pairs.py
- *reversed(details)
+ *details

triton-late-half-of-a-block | kernels | tests/kernels/test_sampler_step_gpu_sources.py -k interpreter
- later = element % 4 >= 2
+ later = element % 4 > 2

triton-moments-of-unequal-tiles | kernels | tests/kernels/test_training_triton.py -k interpreter
- delta * delta * (count * share)
+ delta * delta * (more * share)

triton-bias-beyond-the-end | kernels | tests/kernels/test_training_triton.py -k interpreter
- present = (8 * byte < count)[:, None] if ROWS else inside
+ present = (8 * byte < count)[:, None] if ROWS else element >= 0

triton-right-border | kernels | tests/kernels/test_fused_student_gpu.py -k interpreter
- (column + j < width)
+ (column + j <= width)

cuda-parts-beyond-a-block | csrc/cuda | tests/kernels/test_training_cuda.py -k "norm_act or threads or parts"
- part < p.parts; part += kThreads
+ part < p.parts && part < kThreads; part += kThreads

cuda-odd-rows-of-a-reduction | csrc/cuda | tests/kernels/test_training_cuda.py -k "norm_act or threads or parts"
- const int half = (count + 1) / 2;
+ const int half = count / 2;

cuda-steps-of-the-first-sample | csrc/cuda/sampler_step.cu | tests/kernels/test_sampler_step_gpu_sources.py -k on_the_host
- p.steps[number * p.step_stride]
+ p.steps[0]

cuda-two-histories-of-one-weight | csrc/cuda/sampler_step.cu | tests/kernels/test_sampler_step_gpu_sources.py -k on_the_host
- __fmul_rn(s.c_g, history[i])
+ __fmul_rn(s.c_h, history[i])

cuda-missing-barrier | csrc/cuda/student_stem.cu | tests/kernels/test_student_stem.py -k "every_layer or far_ahead"
-     __syncthreads();
-     stem_finish<
+     stem_finish<

cuda-padding-between-convolutions | csrc/cuda/conv_pair.cu | tests/kernels/test_conv_pair.py -k "exact_on_the_host"
- inside[r][lower] = pair_inside(row, column, place.height, place.width);
+ inside[r][lower] = row + column + place.height + place.width >= 0;

cpu-largest-float16 | csrc/cpu/sampler_step.cpp | tests/ops/test_sampler_step.py -k "parity or not_finite"
- return 65520.0f;
+ return 65504.0f;

cpu-noise-within-a-block | csrc/cpu/sampler_step.cpp | tests/ops/test_sampler_step.py -k "parity or not_finite"
- return logical_.data() + skipped;
+ return logical_.data();

cpu-stored-from-the-next-state | csrc/cpu/sampler_step.cpp | tests/ops/test_sampler_step.py -k "parity or clipped"
- stored = c.s_0 * clean + c.s_x * x + c.s_m * m
+ stored = c.s_0 * next + c.s_x * x + c.s_m * m

cpu-moments-around-zero | csrc/cpu/norm_act.cpp | tests/ops/test_norm_act.py -k "kernels_of_the_cpu or mean_far"
- pivot[i] = static_cast<float>(partials[i % n.channels] / (first.rows * first.pixels));
+ pivot[i] = 0.0f;

cpu-gradient-of-a-neighbours-row | csrc/cpu/image_gradient.cpp | tests/ops/test_image_gradient.py
- source >= s_.columns) continue;
+ source > s_.columns) continue;

cpu-spare-bits-of-a-mask | csrc/cpu/conv_bias_act_mask.cpp | tests/ops/test_conv_bias_act_mask.py -k "zero_and_nan or parity"
- group(rest, bias, i, slope, rest) & static_cast<MaskBits>((MaskBits{1} << (count - i)) - 1);
+ group(rest, bias, i, slope, rest);

cpu-last-line-of-the-halo | csrc/cpu | tests/ops/test_student_forward.py -k "parity or depend or dirty"
- for (i64 y = 1; y < a.height; ++y)
+ for (i64 y = 1; y < a.height - 1; ++y)

cpu-details-of-the-first-image | csrc/cpu/student_forward.cpp | tests/ops/test_student_forward.py -k "parity or depend or dirty"
- run.import(z + first * numel + offsets[i + 1],
+ run.import(z + offsets[i + 1],

rows-of-every-process | advkd/training/trainer.py | tests/methods/test_every_method.py -k "two_processes and pairs"
- start = self.cursor + rank * local
+ start = self.cursor + rank

average-lost-in-a-resumption | advkd/training/checkpoint.py | tests/methods/test_every_method.py -k "killed and pairs"
- _under(f"{name}.average/", tensors)
+ _under(f"{name}/", tensors)

order-after-a-resumption | advkd/training/trainer.py | tests/methods/test_every_method.py -k "killed and pairs"
- "cursor": self.cursor}
+ "cursor": self.done}

critics-sign | advkd/methods/adv_kd.py | tests/system/test_earlier.py
- scores = [-self.critics[
+ scores = [self.critics[

rate-of-the-next-update | advkd/training/trainer.py | tests/system/test_earlier.py
- part.part.schedule(self.update)
+ part.part.schedule(self.update + 1)

every-gradient-clipped-to-one | advkd/training/trainer.py | tests/methods/test_trainer.py
- part.part.clip, norm)
+ 1.0, norm)

covariance-biased | advkd/evaluation/metrics.py | tests/system/test_metrics.py -k "not subsets and not torch_change"
- math.sqrt(len(features) - 1)
+ math.sqrt(len(features))

a-point-is-its-own-neighbour | advkd/evaluation/metrics.py | tests/system/test_metrics.py -k "not subsets and not torch_change"
- block.topk(k + 1,
+ block.topk(k,

features-of-another-extractor | advkd/evaluation/features.py | tests/system/test_evaluate.py -k kept
- {digest({'images': images})} {extractor.identity}
+ {digest({'images': images})} {extractor.score}

real-images-by-class | advkd/evaluation/evaluate.py | tests/system/test_evaluate.py -k "student_against or real_"
- shuffled(extract(extractor, real, cache=cache))
+ extract(extractor, real, cache=cache)

multistep-ratio-inverted | advkd/diffusion/coefficients.py | tests/system/test_schedulers.py -k "dpmsolver or by_hand"
- second = first * h / h_0 / 2
+ second = first * h_0 / h / 2

one-noise-for-all-steps | advkd/diffusion/renoising.py | tests/system/test_samplers.py
- noise=(seed, indices, k)
+ noise=(seed, indices, 1)

noise-of-another-folder | advkd/data/trajectories.py | tests/system/test_distill.py -k "two_folders or latent_of or pairs_made"
- wanted[places] - first + part["start"]
+ wanted[places] - first

shift-never-the-last | advkd/data/draws.py | tests/system/test_distill.py -k shift
- words % (2 * reach + 1)
+ words % (2 * reach)

renamed-before-it-is-on-the-disk | advkd/runtime/files.py | tests/profiling/test_limits_faults.py
-             with open(temporary, "rb") as file:
-                 synchronize(file.fileno())
-             _move(
+             _move(

kept-plans-of-others-lost | advkd/engines/kept.py | tests/system/test_fused_student.py -k "kept or measured"
- {**self._read(), **found}
+ found

parity-of-one-sign | profiling | tests/profiling/test_profiling.py -k "checks or parity or difference"
- (found.double() - wanted.to(found.device).double()).abs().max()
+ (found.double() - wanted.to(found.device).double()).max()
"""
"""A paragraph each: name, file or folder, tests; lines with ``-``, which are there once, and with ``+`` in their place."""

COMPILER = r"""#!/bin/sh
# Compiles what has changed since it was compiled; the last argument is the output.
for output; do :; done
made=${output%.o}
test "$made" = "$output" && exec g++ "$@"
test -f "$made.d" && test -z "$(find $(tr '\\:' '  ' < "$made.d") -newer "$output")" && exit
exec g++ -MMD "$@"
"""


@dataclass(frozen=True)
class Fault:
    """A slip in the source.

    Attributes:
        name: of the fault.
        path: the file, or the folder with the file, that holds ``old``.
        old, new: the text, and what takes its place.
        tests: arguments of pytest that select tests of which one fails.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str

    @classmethod
    def parse(cls, paragraph: str) -> "Fault":
        """A fault of :data:`LIST`."""
        head, *lines = paragraph.splitlines()
        name, path, tests = head.split(" | ")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        return cls(name, path, old, new, tests)

    @property
    def files(self) -> list[str]:
        """Files and folders of the tests."""
        return [word.partition("::")[0] for word in shlex.split(self.tests) if word.startswith("tests/")]

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets of the Makefile that run tests of these files."""
        return ("test-profiling",) if Path(self.files[0]).parts[1] == "profiling" else TARGETS

    @property
    def is_compiled(self) -> bool:
        """True if a build of the CPU object reads the file."""
        return self.path.startswith("csrc")

    def seeded(self, root: Path) -> tuple[Path, str]:
        """The file and its text with the fault; ``LookupError`` unless the text is found exactly once."""
        path = root / self.path
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        texts = {file: file.read_text() for file in files}
        places = [file for file, text in texts.items() for _ in range(text.count(self.old))]
        if len(places) != 1:
            raise LookupError(f"{self.name}: its text is found {len(places)} times in {self.path}")
        return places[0], texts[places[0]].replace(self.old, self.new)


FAULTS = [Fault.parse(paragraph) for paragraph in LIST.strip().split("\n\n")]


def marks(target: str) -> list[str]:
    """Options by which a target of the Makefile chooses among its tests."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    found = re.search(r'-m "(.*?)"', recipe)
    return ["-m", found[1]] if found else []


class Copy:
    """A copy of the tree, with a build of its own where a fault of ``faults`` needs one."""

    def __init__(self, folder: Path, faults: list[Fault]):
        self.root, self.clean, self.compiler = folder / "work", folder / "clean", folder / "compiler"
        listed = subprocess.check_output(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, text=True)
        for name in [*listed.split("\0")[:-1], *(str(path.relative_to(ROOT)) for path in ROOT.glob("advkd/_cpu*.so"))]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.root / name)
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)
        if any(fault.is_compiled for fault in faults):
            self.build()

    def build(self) -> None:
        """Build the CPU object; only what a changed file goes into is compiled again."""
        environment = {**os.environ, "ADVKD_CPU": "1", "ADVKD_CUDA": "0", "CXX": str(self.compiler)}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=self.root, env=environment, check=True, capture_output=True)

    def failure(self, tests: str, target: str, limit: float) -> tuple[str | None, float]:
        """The test that fails, or the way in which pytest ends, None where some pass and none fails; and the seconds.

        :data:`NONE_RAN` where the target leaves all of them out, or they are skipped.
        """
        command = [sys.executable, "-m", "pytest", "-xq", "-n0", "-p", "no:cacheprovider", *shlex.split(tests), *marks(target)]
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        start = time.monotonic()
        with subprocess.Popen(command, cwd=self.root, env=environment, **options) as process:
            try:
                output, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                return f"no end within {limit:.0f} s", limit
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        seconds = round(time.monotonic() - start, 1)
        if process.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            return None if re.search(r"\b[1-9]\d* passed", output) else NONE_RAN, seconds
        failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", output, re.M)
        return failed[1] if failed else f"pytest ends with {process.returncode}: {output[-200:]}", seconds

    def without_faults(self, faults: list[Fault]) -> dict[tuple[str, str], tuple[str | None, float]]:
        """:meth:`failure` of each selection of tests by target; then the tree, as it was built, is kept for :meth:`attempt`."""
        pairs = dict.fromkeys((fault.tests, target) for fault in faults for target in fault.targets)
        found = {pair: self.failure(*pair, 600) for pair in pairs}
        shutil.copytree(self.root, self.clean)
        return found

    def attempt(self, fault: Fault, clean: dict[str, tuple[str | None, float]]) -> dict:
        """Seed a fault into the tree as it was kept, and run its tests, target by target until one of them catches it.

        Args:
            fault: the fault.
            clean: what :meth:`failure` found without it, by target. A target without any of the tests is passed over.
        """
        clean = {target: found for target, found in clean.items() if found[0] != NONE_RAN}
        if not clean:
            return {"result": NONE_RAN}
        if failed := [by for by, _ in clean.values() if by]:
            return {"result": "fails without it", "by": failed[0]}
        shutil.rmtree(self.root)
        shutil.copytree(self.clean, self.root)
        try:
            file, text = fault.seeded(self.root)
            file.write_text(text)
            if fault.is_compiled:
                self.build()
        except (LookupError, subprocess.CalledProcessError) as error:
            return {"result": "not seeded", "by": str(error)}
        for target, (_, without) in clean.items():
            by, seconds = self.failure(fault.tests, target, 60 + 5 * without)
            if by and by != NONE_RAN:
                return {"result": "caught", "target": target, "by": by, "seconds": seconds}
        return {"result": "survived"}


def main(arguments: list[str] | None = None) -> None:
    """The command line; ends with 1 unless every fault that was run is caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    results = read_json(options.out) if options.out and options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="advkd-faults-") as folder:
        copy = Copy(Path(folder), chosen)
        clean = copy.without_faults(chosen)
        for fault in chosen:
            found = copy.attempt(fault, {target: clean[fault.tests, target] for target in fault.targets})
            results[fault.name] = found
            print(f"{fault.name}: {found['result']} {found.get('target', '')} ({found.get('by')})", flush=True)
            if options.out:
                write_json(options.out, results)
    missed = [fault.name for fault in chosen if results[fault.name]["result"] != "caught"]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught; not: {', '.join(missed) or 'none'}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
