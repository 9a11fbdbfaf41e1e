"""Arguments that an op cannot take are refused by name, and so is every derivative that it lacks, however it is requested."""

import fractions

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode

from advkd import Student, ops
from advkd.errors import InputError
from advkd.models.shape import StudentConfig
from advkd.ops import registry
from advkd.ops.mask_mul import pack

X, OTHER = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
MASK, WEIGHT, BIAS = pack(OTHER.flatten(1) > 0), torch.randn(5, 3, 3, 3), torch.randn(5)
STEP = ops.StepCoefficients(1.0, -0.5, 0.5, c_x=0.25)
CALLS = {
    "mask_mul": {"x": X, "mask": MASK, "slope": 0.2, "backend": "auto"},
    "conv_bias_act_mask": {"x": X, "weight": WEIGHT, "bias": BIAS, "padding": 1, "slope": 0.2, "groups": 1, "backend": "auto"},
    "conv_block": {"x": X, "weight": WEIGHT, "bias": BIAS, "slope": 0.2, "upsample": True, "backend": "auto"},
    "interpolate": {"real": X, "fake": OTHER, "a": torch.rand(2), "merge": False, "backend": "auto"},
    "penalty_reduce": {"g": X, "target": 1.0, "weight": 10.0, "mode": "r1", "backend": "auto"},
    "norm_act": {
        "x": X,
        "gamma": X[0, :, 0, 0],
        "beta": X[1, :, 0, 0],
        "running_mean": None,
        "running_var": None,
        "slope": 0.2,
    },
    "image_gradient": {"d": X, "weight": torch.randn(3, 2, 3, 3), "shape": (2, 2, 4, 4), "padding": 1, "backend": "auto"},
    "sampler_step": {"x": X, "model_output": OTHER, "coefficients": STEP, "return_x0": True, "backend": "auto"},
    "philox_words": {"seed": 1, "indices": range(3), "count": 5, "stream": "z", "step": 0, "backend": "auto"},
    "philox_normal": {"seed": 1, "indices": range(3), "shape": (2, 2), "stream": "z", "step": 0, "backend": "auto"},
}
OPTIONAL = ("bias", "running_mean", "running_var")
NO_TENSORS = {
    "number": lambda t: 3,
    "text": lambda t: "text",
    "array": lambda t: t.numpy(),
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "none": lambda t: None,
}


def call(op, **changes):
    return getattr(ops, op)(**{**CALLS[op], **changes})


