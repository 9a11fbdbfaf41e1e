"""Small files of every kind that is read, made by the commands themselves."""

import contextlib
import dataclasses
import io
import json
import shutil
from unittest import mock

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from advkd import AdvKDPipeline, DenoiserStudent, Sampler, Student, StudentConfig, Teacher
from advkd.cli.main import main
from advkd.diffusion.loading import Classes
from advkd.diffusion.solvers import Solver
from advkd.engines.kept import kept_file
from advkd.evaluation.report import RUN_KEYS
from advkd.models.denoiser import embedding_of
from advkd.runtime.files import write_json
from advkd.runtime.timing import processor_identity
from advkd.training.trainer import Trainer

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHAPE = StudentConfig(image_size=8, image_channels=1, channels=(8, 8, 8, 8), latent_size=2)
RECORDING = ("--steps", 4, "--depth", 4, "--batch-size", 4, "--shard-size", 4)
RUN = ("--updates", 3, "--batch-sizes", 2, "--critic-channels", 8, "--checkpoint-every", 2)
TRAINING = ("--size", 8, "--channels", 8, "--steps", 3, "--batch-size", 2, "--checkpoint-every", 2)
FORMATS = {
    "gray.png": {},
    "colour.png": {},
    "palette.png": {},
    "a.jpg": {"quality": 90},
    "progressive.jpg": {"progressive": True},
    "lossy.webp": {"quality": 80},
    "lossless.webp": {"lossless": True},
    "a.bmp": {},
    "a.gif": {},
    "a.tif": {},
    "packed.tif": {"compression": "tiff_lzw"},
}
"""Pictures by name, with the options that Pillow saves them with."""


class Refused(Exception):
    """The command line's last word, and its exit code."""

    def __init__(self, code, text):
        super().__init__(text.strip())
        self.code = code


