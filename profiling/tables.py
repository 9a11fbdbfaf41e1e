"""Write the tables of README.md, profiling/RESULTS.md and docs/guarantees.md, and docs/billion.md, from the JSON under
``profiling/results``: python -m profiling.tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; a test checks that README and results agree.
"""

import itertools
import os
import re
import statistics
from operator import itemgetter

from advkd.errors import InputError
from advkd.evaluation.evaluate import cells
from advkd.runtime.files import write_bytes

from . import billion, roofline
from .cases import neighbours, neighbours_idle
from .evidence import (
    KINDS,
    ROOT,
    checked,
    families,
    figure,
    gpu_digests,
    last_run,
    link,
    module_of,
    source,
    stale,
    stored,
    unsupported,
)
from .gpu import summary as gpu_summary
from .limits import guarantees, instruction_counts
from .limits import predictions as gpu_predictions
from .trace import compare, demo, ncu, nsys

PAGES = (ROOT / "README.md", ROOT / "profiling" / "RESULTS.md", ROOT / "docs" / "guarantees.md")
BILLION = ROOT / "docs" / "billion.md"


INTERVALS = "intervals are in the table"


def evaluation():
    """Distances of the shipped student, with floors and intervals."""
    lines = []
    for result in stored("evaluation"):
        titles, *rows = cells(result)
        lines += [*source(result, (), INTERVALS), _row(*titles), _rule(len(titles)), *(_row(*row) for row in rows)]
    return lines


def ablation():
    """What each choice is worth."""
    lines = []
    for result in stored("ablation"):
        score = result["runs"][0]["score"]
        titles = ("run", f"{score}, x floor (95 %)", "at infinity", "precision", "recall", "likeness")
        lines += [*source(result, (), INTERVALS), _row(*titles), _rule(len(titles))]
        for run in result["runs"]:
            low, high = (end / run["floor"] for end in run["frechet_interval"])
            figures = (f"{run['times_floor']:.1f} ({low:.1f} to {high:.1f})", f"{run['at_infinity']:.2f}")
            figures += (f"{run['precision']:.3f}", f"{run['recall']:.3f}", f"{run['correlation']:.3f}")
            lines.append(_row(run["name"], *figures))
        lines += ["", "<details><summary>The command of each row</summary>", "", "```sh"]
        lines += [line for run in result["runs"] for line in (f"# {run['name']}", run["command"])]
        lines += ["```", "", "</details>"]
    return lines


ENGINES = {
    "advkd": "advkd",
    "PyTorch eager, folded": "eager",
    "torch.compile, folded, freezing": "torch.compile",
    "torch.compile, freezing, conv_transpose2d": "the same, up-sampling folded by hand",
    "ONNX Runtime": "ONNX Runtime",
    "OpenVINO": "OpenVINO",
    "ncnn": "ncnn",
}


def student():
    """Milliseconds per call of the student, ours and others, one row per case."""
    lines = []
    for result in stored("bench_student"):
        lines += [
            *source(result, _times(result)),
            _row("student", *ENGINES.values(), "advkd against the fastest"),
            _rule(len(ENGINES) + 2),
        ]
        for case in result["cases"]:
            times = [_engine(case, name) for name in ENGINES]
            lines.append(_row(case["case"], *times, f"{case['ratio']:.2f} x"))
        lines.append("")
    return lines[:-1]


def _engine(case, name):
    entries = [e for e in case["contestants"] if e["name"] == name or name == "advkd" and e["kind"] == "ours"]
    return " ".join(_milliseconds(entry) for entry in entries) or "-"


def _milliseconds(entry):
    return f"{1e3 * entry['seconds']['median']:.4g}" if "seconds" in entry else "off" if "parity" in entry else "cannot run"


def _times(result):
    """Those of every contestant of every case."""
    return [entry["seconds"] for case in result["cases"] for entry in case["contestants"] if "seconds" in entry]


