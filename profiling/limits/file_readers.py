"""How every kind of file is read, and what it means: by a command or a public function, and by a plain parse."""

import dataclasses
import json
import math
import tomllib
from unittest import mock

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from advkd import AdvKDPipeline, DenoiserStudent, FusedStudent, Sampler, Student, StudentConfig, load_student
from advkd.data.images import load_images
from advkd.data.pictures import read_metrics, save_curves, save_grid
from advkd.data.trajectories import Trajectories
from advkd.diffusion.loading import Classes
from advkd.diffusion.solvers import Solver
from advkd.diffusion.teacher import Teacher
from advkd.evaluation import report
from advkd.evaluation.features import build_extractor
from advkd.methods.adv_kd import RECIPES
from advkd.models.classifier import Classifier, ClassifierConfig
from advkd.models.denoiser import ConditionConfig, ConditionEmbedding
from advkd.runtime.files import sha256

from .plain import Meaningless, finite, known_fields, own_fields, parse_json, parse_safetensors, with_tensors
from .samples import RECORDING, RUN, TRAINING, WEIGHTS, evaluate_pictures, kept_in, run_command


def sampled(place, name="student"):
    run_command("sample", "--student", place / name, "-n", 2, "--backend", "reference", "--out", place / "grid.png")
    with Image.open(place / "grid.png") as image:
        return np.asarray(image)


def sampled_meaning(place, name="student"):
    folder = place / name
    values = parse_json(folder / "config.json")
    student = with_tensors(Student(StudentConfig(**own_fields(values))), parse_safetensors(folder / WEIGHTS))
    images = finite(student.fuse("reference").sample(2))
    save_grid(images, place / "meant.png")
    with Image.open(place / "meant.png") as image:
        return np.asarray(image)


def recorded(place):
    return Student.from_pretrained(place / "student").training_record


def recorded_meaning(place):
    return parse_json(place / "student" / "training.json")


def fused(place, name="fused"):
    engine = FusedStudent.from_pretrained(place / name, backend="cpu")
    return engine.sample(2), dataclasses.asdict(engine.config)


def fused_meaning(place, name="fused"):
    values, tensors = parse_json(place / name / "config.json"), parse_safetensors(place / name / WEIGHTS)
    engine = with_tensors(FusedStudent(FusedStudent.config_class(**own_fields(values)), "cpu"), tensors)
    return finite(engine.sample(2)), dataclasses.asdict(engine.config)


def piped(place):
    pipeline = AdvKDPipeline.from_pretrained(place / "pipeline")
    return pipeline.student.student.fuse("reference").sample(2)


def piped_meaning(place):
    parse_json(place / "pipeline" / "model_index.json")
    values = {k: v for k, v in parse_json(place / "pipeline" / "student" / "config.json").items() if v is not None}
    tensors = parse_safetensors(place / "pipeline" / "student" / WEIGHTS)
    return finite(with_tensors(Student(StudentConfig(**own_fields(values))), tensors).fuse("reference").sample(2))


def taught(name):
    """A teacher's drawings, through the command line."""

    def read(place):
        out = place / "out"
        options = ("--num", 2, "--steps", 2, "--depth", 4, "--batch-size", 2, "--shard-size", 2)
        run_command("trajectories", "--teacher", place / name, *options, "--out", out)
        return load_file(out / "shard-00000.safetensors")["level_04"]

    return read


def taught_meaning(name):
    def meaning(place):
        folder = place / name
        parse_json(folder / "model_index.json")
        unet = diffusers.UNet2DModel(**known_fields(diffusers.UNet2DModel, parse_json(folder / "unet" / "config.json")))
        values = parse_json(folder / "scheduler" / "scheduler_config.json")
        kind = getattr(diffusers, values.get("_class_name", "DDPMScheduler"))
        tensors = {}
        for path in sorted((folder / "unet").glob("*.safetensors")):
            tensors |= parse_safetensors(path)
        unet = with_tensors(unet, tensors)
        teacher = Teacher(unet, kind(**known_fields(kind, values)), "plain")
        return finite(teacher.sample(2, steps=2)).half()

    return meaning