def differentiable(op):
    return [name for name, value in CALLS[op].items() if isinstance(value, torch.Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("op", CALLS)
def test_arguments_that_are_no_dense_tensors_are_refused_by_name(op):
    for name, value in CALLS[op].items():
        if not isinstance(value, torch.Tensor):
            continue
        for kind, change in NO_TENSORS.items():
            if kind == "none" and name in OPTIONAL:
                continue
            with pytest.raises(InputError, match=rf"\b{name}\b"):
                call(op, **{name: change(value)})


@pytest.mark.parametrize("op", CALLS)
def test_arguments_that_are_no_numbers_flags_or_backends_are_refused_by_name(op):
    bad = [None, "text", b"0.2", [], object(), 1j, torch.zeros(2), torch.tensor(0.5, device="meta")]
    for name, value in CALLS[op].items():
        if isinstance(value, torch.Tensor) or name in OPTIONAL or name == "coefficients":
            continue
        for other in bad:
            if name == "shape" and other == []:
                continue
            with pytest.raises(InputError, match=rf"\b{name}\b"):
                call(op, **{name: other})


@pytest.mark.parametrize("op", ["mask_mul", "conv_bias_act_mask", "conv_block", "norm_act"])
def test_slopes_are_finite_numbers_of_any_type(op):
    for value in (float("nan"), float("inf"), 1e300, 10**400):
        with pytest.raises(InputError, match="slope"):
            call(op, slope=value)
    found, wanted = call(op, slope=fractions.Fraction(1, 4)), call(op, slope=0.25)
    assert torch.equal(*(r if isinstance(r, torch.Tensor) else r[0] for r in (found, wanted)))


@pytest.mark.parametrize("op", ["conv_bias_act_mask", "image_gradient"])
@pytest.mark.parametrize("option", ["stride", "padding", "dilation"])
def test_windows_that_do_not_fit_are_refused(op, option):
    for value in (-1, 1.5, (1, 2, 3), None, "11", 2**40):
        with pytest.raises(InputError, match=option):
            call(op, **{option: value})
    with pytest.raises(InputError, match="does not fit into"):
        call(op, dilation=9)


@pytest.mark.parametrize("option", ["stride", "padding", "dilation"])
def test_windows_of_one_number_in_a_list(option):
    options = {"padding": 1, "stride": 1, "dilation": 1}
    found = call("conv_bias_act_mask", **{**options, option: [2]})
    wanted = call("conv_bias_act_mask", **{**options, option: 2})
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("value", [np.True_, np.array(True), torch.tensor(True), torch.tensor([1]), 1])
def test_flags_of_other_libraries(value):
    assert torch.equal(call("interpolate", merge=value), call("interpolate", merge=True))
    assert call("interpolate", merge=np.False_).shape == X.shape


def test_flags_within_compiled_code():
    def both(x, merge):
        return ops.interpolate(x, OTHER, CALLS["interpolate"]["a"], merge=merge)

    compiled = torch.compile(both, backend="eager")
    for merge in (True, False, torch.tensor(True)):
        assert torch.equal(compiled(X, merge), both(X, merge))


@pytest.mark.parametrize("value", [bytearray(b"0.5"), memoryview(b"0.5"), np.array("0.5"), np.str_("0.5"), np.bytes_(b"0.5")])
def test_text_is_no_number(value):
    with pytest.raises(InputError, match="slope must be a number"):
        call("mask_mul", slope=value)


def test_dilation_of_one_pixel_has_no_meaning():
    x, weight = (
        t.half().contiguous(memory_format=torch.channels_last) for t in (torch.randn(1, 6, 7, 1), torch.randn(2, 6, 3, 1))
    )
    found, wanted = (ops.conv_bias_act_mask(x, weight, stride=2, padding=1, dilation=(1, q)) for q in (2, 1))
    assert all(map(torch.equal, found, wanted))


def test_strides_of_one_pixel_have_no_meaning():
    """Such strides make torch's own grouped convolutions read wrong numbers."""
    torch.manual_seed(0)
    weight = torch.randn(4, 2, 4, 1)
    odd = torch.empty_strided(weight.shape, (8, 1, 2, 32)).copy_(weight)
    x, d = (torch.randn(4, 4, side, n).contiguous(memory_format=torch.channels_last) for side, n in ((2, 4), (1, 6)))
    found, wanted = (ops.conv_bias_act_mask(x, w, padding=1, groups=2) for w in (odd, weight))
    assert torch.allclose(found[0], wanted[0], atol=1e-5) and torch.equal(found[1], wanted[1])
    found, wanted = (ops.image_gradient(d, w, (4, 4, 2, 4), padding=1, groups=2) for w in (odd, weight))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_wrong_size_is_found_before_anything_is_copied():
    """2^31 samples expanded from the memory of one."""
    many = torch.zeros(1).expand(2**31 + 5, 3, 4, 4)
    for op, name in (("mask_mul", "x"), ("interpolate", "real"), ("interpolate", "fake"), ("sampler_step", "model_output")):
        with pytest.raises(InputError):
            call(op, **{name: many})


def test_counts_end_where_the_counter_does():
    with pytest.raises(InputError, match="count"):
        call("philox_words", count=2**34 + 1)
    for indices in (range(0), torch.arange(1, device="meta")):
        with pytest.raises(InputError, match="shape"):
            call("philox_normal", indices=indices, shape=(2**33, 4))
        assert call("philox_normal", indices=indices[:0], shape=(2**34,)).shape == (0, 2**34)


def test_ranges_of_indices():
    for indices in (range(2**63 - 1, 2**63), range(2**64), range(2**62), range(-(2**63) - 1, 0), range(0, -(2**64), -(2**63))):
        with pytest.raises(InputError, match="indices"):
            call("philox_words", indices=indices)
    for indices in (
        range(2**63 - 2, 2**63 - 1),
        range(-(2**63), -(2**63) + 1),
        range(9, 0, -4),
        range(2**64, 5),
        range(0, 9, 2**62),
    ):
        wanted = torch.tensor(list(indices), dtype=torch.int64)
        assert torch.equal(call("philox_words", indices=indices), call("philox_words", indices=wanted))


@pytest.mark.parametrize("step", ["sparse", "nested"])
def test_steps_of_noise_are_dense(step):
    with pytest.raises(InputError, match="noise's step"):
        call("sampler_step", noise=(1, range(2), NO_TENSORS[step](torch.tensor([1, 2]))))
    with pytest.raises(InputError, match="step"):
        call("philox_words", step=NO_TENSORS[step](torch.tensor([1])))


def test_errors_of_a_triple_name_the_argument():
    with pytest.raises(InputError, match="^noise: seed"):
        call("sampler_step", noise=(-1, range(2), 0))
    with pytest.raises(InputError, match="^a: indices"):
        call("interpolate", a=(1, None, 0))


@pytest.mark.parametrize("op", [op for op in CALLS if not op.startswith("philox")])
def test_derivatives_are_refused_in_every_mode(op):
    """Inside an op torch.func's tensors are plain ones: a derivative would silently be zero, or the convolution's alone."""

    def total(value):
        results = call(op, **{name: value})
        results = results if isinstance(results, tuple) else (results,)
        return sum(t.square().sum() for t in results if t is not None and t.is_floating_point())

    for name in differentiable(op):
        value = CALLS[op][name].clone()
        refused = pytest.raises(RuntimeError, match="has no gradient|autograd.Function with functorch")
        for transform in (torch.func.grad, torch.func.jacfwd, lambda f: lambda v: torch.func.jvp(f, (v,), (v,))):
            with refused:
                transform(total)(value)
        for context in (torch.no_grad, torch.enable_grad):
            with refused, context(), forward_ad.dual_level():
                call(op, **{name: forward_ad.make_dual(value, value)})


NESTS = {
    "jvp of grad": lambda f, x, other: torch.func.jvp(lambda v: torch.func.grad(lambda y: f(v, y))(other).sum(), (x,), (x,)),
    "jvp of vmap of grad": lambda f, x, other: torch.func.jvp(
        lambda v: torch.vmap(torch.func.grad(lambda y: f(v, y)))(other[None]).sum(), (x,), (x,)
    ),
    "jvp of vmap": lambda f, x, other: torch.func.jvp(lambda v: torch.vmap(lambda w: f(w, other))(v[None]).sum(), (x,), (x,)),
    "jvp of jvp": lambda f, x, other: torch.func.jvp(
        lambda v: torch.func.jvp(lambda y: f(v, y), (other,), (other,))[1], (x,), (x,)
    ),
    "grad of grad": lambda f, x, other: torch.func.grad(lambda v: torch.func.grad(lambda y: f(v, y))(other).sum())(x),
    "grad of jvp": lambda f, x, other: torch.func.grad(
        lambda v: torch.func.jvp(lambda y: f(v, y), (other,), (other,))[1].sum()
    )(x),
}


@pytest.mark.parametrize("op", [op for op in CALLS if not op.startswith("philox")])
@pytest.mark.parametrize("nest", NESTS)
def test_derivatives_are_refused_through_nested_transforms(op, nest):
    """The derivative belongs to an outer transform; in the innermost one the tensor looks like a constant."""
    for name in differentiable(op):
        value, other = CALLS[op][name].clone(), torch.ones(())

        def product(tensor, factor):
            results = call(op, **{name: tensor})
            return (results[0] if isinstance(results, tuple) else results).sum() * factor

        with pytest.raises(RuntimeError, match="has no gradient|autograd.Function with functorch"):
            NESTS[nest](product, value, other)


@pytest.mark.parametrize("inner", [torch.func.grad, lambda f: lambda y: torch.func.jvp(f, (y,), (y,))[1]])
def test_constants_within_nested_transforms_are_taken(inner):
    def total(v):
        constant = torch.zeros_like(v) + v.new_ones(v.shape)
        return v.sum() * inner(lambda y: (call("mask_mul", x=constant) * y).sum())(torch.ones(()))

    assert torch.func.jvp(total, (X,), (X,))[1] != 0


@pytest.mark.parametrize("op", ["mask_mul", "penalty_reduce", "norm_act", "conv_block", "conv_bias_act_mask"])
def test_numbers_that_require_a_gradient_are_refused(op):
    """The op takes a float: a derivative would silently be zero, or missing."""
    numbers = {name: value for name, value in CALLS[op].items() if isinstance(value, float)}
    numbers |= {"eps": 1e-5, "momentum": 0.1} if op == "norm_act" else {}
    for name, number in numbers.items():
        value = torch.tensor(number, requires_grad=True)
        refused = pytest.raises(InputError, match=rf"{name}.*no gradient flows through it")
        with refused:
            call(op, **{name: value})
        for transform in (torch.func.grad, torch.func.jacfwd):
            with refused:
                transform(lambda v: call(op, **{name: v}))(value.detach())
        with torch.no_grad():
            call(op, **{name: value})


def test_coefficients_are_kept_as_floats_and_carry_no_derivative():
    step = ops.StepCoefficients(fractions.Fraction(1, 2), np.float32(-0.5), torch.tensor(0.5))
    assert step == ops.StepCoefficients(0.5, -0.5, 0.5)
    assert all(type(value) is float for value in vars(step).values())
    value = torch.tensor(0.5)
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(InputError, match="k_m"):
            transform(lambda v: call("sampler_step", coefficients=ops.StepCoefficients(1.0, v, 0.5))[0].sum())(value)
    with pytest.raises(InputError, match="k_m"):
        ops.StepCoefficients(1.0, value.clone().requires_grad_(), 0.5)


def test_results_share_no_memory_with_what_is_read_in_another_order():
    memory = torch.zeros(64, dtype=torch.uint8)
    x, out = torch.randn(2, 8), memory.view(torch.float32).view(2, 8)
    with pytest.raises(InputError, match="out.*mask"):
        ops.mask_mul(x, memory[:2].view(2, 1), 0.2, out=out)
    table = ops.coefficient_table([STEP] * 2)
    with pytest.raises(InputError, match="coefficients must be a dense tensor"):
        ops.sampler_step(x, x, table.to_sparse(), out=torch.empty(2, 8))
    with pytest.raises(InputError, match="out.*coefficients"):
        ops.sampler_step(x, x, table, out=table)
    indices = memory.view(torch.int64)
    for noise in ((1, indices[:2], 0), (1, range(2), indices[2:3])):
        with pytest.raises(InputError, match="out.*noise"):
            ops.sampler_step(x, x, STEP, noise=noise, out=out)
    images, average = torch.randn(2, 2, 4, 4), memory.view(torch.float32).view(2, 2, 2, 2)
    with pytest.raises(InputError, match="out.*noise"):
        ops.sampler_step(images, images, STEP, pool=2, noise=(1, indices[:2], 0), out=(None, average))


def test_running_statistics_share_no_memory_and_need_no_gradient():
    given = {"gamma": torch.rand(3), "beta": torch.rand(3), "running_mean": torch.rand(3), "running_var": torch.rand(3)}
    for name in ("running_mean", "running_var"):
        others = [given[other] for other in given if other != name]
        for shared in (*others, X.view(-1)[:3]):
            with pytest.raises(InputError, match="running.*overlaps"):
                call("norm_act", **{**given, name: shared})
        for training in (True, False):
            with pytest.raises(InputError, match=f"{name}.*gradient"):
                call("norm_act", **{**given, name: torch.rand(3, requires_grad=True)}, training=training)
    call("norm_act", **{**given, "running_var": given["running_mean"]}, training=False)
    meta = {name: tensor.to("meta") for name, tensor in given.items()}
    assert call("norm_act", x=X.to("meta"), **meta).is_meta


def test_the_variance_is_not_made_smaller():
    with pytest.raises(InputError, match="eps"):
        call("norm_act", eps=-1e-5)


@pytest.mark.parametrize("op", ["mask_mul", "penalty_reduce", "sampler_step"])
def test_results_are_not_written_through_negated_views_nor_into_inference_tensors(op):
    for out in (torch._neg_view(torch.zeros_like(X)), inference(torch.zeros_like(X))):
        with pytest.raises(InputError, match="out"):
            call(op, out=out)
    with torch.inference_mode():
        call(op, out=torch.zeros_like(X))


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty_planes_are_up_sampled(shape):
    x, ones = torch.zeros(shape, requires_grad=True), torch.ones(3, requires_grad=True)
    y = ops.norm_act(x, ones, ones, torch.zeros(3), torch.ones(3), training=False, upsample=True)
    assert y.shape == (*shape[:2], 2 * shape[2], 2 * shape[3])
    y.sum().backward()
    assert x.grad.shape == shape and not ones.grad.any()


def test_autocast_changes_no_dtype():
    config = StudentConfig(16, 2, channels=(8, 4, 8, 8, 16, 4), latent_size=1, detail_noise=True)
    student = Student(config).eval()
    for dtype in (torch.float32, torch.float64):
        fused = student.fuse("reference", dtype)
        wanted = fused(fused.latents(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fused(fused.latents(2)), wanted)
    wide = {name: CALLS["norm_act"][name].double() for name in ("x", "gamma", "beta")}
    x_T = torch.randn(2, 3, 16, 16)
    for function in (lambda: call("norm_act", **wide), lambda: call("conv_block"), lambda: student.project(x_T)):
        wanted = function()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(function(), wanted)


def test_steps_of_tensors_without_memory():
    call("sampler_step")
    meta = {name: CALLS["sampler_step"][name].to("meta") for name in ("x", "model_output")}
    assert call("sampler_step", **meta, check_finite=True)[0].shape == X.shape
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(CALLS["sampler_step"][name]) for name in ("x", "model_output")}
        assert call("sampler_step", **fake, check_finite=True)[0].shape == X.shape
        steps = mode.from_tensor(torch.zeros(1, dtype=torch.int64))
        assert call("sampler_step", **fake, noise=(1, range(2), steps))[0].shape == X.shape
        tensors = {name: mode.from_tensor(CALLS["conv_block"][name]) for name in ("x", "weight", "bias")}
        assert call("conv_block", **tensors).shape == (2, 5, 8, 8)
        out, mask = mode.from_tensor(OTHER), mode.from_tensor(MASK)
        assert call("mask_mul", x=fake["x"], mask=mask, out=out) is out
    assert call("conv_block", **{name: CALLS["conv_block"][name].to("meta") for name in ("x", "weight", "bias")}).is_meta


@pytest.mark.parametrize("pool", [0, -1, 3, 1.5, "2", torch.zeros(2)])
def test_windows_of_an_average_divide_the_sides(pool):
    with pytest.raises(InputError, match="pool"):
        call("sampler_step", pool=pool)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 1), (2, 1, 5, 3), (1, 3, 1, 1)])