def teacher():
    """Times of the teacher, ours and others."""
    lines = []
    for result in stored("bench_teacher"):
        lines += [
            *source(result, _times(result)),
            _row("work", "images", "engine", "ms per call (p20 to p80)", "GFLOP/s"),
            _rule(5),
        ]
        for case in result["cases"]:
            for entry in case["contestants"]:
                lines.append(_row(case["case"], case["images"], entry["name"], _time(entry), _rate(entry)))
        lines.append("")
    return lines[:-1]


def sampler_step():
    """Times of one sampler step, ours, others' and the floor."""
    lines = []
    for result in stored("bench_sampler_step"):
        lines += [
            *source(result, _times(result)),
            _row("step", "by", "ms (p20 to p80)", "GB/s of what must be moved"),
            _rule(4),
        ]
        for case in result["cases"]:
            for entry in case["contestants"]:
                speed = f"{1e-9 * case['moved_bytes'] / entry['seconds']['median']:.2g}" if "seconds" in entry else ""
                lines.append(_row(case["case"], entry["name"], _time(entry), speed))
        lines.append("")
    return lines[:-1]


def gradient_penalty():
    """Milliseconds of the penalty and of the whole update, each method in its faster layout, and the work bound."""
    methods = {
        "autograd": "autograd",
        "autograd, LeakyReLU's slopes as constants": "constant slopes",
        "torch.compile of torch.func.grad": "torch.func",
        "advkd": "advkd",
        "advkd compiled": "compiled",
    }
    lines = []
    for result in stored("bench_gradient_penalty"):
        ratios = ("autograd / advkd", "autograd / compiled", "constant slopes / advkd", "torch.func / compiled")
        titles = ("work", *methods.values(), *ratios, "work bound")
        lines += [*source(result, _times(result)), _row(*titles), _rule(len(titles))]
        for case in result["cases"]:
            best = {name: _fastest_layout(case, name) for name in methods}
            plain, constant, functional, ours, compiled = best.values()
            pairs = ((plain, ours), (plain, compiled), (constant, ours), (functional, compiled))
            ratios = [_ratio(*pair) for pair in pairs]
            times = ["-" if value is None else f"{1e3 * value:.1f}" for value in best.values()]
            lines.append(_row(case["case"], *times, *ratios, f"{case['work_bound']:.2f} x"))
        lines.append("")
    return lines[:-1]


def _fastest_layout(case, name):
    named = (name, *(f"{name}, {layout}" for layout in ("contiguous", "channels_last")))
    times = [e["seconds"]["median"] for e in case["contestants"] if e["name"] in named and "seconds" in e]
    return min(times, default=None)


def _ratio(slow, quick):
    return "-" if slow is None or quick is None else f"{slow / quick:.2f} x"


def penalty_memory():
    """What the penalty and its gradients add to a process's peak."""
    lines = []
    for result in stored("penalty_scaling"):
        titles = ("critic", "autograd", "advkd", "share")
        lines += [
            *source(result, [peak for row in result["peaks"] for peak in row["bytes"].values()]),
            _row(*titles),
            _rule(len(titles)),
        ]
        for row in result["peaks"]:
            plain, ours = (row["bytes"][name]["median"] for name in ("autograd", "advkd"))
            lines.append(_row(row["case"], f"{plain / 1e6:.0f} MB", f"{ours / 1e6:.0f} MB", f"{ours / plain:.2f}"))
        lines.append("")
    return lines[:-1]


def norm_act():
    """Forward and backward of a training block's normalisation, ours and others."""
    lines = []
    for result in stored("bench_norm_act"):
        lines += [*source(result, _times(result)), _row("work", "by", "ms (p20 to p80)"), _rule(3)]
        for case in result["cases"]:
            for entry in case["contestants"]:
                lines.append(_row(case["case"], entry["name"], _time(entry)))
        lines.append("")
    return lines[:-1]