def run_command(*arguments):
    """The command line in this process; ``Refused`` with what it says where it does not end well."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main([str(argument) for argument in arguments], standalone_mode=True)
        except SystemExit as ended:
            if ended.code:
                raise Refused(ended.code, said.getvalue()) from None


def make_samples(folder):
    """One folder of every kind that is read; what is measured meanwhile is kept in its cache alone."""
    with kept_in(folder / "cache"):
        _make_samples(folder)
    _name_kept(folder)


def _make_samples(folder):
    torch.manual_seed(0)
    students = [Student(SHAPE) for _ in range(2)]
    for name, student in zip(("student", "student-other"), students):
        student.training_record = {"samples": [{"seed": 5, "start": 0, "num": 4}], "runs": []}
        student.save_pretrained(folder / name)
    other = json.loads((folder / "student-other" / "config.json").read_text())
    write_json(folder / "student-other" / "config.json", {**other, "slope": 0.1})
    write_json(folder / "student-other" / "training.json", {"samples": [{"seed": 7, "start": 3, "num": 9}], "runs": []})
    for name in ("student", "student-other"):
        _without_digest(folder / name, folder / f"bare-{name}")
        student = Student.from_pretrained(folder / name).fuse("cpu", tune=False)
        student.save_pretrained(folder / name.replace("student", "fused"))
    for name in ("fused", "fused-other"):
        _without_digest(folder / name, folder / f"bare-{name}")
    for name, student in zip(("pipeline", "pipeline-other"), students):
        AdvKDPipeline(student.eval()).save_pretrained(folder / name)
    _make_teachers(folder)
    _make_denoisers(folder)
    _make_pictures(folder)
    for name, seed in (("data", 0), ("data-other", 1)):
        models = ("--teacher", folder / "teacher")
        run_command("trajectories", *models, "--num", 12, "--seed", seed, *RECORDING, "--out", folder / name)
        shutil.copytree(folder / name, folder / f"bare-{name}")
        manifest = json.loads((folder / name / "manifest.json").read_text())
        manifest.pop("digest", None)
        write_json(folder / f"bare-{name}" / "manifest.json", manifest)
    _make_classifiers(folder)
    _make_runs(folder)
    _make_tables(folder)
    for name, seed in (("samples", 3), ("samples-other", 4)):
        run_command("sample", "--student", folder / "student", "-n", 2, "--seed", seed, "--out", f"{folder / name}/")
    evaluate_pictures(folder, "classifier")
    Student.from_pretrained(folder / "student").fuse("cpu")


def _without_digest(source, target):
    """A model of a folder as others write it, and as it was written before there were digests."""
    shutil.copytree(source, target)
    save_file(load_file(source / WEIGHTS), target / WEIGHTS, {"format": "pt"})


def _make_teachers(folder):
    for name, seed in (("teacher", 0), ("teacher-other", 1)):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_end=(0.02, 0.01)[seed])
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder / name)
        for kind in ("sharded", "older"):
            shutil.copytree(folder / name, folder / name.replace("teacher", kind))
        older = folder / name.replace("teacher", "older") / "unet"
        torch.save(load_file(older / WEIGHTS), older / "diffusion_pytorch_model.bin")
        (older / WEIGHTS).unlink()
        sharded = folder / name.replace("teacher", "sharded") / "unet"
        (sharded / WEIGHTS).unlink()
        unet.save_pretrained(sharded, max_shard_size="30KB")


def _make_denoisers(folder):
    """Conditional denoiser students that take the guidance weight."""
    for name, seed in (("denoiser", 0), ("denoiser-other", 1)):
        torch.manual_seed(seed)
        teacher = Teacher.from_pretrained(folder / name.replace("denoiser", "teacher"))
        unet = diffusers.UNet2DModel.from_config(teacher.unet.config, num_class_embeds=3)
        told = Teacher(unet, teacher.scheduler, "told", Classes(("a", "b") if seed else ("c", "d"), 2))
        sampler = Sampler(Solver("ddim", spacing="trailing"), 2 + seed, 1.0 + seed)
        student = DenoiserStudent.from_teacher(told).told_more(seed, guidance=4.0 + seed)
        torch.nn.init.normal_(embedding_of(student.model.unet).guidance[-1].weight)
        record = {"samples": [{"seed": seed, "start": 0, "num": 4}], "runs": []}
        DenoiserStudent(student.model, sampler, record).save_pretrained(folder / name)


def _make_pictures(folder):
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC) for pixels in coarse]
    for name, options in FORMATS.items():
        mode = {"gray.png": "L", "palette.png": "P", "a.gif": "P"}.get(name, "RGB")
        for place, picture in zip(("", "-other"), pictures):
            (folder / f"picture-{name}{place}").mkdir()
            picture.convert(mode).save(folder / f"picture-{name}{place}" / name, **options)
    for i, picture in enumerate(pictures):
        for place in ("pictures", "classes/" + "ab"[i % 2]):
            (folder / place).mkdir(parents=True, exist_ok=True)
            picture.convert("L").resize((8, 8)).save(folder / place / f"{i:02d}.png")


def _make_classifiers(folder):
    for name, seed in (("classifier", 0), ("classifier-other", 1)):
        options = ("--steps", 2, "--batch-size", 4, "--num-features", 2, "--seed", seed)
        run_command("classifier", "train", "--data", folder / "classes", *options, "--out", folder / name)
        _without_digest(folder / name, folder / f"bare-{name}")


def _make_runs(folder):
    """A distillation and a teacher's training that were interrupted, and the same ones whole."""
    distilled = ("distill", "--init", folder / "student", "--trajectories", folder / "data", "--seed", 0)
    run_command(*distilled, *RUN, "--out", folder / "run-whole")
    trained = ("teacher", "train", "--data", folder / "pictures", "--seed", 0)
    run_command(*trained, *TRAINING, "--out", folder / "training-whole")
    for name, seed in (("run", 0), ("run-other", 1)):
        with mock.patch("advkd.training.trainer.save_grid", side_effect=KeyboardInterrupt):
            data = ("--init", folder / "student", "--trajectories", folder / "data", "--seed", seed)
            _must_end(130, "distill", *data, *RUN, "--out", folder / name)
        shutil.rmtree(folder / name / "tensorboard")
    for name, seed in (("training", 0), ("training-other", 1)):
        step = Trainer.step

        def interrupted(run, step=step):
            if run.done == 2:
                raise KeyboardInterrupt
            return step(run)

        with mock.patch.object(Trainer, "step", interrupted):
            data = ("--data", folder / "pictures", "--seed", seed)
            _must_end(130, "teacher", "train", *data, *TRAINING, "--out", folder / name)


