"""The tables of the benchmarks' results, in Markdown: every one names its result, commit, device and spread."""

from advkd.evaluation.evaluate import cells

from ..evidence import NOTHING, source, stored, table_row, table_rule

ENGINES = {
    "advkd": "advkd",
    "PyTorch eager, folded": "eager",
    "torch.compile, folded, freezing": "torch.compile",
    "torch.compile, freezing, conv_transpose2d": "the same, up-sampling folded by hand",
    "ONNX Runtime": "ONNX Runtime",
    "OpenVINO": "OpenVINO",
    "ncnn": "ncnn",
}
INTERVALS = "intervals are in the table"


def student():
    """Milliseconds per call of the student, ours and others, one row per case."""
    lines = []
    for result in stored("bench_student"):
        lines += [
            *source(result, _times(result)),
            table_row("student", *ENGINES.values(), "advkd against the fastest"),
            table_rule(len(ENGINES) + 2),
        ]
        for case in result["cases"]:
            times = [_engine(case, name) for name in ENGINES]
            lines.append(table_row(case["case"], *times, f"{case['ratio']:.2f} x"))
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
            table_row("work", "images", "engine", "ms per call (p20 to p80)", "GFLOP/s"),
            table_rule(5),
        ]
        for case in result["cases"]:
            for entry in case["contestants"]:
                lines.append(table_row(case["case"], case["images"], entry["name"], _time(entry), _rate(entry)))
        lines.append("")
    return lines[:-1]


def sampler_step():
    """Times of one sampler step, ours, others' and the floor."""
    lines = []
    for result in stored("bench_sampler_step"):
        lines += [
            *source(result, _times(result)),
            table_row("step", "by", "ms (p20 to p80)", "GB/s of what must be moved"),
            table_rule(4),
        ]
        for case in result["cases"]:
            for entry in case["contestants"]:
                speed = f"{1e-9 * case['moved_bytes'] / entry['seconds']['median']:.2g}" if "seconds" in entry else ""
                lines.append(table_row(case["case"], entry["name"], _time(entry), speed))
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
        lines += [*source(result, _times(result)), table_row(*titles), table_rule(len(titles))]
        for case in result["cases"]:
            best = {name: _fastest_layout(case, name) for name in methods}
            plain, constant, functional, ours, compiled = best.values()
            pairs = ((plain, ours), (plain, compiled), (constant, ours), (functional, compiled))
            ratios = [_ratio(*pair) for pair in pairs]
            times = ["-" if value is None else f"{1e3 * value:.1f}" for value in best.values()]
            lines.append(table_row(case["case"], *times, *ratios, f"{case['work_bound']:.2f} x"))
        lines.append("")
    return lines[:-1]


def _fastest_layout(case, name):
    named = (name, *(f"{name}, {layout}" for layout in ("contiguous", "channels_last")))
    times = [e["seconds"]["median"] for e in case["contestants"] if e["name"] in named and "seconds" in e]
    return min(times, default=None)


def _ratio(slow, quick):
    return "-" if slow is None or quick is None else f"{slow / quick:.2f} x"


def penalty_memory():
    """Bytes that the penalty and its gradients add to a process's peak."""
    lines = []
    for result in stored("penalty_scaling"):
        titles = ("critic", "autograd", "advkd", "share")
        lines += [
            *source(result, [peak for row in result["peaks"] for peak in row["bytes"].values()]),
            table_row(*titles),
            table_rule(len(titles)),
        ]
        for row in result["peaks"]:
            plain, ours = (row["bytes"][name]["median"] for name in ("autograd", "advkd"))
            lines.append(table_row(row["case"], f"{plain / 1e6:.0f} MB", f"{ours / 1e6:.0f} MB", f"{ours / plain:.2f}"))
        lines.append("")
    return lines[:-1]


def norm_act():
    """Forward and backward of a training block's normalisation, ours and others."""
    lines = []
    for result in stored("bench_norm_act"):
        lines += [*source(result, _times(result)), table_row("work", "by", "ms (p20 to p80)"), table_rule(3)]
        for case in result["cases"]:
            for entry in case["contestants"]:
                lines.append(table_row(case["case"], entry["name"], _time(entry)))
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
            table_row(*titles),
            table_rule(len(titles)),
        ]
        plain = rows["plain PyTorch"]["seconds"]["median"]
        for name, row in rows.items():
            whole, *parts = (part["median"] for part in (row["seconds"], row["critic"], row["rest"]))
            figures = (f"{1e3 * whole:.0f}", *(f"{1e3 * part:.0f}" for part in parts))
            lines.append(table_row(name, *figures, f"{plain / whole:.2f} x"))
        lines += [table_row("Amdahl's bound, a critic's update in no time", "", "", "", f"{result['amdahl_critic']:.2f} x"), ""]
    return lines[:-1]


