"""Specifications of the benchmarks' tables: columns, formats and the results that they show."""

from operator import itemgetter

from advkd.evaluation.evaluate import cells

from ..evidence import Table, contestants, markdown, scaled, time_of

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


def _engine(name):
    """Milliseconds of one engine in a case; of all of ours where it is advkd."""

    def cell(case):
        entries = [e for e in case["contestants"] if e["name"] == name or name == "advkd" and e["kind"] == "ours"]
        return " ".join(map(_milliseconds, entries)) or "-"

    return cell


def _milliseconds(entry):
    return f"{1e3 * entry['seconds']['median']:.4g}" if "seconds" in entry else "off" if "parity" in entry else "cannot run"


def _speed(entry):
    """GB/s of the bytes that must move."""
    return f"{1e-9 * entry['moved_bytes'] / entry['seconds']['median']:.2g}" if "seconds" in entry else ""


def _rate(entry):
    return f"{entry['flop_per_second'] / 1e9:.0f}" if "flop_per_second" in entry else ""


PENALTIES = {
    "autograd": "autograd",
    "constant slopes": "autograd, LeakyReLU's slopes as constants",
    "torch.func": "torch.compile of torch.func.grad",
    "advkd": "advkd",
    "compiled": "advkd compiled",
}
"""Column's title -> the contestant, whose faster layout counts."""
RATIOS = (("autograd", "advkd"), ("autograd", "compiled"), ("constant slopes", "advkd"), ("torch.func", "compiled"))


def _fastest(case, title):
    """Seconds of a contestant in its faster layout, or None."""
    named = [PENALTIES[title] + layout for layout in ("", ", contiguous", ", channels_last")]
    times = [e["seconds"]["median"] for e in case["contestants"] if e["name"] in named and "seconds" in e]
    return min(times, default=None)


def _penalty(title):
    return lambda case: "-" if (value := _fastest(case, title)) is None else f"{1e3 * value:.1f}"


def _ratio(*pair):
    def cell(case):
        slow, quick = (_fastest(case, title) for title in pair)
        return "-" if slow is None or quick is None else f"{slow / quick:.2f} x"

    return cell


def _updates(result):
    """Rows of a distillation, each with the seconds of plain PyTorch."""
    plain = result["rows"]["plain PyTorch"]["seconds"]["median"]
    return [{"name": name, **row, "gain": plain / row["seconds"]["median"]} for name, row in result["rows"].items()]


def _recordings(result):
    rows = {name: row["seconds"] for name, row in result["rows"].items()}
    plain = sum(rows["diffusers, plain loop"])
    names = sorted(rows, key=lambda name: (name.startswith("advkd"), name))
    figures = {name: (", ".join(f"{spent:.1f}" for spent in rows[name]), plain / sum(rows[name])) for name in names}
    return [{"name": name, "num": result["num"], "times": times, "gain": gain} for name, (times, gain) in figures.items()]


def _layers(result):
    """The layers of each preset that take most of its time, and the whole."""
    for plan in result["students"]:
        rows, peak = plan["layers"], plan["products_per_second"][plan["dtype"]]
        slowest = sorted(rows, key=lambda row: -row["seconds"]["median"])[:3]
        for row in [row for row in rows if row in slowest]:
            side = f"up to {2 * row['height']}" if row["upsample"] else f"at {row['height']}"
            layer = f"{row['c_in']} to {row['c_out']}, {side}"
            yield {**plan, "layer": layer, "algorithm": row["algorithm"], **_layer_rates([row], peak)}
        yield {**plan, "layer": "all", "algorithm": "", **_layer_rates(rows, peak)}


def _layer_rates(rows, peak):
    spent = sum(row["seconds"]["median"] for row in rows)
    direct, made = (sum(row[key] for row in rows) for key in ("direct_products", "products"))
    phases = sum(row["direct_products"] * (4 / 9 if row["upsample"] else 1) for row in rows)
    shares = {key: 100 * count / spent / peak for key, count in (("useful", direct), ("phases", phases), ("made", made))}
    return {"ms": 1e3 * spent, "gflops": 2e-9 * direct / spent, **shares}


def _commands(result):
    runs = [line for run in result["runs"] for line in (f"# {run['name']}", run["command"])]
    return ["", '<details markdown="1"><summary>The command of each row</summary>', "", "```sh", *runs, "```", "", "</details>"]


def _of_floor(run):
    low, high = (end / run["floor"] for end in run["frechet_interval"])
    return f"{run['times_floor']:.1f} ({low:.1f} to {high:.1f})"


def _amdahl(result):
    last = ("Amdahl's bound, a critic's update in no time", "", "", "", f"{result['amdahl_critic']:.2f} x")
    return markdown(last, [])[:1]