def _must_end(code, *arguments):
    try:
        run_command(*arguments)
    except Refused as refused:
        if refused.code == code:
            return
        raise
    raise AssertionError(f"the command ended well: {arguments}")


def _make_tables(folder):
    for name, seed in (("tables", 0), ("tables-other", 1)):
        (folder / name).mkdir()
        options = ("--num", 5, "--seed", 10 + seed, "--resamples", 20, "--real", "none", "--extractor", folder / "classifier")
        models = ("--student", folder / "student", "--teacher", folder / "teacher")
        run_command("evaluate", *models, "--teacher-samples", folder / "data", *options, "--out", folder / name)
        numbers = dict.fromkeys(set(RUN_KEYS) - {"name", "command"}, 1.5 + seed)
        write_json(folder / name / "ablation.json", {"runs": [{"name": "a", "command": "advkd", **numbers}] * 2})
        shutil.copy(folder / ("run", "run-other")[seed] / "metrics.csv", folder / name)
        shape = {**dataclasses.asdict(SHAPE), "slope": (0.2, 0.3)[seed]}
        write_json(folder / name / "preset.json", {"_comment": "a student", **shape})
        recipe = {"recipe": "joint", "updates": [3], "learning_rate": 0.001 + seed, "augment": True, "betas": [0.0, 0.9]}
        write_json(folder / name / "recipe.json", recipe)
        lines = [f"{key} = {json.dumps(value)}" for key, value in recipe.items()]
        (folder / name / "recipe.toml").write_text("\n".join(lines) + "\n")
        shutil.copy(folder / "older" / "unet" / "diffusion_pytorch_model.bin", folder / name / "inception.pth")


def _name_kept(folder):
    """Names for kept files that are the same everywhere; ``names.json`` has their own."""
    with kept_in(folder / "cache"):
        plans = kept_file(processor_identity())
    kept = sorted((folder / "cache").glob("features-*.safetensors"))
    (folder / "cache-other" / "plans").mkdir(parents=True)
    kept[0].rename(folder / "cache" / "features.safetensors")
    shutil.copy(kept[1], folder / "cache-other" / "features.safetensors")
    plans.rename(plans.with_name("plan.json"))
    plan = json.loads((folder / "cache" / "plans" / "plan.json").read_text())
    write_json(folder / "cache-other" / "plans" / "plan.json", {**plan, "version": 0})
    names = {"features.safetensors": kept[0].name, "plans/plan.json": f"plans/{plans.name}"}
    write_json(folder / "cache" / "names.json", names)


def evaluate_pictures(folder, extractor):
    """Measure one folder of pictures against another with a classifier below ``folder``; returns the rows."""
    sets = ("--images", folder / "pictures", "--reference", folder / "classes", "--extractor", folder / extractor)
    run_command("evaluate", *sets, "--resamples", 20, "--out", folder / "out")
    return json.loads((folder / "out" / "evaluation.json").read_text())["rows"]


@contextlib.contextmanager
def kept_in(path):
    """A cache of its own, in which files have the names that they had when it was made."""
    if (path / "names.json").exists():
        for name, own in json.loads((path / "names.json").read_text()).items():
            (path / name).rename(path / own)
    with mock.patch.dict("os.environ", {"ADVKD_CACHE": str(path)}):
        yield