def recording():
    """Whole recordings, ours and a plain loop."""
    lines = []
    for result in stored("recording"):
        rows = {name: row["seconds"] for name, row in result["rows"].items()}
        titles = ("recorded by", "trajectories", "seconds", "against the plain loop")
        lines += [*source(result, rows.values()), table_row(*titles), table_rule(4)]
        plain = sum(rows["diffusers, plain loop"])
        for name in sorted(rows, key=lambda name: (name.startswith("advkd"), name)):
            times = ", ".join(f"{spent:.1f}" for spent in rows[name])
            lines.append(table_row(name, result["num"], times, f"{plain / sum(rows[name]):.2f} x"))
        lines.append("")
    return lines[:-1]


def layers():
    """The layers of each preset that take most of its time, and the whole."""
    lines = []
    for result in stored("layers"):
        lines += source(result, [row["seconds"] for plan in result["students"] for row in plan["layers"]])
        titles = ("student", "layer", "algorithm", "ms", "useful GFLOP/s")
        titles += tuple(f"{count}, of the rate in registers" for count in ("useful", "phase count", "products made"))
        lines += [table_row(*titles), table_rule(len(titles))]
        for plan in result["students"]:
            peak = plan["products_per_second"][plan["dtype"]]
            slowest = sorted(plan["layers"], key=lambda row: -row["seconds"]["median"])[:3]
            for row in [r for r in plan["layers"] if r in slowest]:
                lines.append(
                    table_row(f"{plan['preset']}, {plan['dtype']}", _layer(row), row["algorithm"], *_layer_rates([row], peak))
                )
            lines.append(table_row(f"{plan['preset']}, {plan['dtype']}", "all", "", *_layer_rates(plan["layers"], peak)))
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
    """Cost of bfloat16 for the shipped student."""
    lines = []
    for result in stored("precision"):
        lines += [
            *source(result, (), INTERVALS),
            table_row("dtype", "FD-digits (95 %)", "x floor", "precision", "recall", "PSNR"),
            table_rule(6),
        ]
        for dtype, row in result["rows"].items():
            low, high = row["frechet_interval"]
            figures = (f"{row['frechet']:.4f} ({low:.3f} to {high:.3f})", *(f"{row[k]:.3f}" for k in KEPT))
            lines.append(table_row(dtype, *figures, f"{result['psnr']:.1f} dB" if dtype == "bfloat16" else ""))
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
            table_row(*titles),
            table_rule(len(titles)),
        ]
        for row in result["footprints"]:
            keys = ("weights", "workspace", "two_largest_activations")
            sizes = [f"{row[key] / 1e6:.1f} MB" for key in keys]
            first = row["first_image"]
            grown = f"{first['image_bytes']['median'] / 1e6:.1f} MB"
            lines.append(table_row(f"{row['preset']}, {row['dtype']}", *sizes, grown, f"{first['seconds']['median']:.2f} s"))
        lines.append("")
    return lines[:-1]


def sample_scaling():
    """``advkd sample`` by processes."""
    lines = []
    for result in stored("sample_scaling"):
        rates = result["images_per_second"]
        lines += [
            *source(result, rates.values()),
            table_row("processes, and cores", "images per second", "efficiency"),
            table_rule(3),
        ]
        for processes, rate in rates.items():
            lines.append(table_row(processes, f"{rate['median']:.0f}", f"{100 * result['efficiency'][processes]:.0f} %"))
        lines.append("")
    return lines[:-1] or NOTHING


def evaluation():
    """Distances of the shipped student, with floors and intervals."""
    lines = []
    for result in stored("evaluation"):
        titles, *rows = cells(result)
        lines += [
            *source(result, (), INTERVALS),
            table_row(*titles),
            table_rule(len(titles)),
            *(table_row(*row) for row in rows),
        ]
    return lines


def ablation():
    """Worth of each choice of the recipe."""
    lines = []
    for result in stored("ablation"):
        score = result["runs"][0]["score"]
        titles = ("run", f"{score}, x floor (95 %)", "at infinity", "precision", "recall", "likeness")
        lines += [*source(result, (), INTERVALS), table_row(*titles), table_rule(len(titles))]
        for run in result["runs"]:
            low, high = (end / run["floor"] for end in run["frechet_interval"])
            figures = (f"{run['times_floor']:.1f} ({low:.1f} to {high:.1f})", f"{run['at_infinity']:.2f}")
            figures += (f"{run['precision']:.3f}", f"{run['recall']:.3f}", f"{run['correlation']:.3f}")
            lines.append(table_row(run["name"], *figures))
        lines += ["", "<details><summary>The command of each row</summary>", "", "```sh"]
        lines += [line for run in result["runs"] for line in (f"# {run['name']}", run["command"])]
        lines += ["```", "", "</details>"]
    return lines


def _time(entry):
    if "missing" in entry:
        return "cannot run here"
    if "seconds" not in entry:
        return f"off by {entry['parity']['error']:.1e}, not timed"
    median, p20, p80 = (1e3 * entry["seconds"][key] for key in ("median", "p20", "p80"))
    return f"{median:.2f} ({p20:.2f} to {p80:.2f})"


def _rate(entry):
    return f"{entry['flop_per_second'] / 1e9:.0f}" if "flop_per_second" in entry else ""