def distillation():
    """An update of the demo's distillation by method, and the parts of it."""
    lines = []
    for result in stored("distillation"):
        rows = result["rows"]
        titles = ("an update of the demo's distillation", "ms", "critic", "student", "against plain PyTorch")
        lines += [
            *source(result, [row[part] for row in rows.values() for part in ("seconds", "critic", "rest")]),
            _row(*titles),
            _rule(len(titles)),
        ]
        plain = rows["plain PyTorch"]["seconds"]["median"]
        for name, row in rows.items():
            whole, *parts = (part["median"] for part in (row["seconds"], row["critic"], row["rest"]))
            figures = (f"{1e3 * whole:.0f}", *(f"{1e3 * part:.0f}" for part in parts))
            lines.append(_row(name, *figures, f"{plain / whole:.2f} x"))
        lines += [_row("Amdahl's bound, a critic's update in no time", "", "", "", f"{result['amdahl_critic']:.2f} x"), ""]
    return lines[:-1]


def recording():
    """Whole recordings, ours and a plain loop."""
    lines = []
    for result in stored("recording"):
        rows = {name: row["seconds"] for name, row in result["rows"].items()}
        titles = ("recorded by", "trajectories", "seconds", "against the plain loop")
        lines += [*source(result, rows.values()), _row(*titles), _rule(4)]
        plain = sum(rows["diffusers, plain loop"])
        for name in sorted(rows, key=lambda name: (name.startswith("advkd"), name)):
            times = ", ".join(f"{spent:.1f}" for spent in rows[name])
            lines.append(_row(name, result["num"], times, f"{plain / sum(rows[name]):.2f} x"))
        lines.append("")
    return lines[:-1]


def layers():
    """The layers of each preset that take most of its time, and the whole."""
    lines = []
    for result in stored("layers"):
        lines += source(result, [row["seconds"] for plan in result["students"] for row in plan["layers"]])
        titles = ("student", "layer", "algorithm", "ms", "useful GFLOP/s")
        titles += tuple(f"{count}, of the rate in registers" for count in ("useful", "phase count", "products made"))
        lines += [_row(*titles), _rule(len(titles))]
        for plan in result["students"]:
            peak = plan["products_per_second"][plan["dtype"]]
            slowest = sorted(plan["layers"], key=lambda row: -row["seconds"]["median"])[:3]
            for row in [r for r in plan["layers"] if r in slowest]:
                lines.append(
                    _row(f"{plan['preset']}, {plan['dtype']}", _layer(row), row["algorithm"], *_layer_rates([row], peak))
                )
            lines.append(_row(f"{plan['preset']}, {plan['dtype']}", "all", "", *_layer_rates(plan["layers"], peak)))
        lines.append("")
    return lines[:-1]


def _layer(row):
    side = f"up to {2 * row['height']}" if row["upsample"] else f"at {row['height']}"
    return f"{row['c_in']} to {row['c_out']}, {side}"


def _layer_rates(rows, peak):
    spent = sum(row["seconds"]["median"] for row in rows)
    direct, made = (sum(row[key] for row in rows) for key in ("direct_products", "products"))
    phases = sum(row["direct_products"] * (4 / 9 if row["upsample"] else 1) for row in rows)
    shares = (f"{100 * count / spent / peak:.0f} %" for count in (direct, phases, made))
    return f"{1e3 * spent:.2f}", f"{2e-9 * direct / spent:.0f}", *shares


def precision():
    """What bfloat16 costs the shipped student."""
    lines = []
    for result in stored("precision"):
        lines += [
            *source(result, (), INTERVALS),
            _row("dtype", "FD-digits (95 %)", "x floor", "precision", "recall", "PSNR"),
            _rule(6),
        ]
        for dtype, row in result["rows"].items():
            low, high = row["frechet_interval"]
            figures = (f"{row['frechet']:.4f} ({low:.3f} to {high:.3f})", *(f"{row[k]:.3f}" for k in KEPT))
            lines.append(_row(dtype, *figures, f"{result['psnr']:.1f} dB" if dtype == "bfloat16" else ""))
        lines.append("")
    return lines[:-1]


