"""Students that are told a class: how it joins the latent, what they take in turn, and everything that a student can do."""

import copy
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from advkd import AdvKDPipeline, FusedStudent, Student, StudentConfig
from advkd.errors import InputError
from advkd.export.pipeline import StudentModel
from advkd.models.batch_norm import CannotFoldError
from advkd.models.shape import PRESETS
from advkd.runtime.extension import extension_gap

from ..conftest import CLASSES, ROOT, TINY_STUDENT, conditional_student, tiny_student

CPU = pytest.mark.skipif(extension_gap("cpu") is not None, reason="the cpu extension is not built")
BACKENDS = ["reference", pytest.param("cpu", marks=CPU)]
LABELS = torch.tensor([2, 0, 0, 1, 2])


@pytest.fixture(scope="module", params=[False, True], ids=["blocks", "pyramid"])
def either(request):
    return conditional_student(detail_noise=request.param)


@pytest.fixture(scope="module")
def student():
    return conditional_student()


def test_the_glyphs_preset_takes_the_classes_of_a_run():
    preset = PRESETS["glyphs"]
    assert preset.classes == () and preset.detail_noise and (preset.image_size, preset.image_channels) == (32, 3)
    assert preset.channels == PRESETS["digits"].channels
    student = Student(replace(preset, classes=list("ABC")))
    assert student.class_names == student.config.classes == ("A", "B", "C") and student.num_classes == 3
    # Not of the class: 32x32x3 numbers of noise, all of the teacher's.
    assert student.latent_numel == 3072 and student.latent_parts[0] == (3, 4)
    assert student.embedding.weight.shape == (3, 8 * 16) and student.submodules[0].convolution1.in_channels == 3 + 8
    assert student.num_parameters() == sum(p.numel() for p in student.parameters())


def test_a_student_without_classes_is_what_it_was(tmp_path):
    """Its weights, the numbers drawn for them and its folders are those of a configuration without the two fields."""
    found = []
    for config in (TINY_STUDENT, replace(TINY_STUDENT, class_channels=3)):
        torch.manual_seed(0)
        found.append((Student(config), torch.rand(1)))
    (plain, after), (student, number) = found
    assert torch.equal(after, number) and student.num_classes == 0 and student.class_names == ()
    assert student.state_dict().keys() == plain.state_dict().keys() and not hasattr(student, "embedding")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in student.state_dict().items())
    for model in (plain, plain.eval().fuse(tune=False)):
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        earlier = {key: value for key, value in config.items() if key not in ("classes", "class_channels")}
        assert len(earlier) == len(config) - 2
        (tmp_path / "config.json").write_text(json.dumps(earlier))
        again = type(model).from_pretrained(tmp_path)
        assert again.config == model.config and torch.equal(again.sample(2), model.sample(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "abc"}, "classes must be names, texts that are not empty, got 'abc'"),
        ({"classes": ("a", "")}, "classes must be names"),
        ({"classes": ("a", 1)}, "classes must be names"),
        ({"classes": ("b", "a", "b")}, "classes must have names of their own, got 'b' twice"),
        ({"classes": tuple(map(str, range(2**16 + 1)))}, "classes must be at most 2.16 names, got 65537"),
        ({"class_channels": 0}, "class_channels must be 1 to 2.16, got 0"),
        ({"class_channels": 2**16 + 1}, "class_channels must be 1 to 2.16"),
        ({"class_channels": True}, "class_channels must be a whole number, got True"),
    ],
)
def test_impossible_classes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(TINY_STUDENT, **changes)