def denoised(place):
    """Images of a denoiser student, and what it says of itself."""
    student = load_student(place / "denoiser")
    facts = [list(student.model.class_names), student.model.most_guidance, student.training_record]
    return student.sample(2, labels=[0, 1]), facts


def denoised_meaning(place):
    folder = place / "denoiser"
    values, classes = parse_json(folder / "sampler.json"), parse_json(folder / "classes.json")
    steps, guidance, name = (values.pop(key) for key in ("steps", "guidance", "solver"))
    condition = ConditionEmbedding(ConditionConfig(**own_fields(parse_json(folder / "condition" / "config.json"))))
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    unet.class_embedding = with_tensors(condition, parse_safetensors(folder / "condition" / WEIGHTS))
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    teacher = Teacher(unet, scheduler, "plain", Classes(tuple(classes["names"]), classes["null"]))
    student = DenoiserStudent(teacher, Sampler(Solver(name, **own_fields(values)), steps, guidance))
    facts = [classes["names"], condition.config.guidance, parse_json(folder / "training.json")]
    return finite(student.sample(2, labels=[0, 1])), facts


def older(place):
    return Teacher.from_pretrained(place / "older").sample(2, steps=2)


def older_meaning(place):
    tensors = torch.load(place / "older" / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    save_file(tensors, place / "older" / "unet" / WEIGHTS, {"format": "pt"})
    return older(place)


def distilled(place):
    """The weights of a student distilled from trajectories."""
    run_command("distill", "--init", place / "student", "--trajectories", place / "data", *RUN, "--out", place / "out")
    return load_file(place / "out" / WEIGHTS)


def read_back(place, name="data"):
    data = Trajectories(place / name)
    data.verify()
    return data.info.to_json(), data.standard_deviations, data.batch(list(range(len(data))), [1, 2, 3, 4])


def read_back_meaning(place, name):
    folder = place / name
    manifest, parts = parse_json(folder / "manifest.json"), []
    # A null has no meaning.
    described = _unnamed({key: value for key, value in manifest["recipe"].items() if value is not None})
    for path, entry in ((folder / entry["file"], entry) for entry in manifest["shards"]):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if sha256(path) != entry["sha256"] or _unnamed(json.loads(header["__metadata__"]["advkd"])["recipe"]) != described:
            raise Meaningless(f"{path.name} is of another recording")
        parts.append(parse_safetensors(path))
    deviations = manifest["standard_deviations"]
    if not all(type(value) in (int, float) and 0 <= value < math.inf for value in deviations):
        raise Meaningless("a deviation is none")
    whole = {name: torch.cat([part[name] for part in parts]).float() for name in parts[0]}
    told = {key: manifest["recipe"][key] for key in described}
    return told, deviations, (whole["z"], {k: whole[f"level_{k:02d}"] for k in (1, 2, 3, 4)})


def _unnamed(described):
    """A data set's description without its teacher's name, which may be another on every machine."""
    return {**described, "teacher": {**described["teacher"], "name": None}}


def recorded_on(place):
    """The recording goes on: nothing is left to do."""
    run_command("trajectories", "--teacher", place / "teacher", "--num", 12, "--seed", 0, *RECORDING, "--out", place / "data")
    return read_back(place)


def resumed(place):
    data = ("--init", place / "student", "--trajectories", place / "data", "--seed", 0)
    run_command("distill", *data, *RUN, "--out", place / "run", "--resume")
    # The last row is made anew.
    rows = (place / "run" / "metrics.csv").read_text().splitlines()
    return load_file(place / "run" / WEIGHTS), rows


def whole_run(samples):
    """The weights and rows of the same run, never interrupted."""
    return load_file(samples / "run-whole" / WEIGHTS), (samples / "run-whole" / "metrics.csv").read_text().splitlines()


def resumed_meaning(place):
    """The rows up to the checkpoint as they stand, what comes after them made anew, and the weights of a whole run."""
    titles, *whole = (place / "damaged").read_text().split("\n")[:-1]
    try:
        places = [tuple(map(int, row.split(",")[:2])) for row in whole]
    except ValueError as error:
        raise Meaningless(error) from error
    if any(row.count(",") != titles.count(",") for row in whole) or places != sorted(set(places)):
        raise Meaningless("rows are torn or not in order")
    weights, rows = whole_run(place.with_name("samples"))
    return weights, [titles, *(row for row, at in zip(whole, places) if at <= (1, 2)), rows[-1]]


def trained_on(place):
    data = ("--data", place / "pictures", "--seed", 0)
    run_command("teacher", "train", *data, *TRAINING, "--out", place / "training", "--resume")
    return load_file(place / "training" / "unet" / WEIGHTS)


def whole_training(samples):
    return load_file(samples / "training-whole" / "unet" / WEIGHTS)


def reported(*options):
    """The page of a report, its pictures left out."""

    def read(place):
        models = ("--student", place / "student", "--teacher", place / "teacher")
        tables = place / "tables"
        given = [value for option in options for value in (f"--{option}", tables / REPORTED[option])]
        curves = []
        with (
            mock.patch(
                "advkd.evaluation.report.save_pictures", lambda teacher, student, metrics, out: curves.append(metrics) or {}
            ),
            mock.patch("advkd.evaluation.report.figure", lambda path, caption: ""),
        ):
            run_command("report", *models, "--evaluation", tables / "evaluation.json", *given, "--out", place / "out")
        if "metrics" in options:
            save_curves(curves[0], place / "out" / "curves.png")
            return read_metrics(curves[0])
        return (place / "out" / "report.html").read_text()

    return read


REPORTED = {"metrics": "metrics.csv", "ablation": "ablation.json"}


def metrics_meaning(place):
    """Columns of a table of numbers, all rows of which are whole but for the last."""
    try:
        titles, *rows = (place / "tables" / "metrics.csv").read_text().split("\n")
        cells = [row.split(",") for row in rows[:-1] if row]
        if any(len(row) != titles.count(",") + 1 for row in cells):
            raise Meaningless("a row is torn")
        columns = [[float(word) if word else math.nan for word in column] for column in zip(*cells)]
        return dict(zip(titles.split(","), columns, strict=True))
    except ValueError as error:
        raise Meaningless(error) from error


def page_meaning(name=""):
    """The page that the undamaged code makes of what a plain parse gives."""

    def meaning(place):
        result = parse_json(place / "tables" / "evaluation.json")
        runs = parse_json(place / "tables" / "ablation.json")["runs"] if name == "ablation" else []
        with mock.patch("advkd.evaluation.report.figure", lambda path, caption: ""):
            return report._page("advkd: one pass against many", result, runs, [("", "")])

    return meaning


def extracted(place, name="classifier"):
    extractor = build_extractor(str(place / name))
    return extractor(load_images(place / "pictures")), extractor.score, extractor.classifier.training_record


def extracted_meaning(place, name="classifier"):
    folder = place / name
    config = ClassifierConfig(**own_fields(parse_json(folder / "config.json")))
    classifier = with_tensors(Classifier(config), parse_safetensors(folder / WEIGHTS))
    features = finite(classifier.features(load_images(place / "pictures").float() / 127.5 - 1))
    return features, f"FD-{config.name}", parse_json(folder / "training.json")


def evaluated_from_kept(place):
    with kept_in(place / "cache"):
        return evaluate_pictures(place, "classifier")


def evaluated_samples(place):
    models = ("--student", place / "student", "--teacher", place / "teacher", "--teacher-samples", place / "data")
    options = ("--num", 5, "--seed", 10, "--resamples", 20, "--real", "none", "--extractor", place / "classifier")
    run_command("evaluate", *models, *options, "--out", place / "out")
    return json.loads((place / "out" / "evaluation.json").read_text())["rows"]


def evaluated_by_inception(place):
    folders = ("--images", place / "pictures", "--reference", place / "pictures", "--extractor", "inception")
    run_command("evaluate", *folders, "--inception-weights", place / "tables" / "inception.pth", "--out", place / "out")
    return json.loads((place / "out" / "evaluation.json").read_text())["rows"]


def planned(place):
    """Images by kept plans; other plans round otherwise."""
    with kept_in(place / "cache"):
        run_command("sample", "--student", place / "student", "-n", 2, "--backend", "cpu", "--out", place / "grid.png")
    with Image.open(place / "grid.png") as image:
        return Coarse(np.asarray(image).astype(int))


class Coarse:
    """Pixels that equal others within a level."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __eq__(self, other):
        return self.pixels.shape == other.pixels.shape and abs(self.pixels - other.pixels).max() <= 1


def told(option, file):
    """The configuration with which the command line starts a distillation, which is left out."""

    def read(place):
        asked = []
        given = {"preset": (), "config": ("--preset", "digits")}[option]
        with (
            mock.patch(
                "advkd.training.distillation.distill", lambda data, student, config, *_, **__: asked.append((student, config))
            ),
            # There is no recording here, and a fresh student takes its classes.
            mock.patch("advkd.cli.distill._classes", lambda trajectories: ()),
        ):
            told = (*given, f"--{option}", place / "tables" / file)
            run_command("distill", "--trajectories", place, *told, "--out", place / "out")
        (student, config), *_ = asked
        if option == "preset":
            return dataclasses.asdict(student.config)
        config.validate(12, True, 10**9)
        return dataclasses.asdict(config)

    return read


def preset_meaning(place):
    values = parse_json(place / "tables" / "preset.json")
    return {**dataclasses.asdict(StudentConfig()), **own_fields(values)}


def recipe_meaning(file):
    def meaning(place):
        path = place / "tables" / file
        try:
            values = tomllib.loads(path.read_text()) if path.suffix == ".toml" else parse_json(path)
        except ValueError as error:
            raise Meaningless(error) from error
        base = dataclasses.asdict(RECIPES[values.pop("recipe", "joint")])
        return {**base, **{key: _numbers(value, base[key]) for key, value in values.items() if value is not None}}

    return meaning


def _numbers(value, default):
    """Lists of numbers, or texts of them, as tuples; a text of a number as a number."""
    if isinstance(default, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(float(part) if isinstance(part, str) else part for part in parts if part != "")
    return type(default)(value) if isinstance(value, str) else value


def sampled_on(place):
    """More pictures into a folder that has some."""
    run_command("sample", "--student", place / "student", "-n", 3, "--seed", 3, "--out", f"{place / 'samples'}/")
    return [path.read_bytes() for path in sorted((place / "samples").glob("*.png"))]


def looked_at(name):
    return lambda place: load_images(place / f"picture-{name}")


def looked_at_meaning(name):
    """Pillow's own pixels, where they are plain ones."""

    def meaning(place):
        with Image.open(place / f"picture-{name}" / name) as image:
            if "transparency" in image.info or image.mode not in ("L", "RGB", "P"):
                return Anything()
            image.load()
            # A palette of grays is gray.
            plain = image.convert("RGB") if image.mode == "P" else image
            pixels = np.atleast_3d(np.asarray(plain))
        if image.mode == "P" and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., :1]
        side = 1 << (min(pixels.shape[:2]).bit_length() - 1)
        if pixels.shape[0] != pixels.shape[1] or side != pixels.shape[0] or image.getexif().get(274, 1) != 1:
            return Anything()
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]

    return meaning


class Anything:
    """A meaning that is not looked into further."""


def classes_read(place):
    """A picture among those that a classifier is trained on, through the command line."""
    options = ("--steps", 1, "--batch-size", 2, "--num-features", 2)
    run_command("classifier", "train", "--data", place / "classes", *options, "--out", place / "out")
    return load_file(place / "out" / WEIGHTS)