KEPT = ("times_floor", "precision", "recall")


def footprint():
    """Memory and time of a first image."""
    lines = []
    for result in stored("scaling"):
        titles = (
            "student",
            "packed weights",
            "workspace",
            "two largest activations",
            "an image adds to the process",
            "first image after",
        )
        lines += [
            *source(result, [row["first_image"]["seconds"] for row in result["footprints"]]),
            _row(*titles),
            _rule(len(titles)),
        ]
        for row in result["footprints"]:
            keys = ("weights", "workspace", "two_largest_activations")
            sizes = [f"{row[key] / 1e6:.1f} MB" for key in keys]
            first = row["first_image"]
            grown = f"{first['image_bytes']['median'] / 1e6:.1f} MB"
            lines.append(_row(f"{row['preset']}, {row['dtype']}", *sizes, grown, f"{first['seconds']['median']:.2f} s"))
        lines.append("")
    return lines[:-1]


def _time(entry):
    if "missing" in entry:
        return "cannot run here"
    if "seconds" not in entry:
        return f"off by {entry['parity']['error']:.1e}, not timed"
    median, p20, p80 = (1e3 * entry["seconds"][key] for key in ("median", "p20", "p80"))
    return f"{median:.2f} ({p20:.2f} to {p80:.2f})"


def _rate(entry):
    return f"{entry['flop_per_second'] / 1e9:.0f}" if "flop_per_second" in entry else ""


def _row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def _rule(columns):
    return "|" + "---|" * columns


def gpu_kernels_state():
    """When and where each GPU kernel last ran, and what came of it."""
    lines = [_row("kernel", "source", "last ran on", "commit", "GPU tests passed"), _rule(5)]
    for family in families():
        run = last_run(family)
        cells = ("has not run on a GPU yet", "", "")
        if run:
            stale = ", an earlier source" if run["stale"] else ""
            tests = f"{run['passed']} of {run['passed'] + run['failed']}"
            cells = (f"{run['device']}, {run['date']}{stale}", (run["commit"] or "unknown")[:8], tests)
        lines.append(_row(f"{KINDS[family.kind]}, {family.name}", f"`{family.source}`", *cells))
    return lines


def predictions():
    """What the plans of the students are predicted to take on one card, beside what no engine can go below."""
    path = gpu_predictions.PREDICTIONS.relative_to(ROOT).as_posix()
    lines = [f"[`{path}`]({path}), no measurement:", ""]
    columns = ("predicted us", "with descriptors, us", "cuDNN's graphs, us", "layer by layer at the card's rates, us")
    lines += [_row("student", "launches", *columns, "floor, us"), _rule(7)]
    variants = gpu_predictions.read_predictions(kind="descriptors")
    for name, found in gpu_predictions.read_predictions().items():
        if found["dtype"] in ("bfloat16", "float32"):
            others = (variants.get(name, {}).get("microseconds"), found["cudnn_graph_microseconds"])
            figures = (found["microseconds"], *others, found["roofline_microseconds"], 1e6 * found["floor"]["seconds"])
            lines.append(_row(name, found["launches"], *("-" if value is None else f"{value:.0f}" for value in figures)))
    return lines