def by_hand(student, z, labels):
    """Flat latents ``[4x4 part | class | detail parts]``, number by number."""
    coarse = student.latent_parts[0][0] * 16
    rows = student.state_dict().get("embedding.weight", getattr(student, "embedding", None))
    return torch.stack([torch.cat((row[:coarse], rows[label], row[coarse:])) for row, label in zip(z, labels.tolist())])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_class_lies_behind_the_coarse_part_of_the_latent(either, backend):
    """The input of an engine, to the bit; and float64 images by the student's modules and by that layout."""
    fused, z = either.fuse(backend, tune=False), either.latents(5, seed=1)
    given = []
    run, fused.engine = fused.engine, lambda latents: given.append(latents) or run(latents)
    images = fused(z, LABELS)
    assert torch.equal(given[0], by_hand(fused, z, LABELS)) and torch.equal(fused.embedding, either.embedding.weight)
    wide = copy.deepcopy(either).double()
    wanted = wide(z.double(), labels=LABELS)
    exact = wide.fuse("reference", torch.float64)
    assert (exact.engine(by_hand(wide, z.double(), LABELS)) - wanted).abs().max() <= 1e-12
    assert (images - wanted).abs().max() <= 1e-4


def test_classes_make_the_image(either):
    z = either.latents(1, seed=1).expand(3, -1)
    images = either(z, labels=torch.arange(3))
    assert torch.pdist(images.flatten(1)).min() > 1e-2
    levels = either.levels(z, torch.arange(3))
    assert torch.equal(levels[-1], images) and torch.pdist(levels[0].flatten(1)).min() > 1e-2


TURNS = [
    (None, [0, 1, 2]),
    (1, [1]),
    ([2, 0], [2, 0]),
    (torch.tensor([1, 1, 2, 0]), [1, 1, 2, 0]),
    (np.array([2, 2, 1]), [2, 2, 1]),
]


@pytest.mark.parametrize("labels, turns", TURNS, ids=["all", "one", "two", "tensor", "array"])
def test_images_take_classes_in_turn_by_their_index(student, labels, turns):
    """Image i of a seed has class ``turns[i % len(turns)]``, whatever the batch and where a run starts."""
    fused = student.fuse(tune=False)
    told = torch.tensor([turns[i % len(turns)] for i in range(5, 12)])
    wanted = student(student.latents(7, seed=3, start=5), labels=told)
    for model in (student, fused):
        for batch_size in (64, 3):
            assert (model.sample(7, 3, batch_size, start=5, labels=labels) - wanted).abs().max() <= 1e-5
    parts = list(fused.draw([(9, 2), (5, 0), (6, 3)], seed=3, labels=labels))
    for first, part in zip((9, 5, 6), parts, strict=True):
        assert len(part) == 0 or (part - wanted[first - 5 :][: len(part)]).abs().max() <= 1e-5
    pictures = torch.cat(list(fused.stream(7, 3, 2, 5, torch.uint8, labels))).permute(0, 3, 1, 2)
    # Half a grey level of rounding, and the images' own error.
    assert (pictures / 127.5 - 1 - wanted).abs().max() <= 0.5 / 127.5 + 1e-4
    assert next(fused.stream(10**15, batch_size=2, labels=labels)).shape == (2, 3, 16, 16)


@CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_do_not_depend_on_the_batch(student, dtype):
    fused = student.fuse("cpu", dtype, tune=False)
    whole = fused.sample(11, seed=1)
    assert all(torch.equal(fused.sample(11, seed=1, batch_size=size), whole) for size in (1, 2, 4))
    assert torch.equal(fused.sample(4, seed=1, start=7, labels=[1, 2, 0]), fused.sample(11, seed=1, labels=[1, 2, 0])[7:])


def test_a_batch_that_does_not_fit_is_halved_with_its_classes(student, monkeypatch):
    fused = student.fuse("reference")
    wanted, run = fused.sample(7, seed=2, labels=[2, 1]), fused.engine

    def engine(z):
        if len(z) > 4:
            raise torch.OutOfMemoryError
        return run(z)

    monkeypatch.setattr(fused, "_make_engine", lambda kind: engine)
    fused.engine = engine
    with pytest.warns(UserWarning, match="out of memory with batches of 7 images: going on with 4"):
        found = fused.sample(7, seed=2, labels=[2, 1])
    # Convolutions of another batch size may add up in another order.
    assert (found - wanted).abs().max() <= 1e-5


