"""Tables of GPU kernels: tested, compiled, predicted and measured, in Markdown."""

import itertools

from ..evidence import KINDS, ROOT, checked, families, gpu_digests, last_run, link, markdown, source, stored
from ..limits import predictions as predicted
from . import summary


def gpu_kernels_state():
    """When and where each GPU kernel last ran, and what came of it."""
    rows = []
    for family in families():
        run = last_run(family)
        cells = ("has not run on a GPU yet", "", "")
        if run:
            stale = ", an earlier source" if run["stale"] else ""
            tests = f"{run['passed']} of {run['passed'] + run['failed']}"
            cells = (f"{run['device']}, {run['date']}{stale}", (run["commit"] or "unknown")[:8], tests)
        rows.append((f"{KINDS[family.kind]}, {family.name}", f"`{family.source}`", *cells))
    return markdown(("kernel", "source", "last ran on", "commit", "GPU tests passed"), rows)


def predictions():
    """Predicted times of the students' plans on one card, beside the floor of any engine."""
    path = predicted.PREDICTIONS.relative_to(ROOT).as_posix()
    columns = ("predicted us", "with descriptors, us", "cuDNN's graphs, us", "layer by layer at the card's rates, us")
    variants, rows = predicted.read_predictions(kind="descriptors"), []
    for name, found in predicted.read_predictions().items():
        if found["dtype"] in ("bfloat16", "float32"):
            others = (variants.get(name, {}).get("microseconds"), found["cudnn_graph_microseconds"])
            figures = (found["microseconds"], *others, found["roofline_microseconds"], 1e6 * found["floor"]["seconds"])
            rows.append((name, found["launches"], *("-" if value is None else f"{value:.0f}" for value in figures)))
    return [f"[`{path}`]({path}), no measurement:", "", *markdown(("student", "launches", *columns, "floor, us"), rows)]


def ahead():
    """Compilers' figures of the convolutions' kernels, and the registers that any kernel spills."""
    lines = []
    for result in stored("ahead"):
        names = list(result["compiled"])
        versions = result["versions"]
        checked(result)
        lines += [f"{link(result)}: nvcc {versions['nvcc']}, Triton {versions['triton']}; all GPU kernels:", ""]
        titles = ("kernels", *(f"{name}: registers, local accesses, tensor-core instructions" for name in names))
        sources = _compiled_sources(result["compiled"]).items()
        lines += markdown(titles, [(row, *(_compiled(parts.get(name, [])) for name in names)) for row, parts in sources])
        stale = "" if result["kernels"] == gpu_digests() else " (of earlier sources)"
        lines += ["", f"Launches of the predicted plans, batch 8, bfloat16{stale}:", ""]
        titles = ("student", "kernel", "layers", "registers", "shared KB", "blocks per SM", "FLOP per byte", "us")
        shown = [_launch(launch) for launch in result["plans"] if launch["batch"] == 8 and launch["dtype"] == "bfloat16"]
        same = [(row, len(list(group))) for row, group in itertools.groupby(shown)]
        lines += markdown(titles, [(a, b + (f", {count} times" if count > 1 else ""), *rest) for (a, b, *rest), count in same])
        lines.append("")
    return lines[:-1] or ["Nothing is kept yet."]


def _compiled_sources(compiled):
    """``{row's title: {architecture: kernels}}``."""
    rows = {}
    for name, parts in compiled.items():
        for file, kernels in parts["cuda"].items():
            rows.setdefault(f"CUDA C++, {file}, {len(kernels)} entry points", {})[name] = kernels
        for group in dict.fromkeys(map(_triton_group, parts["triton"])):
            own = [kernel for kernel in parts["triton"] if _triton_group(kernel) == group]
            rows.setdefault(f"Triton, conv_block, {group}, {len(own)} configurations", {})[name] = own
    return rows


def _triton_group(kernel):
    through = "descriptors, " if kernel.get("entry", "").startswith("descriptor") else ""
    return through + kernel["dtype"] + ("" if kernel["dtype"] == "bf16" else " " + kernel["precision"])


def _compiled(kernels):
    if not kernels:
        return "-"
    registers = [kernel["registers"] for kernel in kernels]
    kinds = {
        kind: sum(kernel["tensor"].get(kind, 0) > 0 for kernel in kernels) for kernel in kernels for kind in kernel["tensor"]
    }
    tensor = ", ".join(f"{kind} in {count}" for kind, count in kinds.items()) or "none"
    return f"{min(registers)} to {max(registers)}, {sum(kernel['local_accesses'] for kernel in kernels)}, {tensor}"


def _launch(launch):
    layers = launch["layers"]
    said = layers[0] if len(layers) == 1 else f"{len(layers)}: {layers[0]} ... {layers[-1]}"
    entry = launch["entry"].removeprefix("advkd_").rpartition("_")[0]
    figures = (f"{launch['shared'] / 1024:.0f}", launch.get("blocks", "-"), f"{launch['intensity']:.0f}")
    return launch["preset"], entry, said, launch.get("registers", "-"), *figures, f"{launch['microseconds']:.1f}"


def gpu_benchmarks():
    """Times on GPUs, ours and the fastest of the others, where the parity tests were green."""
    lines = []
    for name in summary.BENCHMARKS:
        for result in summary.green(name, stored):
            cases = summary.cases_of(result)
            times = [entry["seconds"] for case in cases for entry in case["contestants"] if "seconds" in entry]
            lines += [*source(result, times), *summary.case_table(cases), ""]
    return lines[:-1] or ["Nothing has been measured on a GPU yet."]