def ahead():
    """What the compilers say about the convolutions' kernels, and what is spilled by any."""
    lines = []
    for result in stored("ahead"):
        names = list(result["compiled"])
        versions = result["versions"]
        checked(result)
        lines += [f"{link(result)}: nvcc {versions['nvcc']}, Triton {versions['triton']}; all GPU kernels:", ""]
        lines += [_row("kernels", *(f"{name}: registers, local accesses, tensor-core instructions" for name in names))]
        lines += [_rule(1 + len(names))]
        for row, parts in _compiled_sources(result["compiled"]).items():
            lines.append(_row(row, *(_compiled(parts.get(name, [])) for name in names)))
        stale = "" if result["kernels"] == gpu_digests() else " (of earlier sources)"
        lines += ["", f"Launches of the predicted plans, batch 8, bfloat16{stale}:", ""]
        lines += [
            _row("student", "kernel", "layers", "registers", "shared KB", "blocks per SM", "FLOP per byte", "us"),
            _rule(8),
        ]
        shown = [_launch(launch) for launch in result["plans"] if launch["batch"] == 8 and launch["dtype"] == "bfloat16"]
        for row, same in itertools.groupby(shown):
            count = len(list(same))
            lines.append(_row(row[0], row[1] + (f", {count} times" if count > 1 else ""), *row[2:]))
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
    for name in gpu_summary.BENCHMARKS:
        for result in gpu_summary.green(name, stored):
            titles = ("work", "advkd, us", "fastest other, us", "which", "ratio", "floor reached", "error by cuDNN's")
            cases = gpu_summary.cases_of(result)
            times = [entry["seconds"] for case in cases for entry in case["contestants"] if "seconds" in entry]
            lines += [*source(result, times), _row(*titles), _rule(len(titles))]
            lines += [_row(case["case"], *_gpu_case(case)) for case in cases]
            lines.append("")
    return lines[:-1] or ["Nothing has been measured on a GPU yet."]


def _gpu_case(case):
    ours, other = gpu_summary.best(case, True), gpu_summary.best(case, False)
    if ours is None or other is None:
        return ("off or cannot run", "", "", "", "", "")
    times = [f"{1e6 * entry['seconds']['median']:.1f}" for entry in (ours, other)]
    share, error = gpu_summary.reached(case), gpu_summary.error_ratio(case)
    figures = ("-" if share is None else f"{100 * share:.0f} %", "-" if error is None else f"{error:.2f} x")
    return *times, other["name"], f"{case['ratio']:.2f} x", *figures


def roofline_table():
    """Every measured case beside the machine's ceilings."""
    lines = []
    for result in stored("roofline"):
        limits = result["ceilings"]
        rates = ", ".join(f"{1e-9 * rate:.0f} GFLOP/s {dtype}" for dtype, rate in limits["flops"].items())
        times = [*limits["samples"].values(), *(point["seconds"] for point in result["points"])]
        lines += [*source(result, times), f"Ceilings: {rates}, {1e-9 * limits['bandwidth']:.1f} GB/s moving memory.", ""]
        lines += [_row("case", "bound by", "FLOP per byte", "of the limit"), _rule(4)]
        for name, bound, intensity, fraction in roofline.rows(result):
            lines.append(_row(name, bound, "-" if intensity is None else f"{intensity:.1f}", f"{100 * fraction:.0f} %"))
        lines.append("")
    return lines[:-1] or NOTHING


def counts():
    """Instructions of every C++ kernel."""
    summary = "<details><summary>Instructions per element of every C++ kernel</summary>"
    return [summary, "", *instruction_counts.table(), "", "</details>"]


def sample_scaling():
    """``advkd sample`` by processes."""
    lines = []
    for result in stored("sample_scaling"):
        rates = result["images_per_second"]
        lines += [*source(result, rates.values()), _row("processes, and cores", "images per second", "efficiency"), _rule(3)]
        for processes, rate in rates.items():
            lines.append(_row(processes, f"{rate['median']:.0f}", f"{100 * result['efficiency'][processes]:.0f} %"))
        lines.append("")
    return lines[:-1] or NOTHING


def plots(name, caption):
    """The plots of a kind of result, each under its source."""

    def lines():
        found = []
        for result in stored(name):
            checked(result)
            path = result["path"].removesuffix(".json") + ".png"
            found += [*stale(result), f"![{caption}]({path})", "", f"{link(result)}: {result['provenance']['device']}.", ""]
        return found[:-1] or NOTHING

    return lines