def test_gradients_reach_the_classes_that_were_told(student):
    student = copy.deepcopy(student)
    for training in (True, False):
        student.train(training).zero_grad()
        student(student.latents(4), labels=torch.tensor([2, 0, 2, 2])).square().sum().backward()
        gradient = student.embedding.weight.grad
        assert (gradient[[0, 2]].abs().sum(1) > 0).all() and (gradient[1] == 0).all()


def test_orders_of_differentiability(student):
    """Any order in eval mode, one in training mode, in the noise and the embedding alike."""
    student = copy.deepcopy(student).double()
    z, labels = student.latents(2).double().requires_grad_(), torch.tensor([2, 0])

    def images(z, weight):
        return torch.func.functional_call(student, {"embedding.weight": weight}, (z,), {"labels": labels})[:, :, ::5, ::5]

    weight = student.embedding.weight.detach().clone().requires_grad_()
    options = {"fast_mode": True}
    assert torch.autograd.gradcheck(images, (z, weight), **options)
    assert torch.autograd.gradgradcheck(images, (z, weight), **options)
    student.train()
    assert torch.autograd.gradcheck(images, (z, weight), **options)
    with pytest.raises(
        RuntimeError, match="^norm_act is differentiable once: its gradients have no gradient; for that take plain PyTorch$"
    ):
        torch.autograd.grad(images(z, weight).square().sum(), weight, create_graph=True)[0].sum().backward()


def test_saving_and_loading(student, tmp_path):
    for model in (student, student.fuse(tune=False), student.fuse(dtype=torch.bfloat16, tune=False)):
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.config == model.config and again.class_names == CLASSES
        assert torch.equal(again.sample(4, seed=1), model.sample(4, seed=1))
    config = json.loads((tmp_path / "config.json").read_text())
    # The embedding of a student of bfloat16 stays as wide as its other weights.
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors")["embedding"].dtype == torch.float32
    for classes in ([], ["ant", "bee"], ["a", "b", "c", "d"]):
        (tmp_path / "config.json").write_text(json.dumps({**config, "classes": classes}))
        with pytest.raises(InputError, match="model.safetensors is damaged or of another model"):
            FusedStudent.from_pretrained(tmp_path)
    for classes, message in (("ant", "classes must be tuple"), ([1, 2, 3], "classes must be names")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "classes": classes}))
        with pytest.raises(InputError, match=f"config.json: {message}"):
            FusedStudent.from_pretrained(tmp_path)


def test_an_embedding_that_is_not_finite_is_refused(student, tmp_path):
    fused = student.fuse("reference")
    fused.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["embedding"][1, 3] = float("nan")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(InputError, match="embedding holds numbers that are not finite"):
        FusedStudent.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="^the embedding holds numbers that are not finite$"):
        copy.deepcopy(fused).load_state_dict(state)
    broken = copy.deepcopy(student)
    broken.embedding.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="^the embedding holds numbers that are not finite$"):
        broken.fuse("reference")


