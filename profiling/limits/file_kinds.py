"""Every kind of file that a command or a public function reads: how it is read, and what it means.

Each reader gives something to compare. The meaning is found a second way, by a plain parse of the file as it stands, or is
none: of a file with a digest nothing but what was written may be read.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from advkd.methods.adv_kd import RECIPES

from . import file_readers as read
from .samples import FORMATS, WEIGHTS, evaluate_pictures


@dataclass(frozen=True)
class Kind:
    """One kind of file and one way to read it.

    Attributes:
        file: its place in the folder of samples; the folder that is its first part is copied for each case.
        read: function of the copy's parent that reads it and returns something to compare.
        meaning: function of the copy's parent that finds the same by a plain parse, or None.
        sealed: the file can tell that it was altered, and means something only as another one that was written whole.
        has_other: there is another file of this kind, in the folder ``<first part>-other``.
        beside: other folders that are copied.
        named: what a refusal may say that does not name the file: an option, a field, what the file does not fit, or that the
            folder it stands in, ``{folder}``, or the one that was asked for, below ``{case}``, does not hold what was meant.
        expected: function of the samples' folder that finds the reader's result on undamaged files in another way, or None.
        written: files that the command itself writes anew where it ends well.
        costly: the command takes a tenth of a second, and has fewer cases.
        readable: the undamaged sample is read; one that is not is refused with and without damage.
    """

    file: str
    read: object
    meaning: object = None
    sealed: bool = False
    has_other: bool = True
    beside: tuple = ()
    named: tuple = ()
    written: tuple = ()
    costly: bool = False
    readable: bool = True
    expected: object = None

    @property
    def folder(self):
        """The folder that is copied."""
        return self.file.split("/")[0]

    @property
    def other(self):
        """Place of another file of this kind, or None."""
        return self.file.replace(self.folder, f"{self.folder}-other", 1) if self.has_other else None

    @property
    def form(self):
        """One of :data:`damage.STRUCTURES`."""
        suffix = Path(self.file).suffix[1:]
        forms = {**dict.fromkeys(("json", "toml", "csv", "safetensors"), suffix), "bin": "pickle", "pth": "pickle"}
        return forms.get(suffix, "image")


SHARD, CHECKPOINT = "shard-00001.safetensors", "checkpoint.safetensors"
PART = "diffusion_pytorch_model-00001-of-00003.safetensors"
OLDER = "older/unet/diffusion_pytorch_model.bin"
RESUMED = {"beside": ("student", "data"), "written": ("run/metrics.csv", f"run/{CHECKPOINT}"), "costly": True}
RESUMED |= {"expected": read.whole_run, "named": ("{folder} holds a run with another",)}
RECORDED = {"beside": ("teacher",), "written": ("data/manifest.json",), "costly": True}
MODELS = {"beside": ("student", "teacher"), "costly": True}
SETS = {"beside": ("pictures", "classes", "classifier"), "costly": True}
EVALUATED = {"beside": ("student", "teacher", "classifier"), "costly": True}
MODEL = {"named": ("{folder} holds a", f"{WEIGHTS} is damaged or of another model", "the weights in {folder} ")}
TEACHER, SHARDED, PICKLED = (
    {"named": (f"teacher {{case}}/{name}: ", f"teacher {{case}}/{name} "), "costly": True}
    for name in ("teacher", "sharded", "older")
)
# An index may name a part that is not there, or that lacks what it should hold.
INDEX = {**SHARDED, "named": (*SHARDED["named"], "the teacher's weights {folder}/")}
DENOISED, DENOISER = (read.denoised, read.denoised_meaning), ("{case}/denoiser: ",)
SHARDS = {"named": ("shard {folder}/shard-",)}
FIELDS = tuple(field.name for field in dataclasses.fields(RECIPES["joint"]))
TAUGHT, PARTS = (
    (read.taught("teacher"), read.taught_meaning("teacher")),
    (read.taught("sharded"), read.taught_meaning("sharded")),
)

KINDS = {
    "student's configuration": Kind("student/config.json", read.sampled, read.sampled_meaning, **MODEL),
    "student's weights": Kind(f"student/{WEIGHTS}", read.sampled, read.sampled_meaning, sealed=True),
    "student's weights without a digest": Kind(
        f"bare-student/{WEIGHTS}",
        partial(read.sampled, name="bare-student"),
        partial(read.sampled_meaning, name="bare-student"),
    ),
    "student's training record": Kind("student/training.json", read.recorded, read.recorded_meaning),
    "engine's configuration": Kind("fused/config.json", read.fused, read.fused_meaning, **MODEL),
    "engine's weights": Kind(f"fused/{WEIGHTS}", read.fused, read.fused_meaning, sealed=True),
    "engine's weights without a digest": Kind(
        f"bare-fused/{WEIGHTS}", partial(read.fused, name="bare-fused"), partial(read.fused_meaning, name="bare-fused")
    ),
    "pipeline's index": Kind("pipeline/model_index.json", read.piped, read.piped_meaning),
    "pipeline's configuration": Kind("pipeline/student/config.json", read.piped, read.piped_meaning, **MODEL),
    "pipeline's weights": Kind(f"pipeline/student/{WEIGHTS}", read.piped, read.piped_meaning, **MODEL),
    "record of samples": Kind(
        "samples/samples.json", read.sampled_on, beside=("student",), named=("{folder} holds pictures of another",)
    ),
    "teacher's index": Kind("teacher/model_index.json", *TAUGHT, **TEACHER),
    "teacher's configuration": Kind("teacher/unet/config.json", *TAUGHT, **TEACHER),
    "teacher's schedule": Kind("teacher/scheduler/scheduler_config.json", *TAUGHT, **TEACHER),
    "teacher's weights": Kind(f"teacher/unet/{WEIGHTS}", *TAUGHT, **TEACHER),
    "teacher's index of weights": Kind(f"sharded/unet/{WEIGHTS}.index.json", *PARTS, **INDEX),
    "teacher's part of the weights": Kind(f"sharded/unet/{PART}", *PARTS, **SHARDED),
    "teacher's pickled weights": Kind(OLDER, read.older, read.older_meaning, sealed=True, **PICKLED),
    "manifest, distilled": Kind("data/manifest.json", read.distilled, beside=("student",), costly=True, **SHARDS),
    "manifest, evaluated": Kind("data/manifest.json", read.evaluated_samples, **EVALUATED, **SHARDS),
    "manifest without a digest": Kind(
        "bare-data/manifest.json",
        partial(read.read_back, name="bare-data"),
        partial(read.read_back_meaning, name="bare-data"),
        **SHARDS,
    ),
    "manifest of a recording that goes on": Kind("data/manifest.json", read.recorded_on, **RECORDED),
    "shard, distilled": Kind(f"data/{SHARD}", read.distilled, beside=("student",), costly=True),
    "shard, read": Kind(f"data/{SHARD}", read.read_back),
    "shard of a recording that goes on": Kind(
        f"data/{SHARD}", read.recorded_on, named=("{folder} holds trajectories made with another",), **RECORDED
    ),
    "checkpoint of a distillation": Kind(f"run/{CHECKPOINT}", read.resumed, **RESUMED),
    "metrics of a distillation that goes on": Kind("run/metrics.csv", read.resumed, read.resumed_meaning, **RESUMED),
    "checkpoint of a teacher": Kind(
        f"training/{CHECKPOINT}",
        read.trained_on,
        beside=("pictures",),
        written=(f"training/{CHECKPOINT}",),
        costly=True,
        named=("differ from the unfinished run in {folder}",),
        expected=read.whole_training,
    ),
    "evaluation": Kind("tables/evaluation.json", read.reported(), read.page_meaning(), **MODELS),
    "table of an ablation": Kind("tables/ablation.json", read.reported("ablation"), read.page_meaning("ablation"), **MODELS),
    "metrics": Kind("tables/metrics.csv", read.reported("metrics"), read.metrics_meaning, **MODELS),
    "preset": Kind("tables/preset.json", read.told("preset", "preset.json"), read.preset_meaning, named=("not enough memory",)),
    # A field that cannot work is named alone: an option of the same name may have given it.
    "recipe in JSON": Kind(
        "tables/recipe.json", read.told("config", "recipe.json"), read.recipe_meaning("recipe.json"), named=FIELDS
    ),
    "recipe in TOML": Kind(
        "tables/recipe.toml", read.told("config", "recipe.toml"), read.recipe_meaning("recipe.toml"), named=FIELDS
    ),
    # Inception's own weights are not here: the sample is a whole file of a smaller network.
    "Inception's weights": Kind("tables/inception.pth", read.evaluated_by_inception, beside=("pictures",), readable=False),
    "classifier's configuration": Kind(
        "classifier/config.json", read.extracted, read.extracted_meaning, beside=("pictures",), **MODEL
    ),
    "classifier's training record": Kind(
        "classifier/training.json", read.extracted, read.extracted_meaning, beside=("pictures",)
    ),
    "classifier's weights": Kind(
        f"classifier/{WEIGHTS}", read.extracted, read.extracted_meaning, sealed=True, beside=("pictures",)
    ),
    "classifier's weights, evaluated": Kind(
        f"classifier/{WEIGHTS}", partial(evaluate_pictures, extractor="classifier"), has_other=False, **SETS
    ),
    "classifier's weights without a digest": Kind(
        f"bare-classifier/{WEIGHTS}",
        partial(read.extracted, name="bare-classifier"),
        partial(read.extracted_meaning, name="bare-classifier"),
        beside=("pictures",),
    ),
    "kept features": Kind("cache/features.safetensors", read.evaluated_from_kept, written=("cache",), **SETS),
    "kept plan": Kind("cache/plans/plan.json", read.planned, written=("cache",), beside=("student",)),
    **{
        f"picture {name}": Kind(f"picture-{name}/{name}", read.looked_at(name), read.looked_at_meaning(name))
        for name in FORMATS
    },
    "picture of a classifier's": Kind("classes/a/00.png", read.classes_read, has_other=False),
    "denoiser student's sampler": Kind("denoiser/sampler.json", *DENOISED, named=DENOISER),
    "denoiser student's training record": Kind("denoiser/training.json", *DENOISED),
    "denoiser student's classes": Kind("denoiser/classes.json", *DENOISED),
    "condition's configuration": Kind(
        "denoiser/condition/config.json", *DENOISED, named=(*MODEL["named"], *DENOISER, "{folder} is")
    ),
    "condition's weights": Kind(f"denoiser/condition/{WEIGHTS}", *DENOISED, sealed=True),
}
"""Every kind by its name."""