def test_strides_of_axes_with_one_element_are_any_number(backend, shape):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    odd = x.as_strided(shape, [2**40 if side == 1 else stride for side, stride in zip(shape, x.stride())])
    wanted = call("sampler_step", x=x, model_output=x, backend=backend)[:2]
    assert all(map(torch.equal, call("sampler_step", x=odd, model_output=x, backend=backend), wanted))


def test_coefficients_are_numbers_and_steps():
    with pytest.raises(InputError, match="k_m"):
        ops.StepCoefficients(1.0, "text", 0.5)
    assert torch.equal(ops.coefficient_table(iter([STEP, STEP])), ops.coefficient_table([STEP, STEP]))
    for steps in (None, 3, [STEP, 1.0]):
        with pytest.raises(InputError, match="steps"):
            ops.coefficient_table(steps)
    with pytest.raises(InputError, match="coefficients"):
        call("sampler_step", x=X[:0], model_output=OTHER[:0], coefficients=object())


def test_random_numbers_are_part_of_a_graph():
    def draw(indices):
        return ops.philox_normal(3, indices, (5,), stream="z")

    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.arange(3)), draw(torch.arange(3)))


def test_a_backend_that_is_no_name_is_refused():
    for backend in (None, 3, [], {}, "gpu"):
        with pytest.raises(InputError, match="backend"):
            registry.choose("mask_mul", backend, torch.device("cpu"))