def test_copies_and_moves(student):
    fused, z = student.fuse(tune=False), student.latents(5)
    wanted = fused(z, LABELS)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(z, LABELS), wanted) and twin.class_names == CLASSES
    other = conditional_student(seed=1).fuse(tune=False)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(z, LABELS), wanted)
    with pytest.raises(InputError, match="choose another dtype by student.fuse"):
        copy.deepcopy(fused).half()
    state = copy.deepcopy(fused.state_dict())
    assert fused.to("meta")(z.to("meta"), LABELS.to("meta")).shape == wanted.shape
    with pytest.raises(InputError, match="labels must be on meta like z, got cpu"):
        fused(z.to("meta"), LABELS)
    with pytest.raises(InputError, match="z must be on meta like the weights, got cpu"):
        fused(z, LABELS)
    fused.load_state_dict(state, assign=True)
    assert torch.equal(fused(z, LABELS), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(student, dtype):
    """The student's own, and an engine's; latents of an engine may have any."""
    z, wanted = student.latents(5), student(student.latents(5), labels=LABELS)
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    narrow = copy.deepcopy(student).to(dtype)
    assert narrow(z.to(dtype), labels=LABELS).dtype == dtype
    assert (narrow(z.to(dtype), labels=LABELS) - wanted).abs().max() <= tolerance
    assert (student.fuse("reference", dtype)(z, LABELS) - wanted).abs().max() <= tolerance
    fused = student.fuse("reference")
    assert fused(z.to(dtype), LABELS).dtype == torch.float32
    assert (fused(z.to(dtype), LABELS) - wanted).abs().max() <= tolerance


REFUSED = [
    (None, r"^labels are missing: the student has classes \(ant, bee, cow\); give the number of one a latent$"),
    (torch.tensor([0, 1]), r"^labels must be an int64 tensor \(5,\), one class number a latent, got torch.int64 \(2,\)$"),
    (torch.zeros(5, 1, dtype=torch.int64), r"got torch.int64 \(5, 1\)$"),
    (torch.zeros(5), r"^labels must be an int64 tensor \(5,\), .* got torch.float32 \(5,\)$"),
    (torch.zeros(5, dtype=torch.int32), r"got torch.int32"),
    ([0, 1, 2, 0, 1], r"got \[0, 1, 2, 0, 1\]$"),
    (torch.tensor([0, 1, 2, 3, 0]), r"^labels must be in \[0, 3\), got 0 to 3$"),
    (torch.tensor([0, 1, -1, 2, 0]), r"^labels must be in \[0, 3\), got -1 to 2$"),
    (torch.zeros(5, dtype=torch.int64, device="meta"), "^labels must be on cpu like z, got meta$"),
]


@pytest.mark.parametrize("labels, message", REFUSED)
def test_labels_that_do_not_fit_are_refused(student, labels, message):
    for model in (student, student.fuse("reference")):
        with pytest.raises(InputError, match=message):
            model(model.latents(5), labels=labels)
    with pytest.raises(InputError, match=message):
        student.levels(student.latents(5), labels)


def test_labels_of_an_unconditional_student_are_refused():
    for model in (tiny_student().eval(), tiny_student().eval().fuse("reference")):
        for call in (
            lambda: model(model.latents(2), labels=torch.zeros(2, dtype=torch.int64)),
            lambda: model.sample(1, labels=0),
        ):
            with pytest.raises(InputError, match="^labels: the student is unconditional; leave them out$"):
                call()
    with pytest.raises(InputError, match="^labels: the student is unconditional"):
        tiny_student().eval().levels(torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64))


TRUTHS = [True, [0, True], np.array([True, False]), torch.tensor([True]), [torch.tensor(True)], [np.True_]]
"""Truth values of Python, numpy and torch, which an index would take for class 1."""


def test_classes_in_turn_that_do_not_exist_are_refused(student):
    """At the call: no image has been drawn yet."""
    fused = student.fuse("reference")
    wrong = [([], "labels must name a class, got an empty sequence"), (3, "labels must be at least 0 and below 3, got 3")]
    wrong += [([0, -1], "labels must be at least 0 and below 3, got -1"), ("ant", "labels must be a whole number, got 'ant'")]
    wrong += [(truth, "labels must be a whole number, got True") for truth in TRUTHS]
    wrong += [([0.5], "labels must be a whole number, got 0.5"), (torch.zeros(2), "labels must be a whole number, got 0.0")]
    for labels, message in wrong:
        for draw in (student.sample, fused.sample, fused.stream):
            with pytest.raises(InputError, match=f"^{message}"):
                draw(1, labels=labels)
        with pytest.raises(InputError, match=f"^{message}"):
            fused.draw([(0, 1)], labels=labels)


def test_latents_that_do_not_fit_are_named_without_the_class(student):
    """The error states the noise's own number, not the engine's."""
    labels = torch.zeros(2, dtype=torch.int64)
    for model in (student, student.fuse("reference")):
        with pytest.raises(InputError, match=r"z must have shape \(N, 768\), got \(2, 848\)"):
            model(torch.zeros(2, 768 + 5 * 16), labels=labels)
        assert model(torch.zeros(0, 768), labels=labels[:0]).shape == (0, 3, 16, 16)