def demo_parts():
    """Where the time of a demo goes."""
    lines = []
    for result in stored("demo"):
        lines += [*source(result, [result["seconds"]]), *demo.lines(result), ""]
    return lines[:-1] or NOTHING


NOTHING = ["Nothing has been measured yet."]


def _figures(name, value, text):
    """A figure of every result of that name, with its device."""

    def linked():
        results = stored(name)
        if not results:
            raise InputError(f"no result {name}.json holds a figure that a page states: python -m {module_of(name)}")
        found = [(figure(result, [value(result)], text(value(result))), result["provenance"]["device"]) for result in results]
        return " and ".join(f"{made} ({device})" for made, device in found)

    return linked


FIGURES = {
    "demo_seconds": _figures("demo", itemgetter("seconds"), lambda runs: f"{statistics.mean(runs):.0f} seconds"),
    "demo_times_faster": _figures("demo", itemgetter("times_faster"), lambda runs: f"{statistics.mean(runs):.0f} times faster"),
    "step_overhead": _figures(
        "step_scaling",
        lambda result: result["overhead"]["deterministic"],
        lambda time: f"{1e6 * time['median']:.0f} microseconds",
    ),
}
"""Name of a figure in a sentence -> what makes its link."""

TABLES = {
    "roofline": roofline_table,
    "counts": counts,
    "sample_scaling": sample_scaling,
    "neighbours": neighbours.table,
    "neighbours_idle": neighbours_idle.table,
    **{f"limits_{name}": guarantees.table(name) for name in guarantees.CAMPAIGNS},
    "demo": demo_parts,
    "demo_plot": plots("demo", "time of a demo by part"),
    "roofline_plot": plots("roofline", "every op under the machine's ceilings"),
    "scaling_plot": plots("scaling", "time by batch, resolution and threads"),
    "step_scaling_plot": plots("step_scaling", "time of a step by batch and resolution"),
    "penalty_scaling_plot": plots("penalty_scaling", "time of a penalty by batch, resolution and depth"),
    "traces": lambda: nsys.table() or NOTHING,
    "counters": lambda: ncu.table() or NOTHING,
    "compare": lambda: compare.table() or NOTHING,
    "evaluation": evaluation,
    "ablation": ablation,
    "student": student,
    "sampler_step": sampler_step,
    "gradient_penalty": gradient_penalty,
    "penalty_memory": penalty_memory,
    "norm_act": norm_act,
    "distillation": distillation,
    "recording": recording,
    "layers": layers,
    "footprint": footprint,
    "precision": precision,
    "teacher": teacher,
    "gpu_benchmarks": gpu_benchmarks,
    "gpu_kernels": gpu_kernels_state,
    "predictions": predictions,
    "ahead": ahead,
}


def filled(text, page=PAGES[0]):
    """A page's text with every table, and every figure in a sentence, made anew."""

    def table(match):
        made = "\n".join(TABLES[match[1]]())
        return f"<!-- table: {match[1]} -->\n{placed(made, page)}\n<!-- end -->"

    def sentence(match):
        return f"<!-- figure: {match[1]} -->{placed(FIGURES[match[1]](), page)}<!-- end -->"

    text = re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)
    return re.sub(r"<!-- figure: (\w+) -->.*?<!-- end -->", sentence, text, flags=re.S)


def placed(text, page):
    """Links from the root as the page needs them."""
    return re.sub(r"\]\((?=profiling/|docs/)", f"]({os.path.relpath(ROOT, page.parent)}/", text).replace("](./", "](")


def pages():
    """``{path: text}`` of every generated page.

    Raises:
        InputError: a sentence states performance without a link to its result.
    """
    found = {path: filled(path.read_text(), path) for path in PAGES}
    for path, text in found.items():
        if bare := unsupported(text, path.parent):
            raise InputError(f"{path.name}: performance without a link to its result: {'; '.join(bare)}")
    if measured := stored("billion"):
        found[BILLION] = placed(billion.page(measured), BILLION)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        write_bytes(path, text.encode())