OF_THE_RATE = ", of the rate in registers"
TABLES = {
    "student": Table(
        "bench_student",
        {
            "student": "{case}",
            **{title: _engine(name) for name, title in ENGINES.items()},
            "advkd against the fastest": "{ratio:.2f} x",
        },
    ),
    "teacher": Table(
        "bench_teacher",
        {"work": "{case}", "images": "{images}", "engine": "{name}", "ms per call (p20 to p80)": time_of, "GFLOP/s": _rate},
        contestants,
    ),
    "sampler_step": Table(
        "bench_sampler_step",
        {"step": "{case}", "by": "{name}", "ms (p20 to p80)": time_of, "GB/s of what must be moved": _speed},
        contestants,
    ),
    "gradient_penalty": Table(
        "bench_gradient_penalty",
        {
            "work": "{case}",
            **{title: _penalty(title) for title in PENALTIES},
            **{" / ".join(pair): _ratio(*pair) for pair in RATIOS},
            "work bound": "{work_bound:.2f} x",
        },
    ),
    "pair_critic": Table(
        "bench_pair_critic",
        {
            "update": "{case}",
            **{title: _penalty(title) for title in ("autograd", "advkd")},
            "autograd / advkd": _ratio("autograd", "advkd"),
        },
    ),
    "penalty_memory": Table(
        "penalty_scaling",
        {
            "critic": "{case}",
            **{name: scaled(f"bytes/{name}/median", 1e-6, "{:.0f} MB") for name in ("autograd", "advkd")},
            "share": lambda row: f"{row['bytes']['advkd']['median'] / row['bytes']['autograd']['median']:.2f}",
        },
        itemgetter("peaks"),
        lambda result: [peak for row in result["peaks"] for peak in row["bytes"].values()],
    ),
    "norm_act": Table("bench_norm_act", {"work": "{case}", "by": "{name}", "ms (p20 to p80)": time_of}, contestants),
    "distillation": Table(
        "distillation",
        {
            "an update of the demo's distillation": "{name}",
            **{
                title: scaled(f"{key}/median", 1e3, "{:.0f}")
                for title, key in {"ms": "seconds", "critic": "critic", "student": "rest"}.items()
            },
            "against plain PyTorch": "{gain:.2f} x",
        },
        _updates,
        lambda result: [row[part] for row in result["rows"].values() for part in ("seconds", "critic", "rest")],
        below=_amdahl,
    ),
    "recording": Table(
        "recording",
        {"recorded by": "{name}", "trajectories": "{num}", "seconds": "{times}", "against the plain loop": "{gain:.2f} x"},
        _recordings,
        lambda result: [row["seconds"] for row in result["rows"].values()],
    ),
    "layers": Table(
        "layers",
        {
            "student": "{preset}, {dtype}",
            "layer": "{layer}",
            "algorithm": "{algorithm}",
            "ms": "{ms:.2f}",
            "useful GFLOP/s": "{gflops:.0f}",
            f"useful{OF_THE_RATE}": "{useful:.0f} %",
            f"phase count{OF_THE_RATE}": "{phases:.0f} %",
            f"products made{OF_THE_RATE}": "{made:.0f} %",
        },
        _layers,
        lambda result: [row["seconds"] for plan in result["students"] for row in plan["layers"]],
    ),
    "precision": Table(
        "precision",
        {
            "dtype": "{dtype}",
            "FD-digits (95 %)": "{frechet:.4f} ({frechet_interval[0]:.3f} to {frechet_interval[1]:.3f})",
            "x floor": "{times_floor:.3f}",
            "precision": "{precision:.3f}",
            "recall": "{recall:.3f}",
            "PSNR": lambda row: f"{row['psnr']:.1f} dB" if row["dtype"] == "bfloat16" else "",
        },
        lambda result: [{"dtype": dtype, "psnr": result["psnr"], **row} for dtype, row in result["rows"].items()],
        lambda result: (),
        INTERVALS,
    ),
    "footprint": Table(
        "scaling",
        {
            "student": "{preset}, {dtype}",
            "packed weights": scaled("weights", 1e-6, "{:.1f} MB"),
            "workspace": scaled("workspace", 1e-6, "{:.1f} MB"),
            "two largest activations": scaled("two_largest_activations", 1e-6, "{:.1f} MB"),
            "an image adds to the process": scaled("first_image/image_bytes/median", 1e-6, "{:.1f} MB"),
            "first image after": "{first_image[seconds][median]:.2f} s",
        },
        itemgetter("footprints"),
        lambda result: [row["first_image"]["seconds"] for row in result["footprints"]],
    ),
    "sample_scaling": Table(
        "sample_scaling",
        {
            "processes, and cores": "{processes}",
            "images per second": "{median:.0f}",
            "efficiency": scaled("efficiency", 100, "{:.0f} %"),
        },
        lambda result: [
            {"processes": processes, **rate, "efficiency": result["efficiency"][processes]}
            for processes, rate in result["images_per_second"].items()
        ],
        lambda result: result["images_per_second"].values(),
    ),
    "evaluation": Table(
        "evaluation",
        lambda result: {title: itemgetter(i) for i, title in enumerate(cells(result)[0])},
        lambda result: cells(result)[1:],
        lambda result: (),
        INTERVALS,
    ),
    "likelihood": Table(
        "likelihood",
        {
            "teacher": "{teacher[name]}",
            "N": "{likelihood[images]}",
            "steps": lambda row: len(row["likelihood"]["timesteps"]),
            "variance": "{variance}",
            "bits per dimension, at most": "{likelihood[bits_per_dimension]:.4f}",
            "95 % interval": "{likelihood[interval][0]:.4f} to {likelihood[interval][1]:.4f}",
            "prior": "{likelihood[prior]:.4f}",
            "sum of the steps": lambda row: f"{sum(row['likelihood']['steps']):.4f}",
            "decoder": "{likelihood[decoder]:.4f}",
        },
        lambda result: [result],
        lambda result: (),
        INTERVALS,
    ),
    "ablation": Table(
        "ablation",
        lambda result: {
            "run": "{name}",
            f"{result['runs'][0]['score']}, x floor (95 %)": _of_floor,
            "at infinity": "{at_infinity:.2f}",
            "precision": "{precision:.3f}",
            "recall": "{recall:.3f}",
            "likeness": "{correlation:.3f}",
        },
        itemgetter("runs"),
        lambda result: (),
        INTERVALS,
        below=_commands,
    ),
}