def hooked(student):
    student.embedding.register_forward_hook(lambda module, arguments, output: -output)


def renormed(student):
    student.embedding = torch.nn.Embedding(3, 80, max_norm=0.5)


def replaced(student):
    student.embedding = torch.nn.Sequential(student.embedding, torch.nn.Tanh())


def of_another_shape(student):
    student.embedding = torch.nn.Embedding(4, 80)


@pytest.mark.parametrize("change", [hooked, renormed, replaced, of_another_shape])
def test_an_embedding_with_code_of_its_own_is_not_fused(student, change):
    changed = copy.deepcopy(student)
    change(changed)
    with pytest.raises(CannotFoldError, match="embedding"):
        changed.fuse("reference")
    # The pipeline draws with the student's own modules instead.
    pipe, noise = AdvKDPipeline(changed), torch.Generator()
    with pytest.warns(UserWarning, match="the pipeline draws with the student's own modules"):
        images = pipe(class_labels=[0, 2], generator=noise.manual_seed(1), output_type="pt").images
    plain = AdvKDPipeline(student)(class_labels=[0, 2], generator=noise.manual_seed(1), output_type="pt").images
    assert not torch.equal(images, plain)


def test_a_parametrized_embedding_is_fused(student):
    changed = copy.deepcopy(student)

    class Halved(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(changed.embedding, "weight", Halved())
    z = student.latents(5)
    assert (changed.fuse("reference")(z, LABELS) - changed(z, labels=LABELS)).abs().max() <= 1e-5
    assert not torch.equal(changed(z, labels=LABELS), student(z, labels=LABELS))


@pytest.fixture
def drawn(student):
    """A function that draws a pipeline's images of one seed."""

    def draw(pipe, *arguments, **options):
        return pipe(*arguments, generator=torch.Generator().manual_seed(3), output_type="pt", **options).images

    return draw


def test_a_pipeline_takes_numbers_and_names(student, drawn):
    pipe = AdvKDPipeline(student)
    wanted = drawn(pipe, class_labels=[1, 0, 1])
    assert wanted.shape == (3, 3, 16, 16)
    arrays = torch.tensor([1, 0, 1]), np.array([1, 0, 1]), np.array(["bee", "ant", "bee"]), list(np.array([1, 0, 1], np.uint8))
    for labels in (["bee", "ant", "bee"], ["bee", 0, 1], (1, "ant", 1), *arrays):
        assert torch.equal(drawn(pipe, class_labels=labels), wanted) and torch.equal(
            drawn(pipe, 3, class_labels=labels), wanted
        )
    assert torch.equal(drawn(pipe, 3, class_labels="cow"), drawn(pipe, class_labels=[2, 2, 2]))
    for one in (2, np.int64(2), np.array(2), torch.tensor(2), np.str_("cow")):
        assert torch.equal(drawn(pipe, 3, class_labels=one), drawn(pipe, class_labels=[2, 2, 2]))
    assert torch.equal(drawn(pipe, 4), drawn(pipe, class_labels=[0, 1, 2, 0]))
    assert len(drawn(pipe)) == len(drawn(pipe, class_labels="ant")) == 1
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    images = pipe(class_labels=[2, 0], generator=generators, output_type="pt").images
    alone = pipe(class_labels=[0], generator=[torch.Generator().manual_seed(8)], output_type="pt").images
    assert (images[1] - alone[0]).abs().max() <= 1e-6


def test_a_pipeline_refuses_other_classes(student, drawn):
    pipe = AdvKDPipeline(student)
    for labels, message in (
        ("dog", "class_labels: 'dog' is not one of ant, bee, cow$"),
        (["ant", "Ant"], "class_labels: 'Ant' is not one of"),
        ([0, 3], "class_labels must be at least 0 and below 3, got 3"),
        ([], "class_labels must name a class, got an empty sequence"),
        (0.5, "class_labels must be a whole number, got 0.5"),
        (np.array([[0, 1]]), r"class_labels must be a whole number, got \[0, 1\]"),
        *((truth, "class_labels must be a whole number, got True") for truth in TRUTHS),
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            pipe(class_labels=labels)
    with pytest.raises(InputError, match="^class_labels: 2 classes came for batch_size 3$"):
        pipe(3, class_labels=[0, 1])
    for labels in (0, "ant", ["ant"]):
        with pytest.raises(InputError, match="^class_labels: the student is unconditional; leave them out$"):
            AdvKDPipeline(tiny_student().eval())(class_labels=labels)


def test_a_pipelines_folder(student, drawn, tmp_path):
    pipe = AdvKDPipeline(student)
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "tags: [class-conditional-image-generation]" in card and "unconditional" not in card
    assert "one of 3 classes: ant, bee, cow" in card and "(class_labels=['ant'] * 4)" in card
    again = AdvKDPipeline.from_pretrained(tmp_path)
    assert again.student.class_names == CLASSES
    assert torch.equal(drawn(again, class_labels=["cow", "ant"]), drawn(pipe, class_labels=["cow", "ant"]))
    assert Student.from_pretrained(tmp_path).config == student.config
    model, z = StudentModel.from_pretrained(tmp_path / "student"), student.latents(5)
    assert torch.equal(model(z, LABELS), student(z, labels=LABELS))
    with pytest.raises(InputError, match="labels are missing"):
        model(z)
    AdvKDPipeline(tiny_student().eval()).save_pretrained(tmp_path / "plain")
    assert "pipeline_tag: unconditional-image-generation" in (tmp_path / "plain" / "README.md").read_text()


def test_a_pipeline_sees_a_new_embedding(student, drawn):
    pipe = AdvKDPipeline(copy.deepcopy(student))
    before = drawn(pipe, class_labels=[0, 1])
    pipe.student.student.embedding.weight.data[1] += 1
    after = drawn(pipe, class_labels=[0, 1])
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_a_folder_of_before_has_no_classes():
    earlier = ROOT / "tests" / "data" / "earlier"
    assert "classes" not in json.loads((earlier / "student" / "config.json").read_text())
    assert Student.from_pretrained(earlier / "student").class_names == ()
    assert FusedStudent.from_pretrained(earlier / "engine", backend="reference").num_classes == 0


def exported(model, z):
    """A program of a model for one to 64 latents with their classes, through a file."""
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"z": {0: batch}, "labels": {0: batch}}
    labels = torch.zeros(len(z), dtype=torch.int64)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (z,), {"labels": labels}, dynamic_shapes=shapes), file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("backend", [None, "reference", pytest.param("cpu", marks=CPU)])
def test_a_student_with_classes_is_exported_for_every_batch_size(student, backend):
    model = student if backend is None else student.fuse(backend, tune=False)
    program = exported(model, model.latents(4))
    for count in (1, 5):
        z, labels = model.latents(count, seed=2), LABELS[:count]
        assert (program(z, labels=labels) - model(z, labels=labels)).abs().max() <= 1e-5


def test_a_traced_student_takes_every_batch_size(student):
    traced = torch.jit.trace(
        student, example_kwarg_inputs={"z": student.latents(4), "labels": torch.zeros(4, dtype=torch.int64)}
    )
    z = student.latents(5, seed=2)
    assert (traced(z=z, labels=LABELS) - student(z, labels=LABELS)).abs().max() <= 1e-5


@pytest.mark.kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_student_with_classes_is_compiled(training):
    torch._dynamo.reset()
    student = conditional_student().train(training)
    right = copy.deepcopy(student)
    compiled = torch.compile(student, dynamic=True, fullgraph=True, backend="aot_eager")
    for count in (4, 5):
        z = right.latents(count, seed=2)
        assert (compiled(z, labels=LABELS[:count]) - right(z, labels=LABELS[:count])).abs().max() <= 1e-5


def test_the_configuration_is_positional_as_before():
    config = StudentConfig(16, 1, (4,) * 6, 1, True, 0.1)
    assert config.slope == 0.1 and config.classes == () and config.class_channels == 8
