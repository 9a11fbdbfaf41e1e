"""The gradient penalty's tangent pass against autograd's double backward, formulas written out and finite differences."""

import fractions
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.optim.swa_utils import AveragedModel

from advkd.errors import BackendUnavailableError, InputError
from advkd.models.critic import Critic, CriticConfig
from advkd.ops import gradient_penalty, norm_act, registry
from advkd.ops.critic.update import critic_gradients

from ..conftest import DEFAULTS, other_default
from .random_critics import Twice, critics, relative

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ENGINES = [b for b in ("cpu", "reference") if registry.gap("gradient_penalty", b, torch.device("cpu")) is None]
MODES = [{"mode": "two-sided"}, {"mode": "one-sided", "target": 0.01}, {"mode": "r1"}]


def critic(condition_channels=0, size=8, dtype=torch.float64, channels=4):
    torch.manual_seed(0)
    config = CriticConfig(size, 1, channels=channels, max_channels=2 * channels, condition_channels=condition_channels)
    return Critic(config).to(dtype)


def points(n=3, size=8, dtype=torch.float64):
    return torch.randn(n, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model, x, backend, **options):
    """The penalty, and its gradients with respect to the trainable parameters."""
    penalty = gradient_penalty(model, x, backend=backend, **options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return penalty.detach(), torch.autograd.grad(penalty, parameters, allow_unused=True)


def assert_same(model, x, bound, backend="auto", **options):
    ours, theirs = (gradients(model, x, name, **options) for name in (backend, "autograd"))
    assert abs(float(ours[0] - theirs[0])) <= bound * abs(float(theirs[0])) + 1e-30
    assert relative(ours[1], theirs[1]) <= bound


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(critics())
def test_random_critics(drawn):
    model, image, conditional = drawn
    x = torch.randn(3, *image, dtype=torch.float64)
    condition = torch.randn(3, 4, dtype=torch.float64) if conditional else None
    for options in MODES:
        assert_same(model, x, 1e-12, condition=condition, **options)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_same(model.to(memory_format=torch.channels_last), last, 1e-12, condition=condition)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(critics())
def test_random_critics_in_float32(drawn):
    model, image, conditional = drawn
    x, condition = torch.randn(3, *image), torch.randn(3, 4) if conditional else None
    for backend in ENGINES:
        assert_same(model.float(), x, 1e-5, backend, condition=condition, target=0.3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", MODES, ids=lambda o: o["mode"])
@pytest.mark.parametrize("conditional", [False, True])
def test_the_critic(device, options, conditional):
    condition = torch.randn(5, 2, 4, 4, dtype=torch.float64) if conditional else None
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = critic(2 if conditional else 0, 32, dtype, 16).to(device)
        condition = None if condition is None else condition.to(device, dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = points(5, 32, dtype).to(device).repeat(1, 1, 1, 1).contiguous(memory_format=layout)
            assert_same(model, x, bound, condition=condition, **options)
        strided = points(10, 32, dtype).to(device)[::2].transpose(2, 3)
        assert_same(model, strided, bound, condition=condition, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_on_a_gpu(backend):
    if reason := registry.gap("gradient_penalty", backend, torch.device("cuda")):
        pytest.skip(reason)
    model = critic(size=64, dtype=torch.float32, channels=32).cuda()
    assert_same(model, points(16, 64, torch.float32).cuda(), 1e-5, backend)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_exact_as_autograd(backend, autocast):
    model, x = critic(size=32, channels=16), points(16, 32)
    exact = gradients(model, x, "autograd")[1]
    model, x = (model.float(), x.float()) if autocast else (model.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (gradients(model, x, name)[1] for name in (backend, "autograd"))
    assert all(a.dtype == p.dtype for a, p in zip(ours, model.parameters()))
    # Biases have no gradient in the exact result; autograd's narrow one has none either.
    assert relative(ours, exact) <= 2 * relative(theirs, exact)


def test_value_of_a_linear_critic():
    w = torch.full((64,), 0.5, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w, points(), weight=10.0, backend="autograd")
    assert abs(penalty.item() - 10 * (w.norm().item() - 1) ** 2) < 1e-12
    (gradient,) = torch.autograd.grad(penalty, w)
    assert torch.allclose(gradient, 20 * (w.norm() - 1) * w / w.norm())
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()
    with torch.no_grad():
        model[1].weight.copy_(w)
    found, ours = gradients(model, points(), "auto")
    assert abs(found - penalty.item()) < 1e-12 and torch.allclose(ours[0][0], gradient) and not ours[1].any()


def test_r1_and_one_sided_values():
    w = torch.full((64,), 0.5, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()
    with torch.no_grad():
        model[1].weight.copy_(w)
    norm = w.norm().item()
    values = {"r1": 1.5 * norm**2, "one-sided": 3 * (norm - 1) ** 2, "two-sided": 3 * (norm - 1) ** 2}
    for mode, value in values.items():
        assert abs(gradient_penalty(model, points(), weight=3.0, mode=mode).item() - value) < 1e-12
    assert gradient_penalty(model, points(), mode="one-sided", target=norm + 1).item() == 0.0


class Written(nn.Module):
    """A critic whose forward is a function of (module, image, condition)."""

    def __init__(self, forward):
        super().__init__()
        self.written = forward
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.wide, self.each, self.last = nn.Linear(6, 256), nn.Linear(6, 4), nn.Linear(256, 1)

    def forward(self, x, condition=None):
        return self.last(self.written(self, x, condition).flatten(1))


def act(x):
    return F.leaky_relu(x, 0.2)


def grow(x):
    x += 0.5 * x
    return x


def both(function, x):
    return function(x, x)


COMPOSITIONS = {
    # A tangent that passes a sum as it is, and has another reader.
    "condition added": lambda m, x, c: both(lambda h, g: act(h + m.wide(c).view(-1, 4, 8, 8)) + m.b(g), act(m.a(x))),
    "condition added to the image": lambda m, x, c: both(lambda h, g: act(m.a(h)) + m.a(g), F.relu(x + c[:, :1, None, None])),
    "condition per channel": lambda m, x, c: m.b(act(m.a(x) + m.each(c).unsqueeze(-1).unsqueeze(-1))),
    "sum over a mean": lambda m, x, c: both(lambda h, g: h + g.mean((2, 3), keepdim=True), act(m.a(x))),
    "sum over a pooled map": lambda m, x, c: both(lambda h, g: h + F.adaptive_avg_pool2d(g, 1), act(m.a(x))),
    "sum over channels": lambda m, x, c: act(m.a(x)) + x,
    "changed in place, no other reader": lambda m, x, c: m.b(F.relu(grow(m.a(x)), inplace=True)),
    "the image twice": lambda m, x, c: act(m.a(x)) + m.b(m.a(x)),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name):
    model = Written(COMPOSITIONS[name]).double()
    condition = torch.randn(3, 6, dtype=torch.float64)
    if "image" in name and "condition" in name:
        model.written = lambda m, x, c: both(lambda h, g: act(m.a(h)) + m.a(g), F.relu(x + c))
        condition = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    given = condition if "condition" in name else None
    assert_same(model, points(), 1e-12, condition=given)
    update = [
        critic_gradients(
            model, points(), points().flip(0), a=torch.rand(3).double().fill_(0.3), condition=given, backend=backend
        )
        for backend in ("auto", "autograd")
    ]
    assert relative(*(u.gradients for u in update)) <= 1e-12


REFUSED_COMPOSITIONS = {
    "leaky_relu in the critic's forward changes": lambda m, x, c: both(lambda h, g: h + F.leaky_relu(g, 0.2, True), m.a(x)),
    "so it joins some": lambda m, x, c: m.a(x).view(-1, 16).unsqueeze(1),
    "changes a tensor in place that is used elsewhere": lambda m, x, c: both(lambda h, g: h + F.relu(g, inplace=True), m.a(x)),
    "must keep the batch's dimension": lambda m, x, c: m.a(x).reshape(1, -1),
    "joins samples": lambda m, x, c: m.a(x).mean(-4),
    "does not know": lambda m, x, c: m.a(x).sum(axis=1),
    "switches gradients or autocast": lambda m, x, c: m.a(x) + without_gradient(m.a, x),
    "takes 4 channels or features": lambda m, x, c: m.b(x),
    "of different numbers of dimensions": lambda m, x, c: m.a(x) + m.a(x).flatten(1).sum(1),
    "mean in the critic's forward joins samples": lambda m, x, c: m.a(x).mean(),
    "squeeze in the critic's forward must name one dimension": lambda m, x, c: m.a(x).squeeze(),
    "add in the critic's forward must add two tensors": lambda m, x, c: m.a(x) + 1.0,
    r"must join channels \(dim 1\), got dim 0": lambda m, x, c: torch.cat([m.a(x), x]),
}


def without_gradient(layer, x):
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("message", REFUSED_COMPOSITIONS)
def test_compositions_without_a_tangent_pass_are_refused(message):
    with pytest.raises(InputError, match=message):
        gradient_penalty(Written(REFUSED_COMPOSITIONS[message]).double(), points())


def test_deep_critics():
    layers = [layer for _ in range(150) for layer in (nn.Conv2d(1, 1, 1), nn.LeakyReLU(0.9))]
    assert_same(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 1)).double(), points(), 1e-11)


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


def wrapped_inside(model):
    """Parts in wrappers of their own."""
    model.trunk, model.tail = nn.DataParallel(model.trunk), compiled(compiled_in_place(model.tail))
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "averaged": AveragedModel,
    "DataParallel of compiled": lambda m: nn.DataParallel(compiled(m)),
    "compiled, averaged, DataParallel": lambda m: compiled(AveragedModel(nn.DataParallel(m))),
    "parts": wrapped_inside,
}


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_critics_inside_of_wrappers(name, conditional):
    channels = 2 if conditional else 0
    condition = torch.randn(3, 2, 4, 4, dtype=torch.float64) if conditional else None
    wrapped = WRAPPERS[name](critic(channels))
    wanted, found = (gradients(model, points(), "auto", condition=condition) for model in (critic(channels), wrapped))
    assert found[0] == wanted[0] and all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


class Holder(nn.Module):
    """A user's own wrapper; with ``looks`` it branches on values, as no traced forward can."""

    def __init__(self, module, looks):
        super().__init__()
        self.module, self.looks = module, looks

    def forward(self, *arguments, **options):
        return self.module(*arguments, **options) if not self.looks or arguments[0].sum() < 1e9 else None


def test_a_wrapper_that_is_not_known():
    model = critic()
    assert gradient_penalty(Holder(model, looks=False), points()) == gradient_penalty(model, points())
    with pytest.raises(InputError, match=r"where Holder only wraps a critic, pass critic\.module"):
        gradient_penalty(Holder(model, looks=True), points())


class Mixed(Critic):
    """A module as accelerate prepares it for mixed precision: with a new forward, and the old one beside it."""

    def prepared(self):
        self._original_forward = self.forward
        self.forward = lambda *arguments: self._original_forward(*arguments).float()
        return self


def test_a_forward_that_accelerate_has_wrapped():
    model = Mixed(CriticConfig(8, 1, channels=4, max_channels=8))
    wanted = gradient_penalty(model, points().float())
    with pytest.raises(InputError, match="unwrap_model.*keep_fp32_wrapper=False"):
        gradient_penalty(model.prepared(), points().float())
    # Unwrapping leaves this: the class' own forward, bound, among the attributes.
    del model._original_forward
    model.forward = types.MethodType(Critic.forward, model)
    assert gradient_penalty(model, points().float()) == wanted


@pytest.mark.parametrize("other", DEFAULTS, ids=str)
@pytest.mark.parametrize("backend", [*ENGINES, "autograd"])
def test_torch_defaults_change_nothing(backend, other):
    x, condition = points(dtype=torch.float32), torch.randn(3, 2, 4, 4)
    for options in MODES:
        wanted = gradients(critic(2, dtype=torch.float32), x, backend, condition=condition, **options)
        model = critic(2, dtype=torch.float32)
        with other_default(other):
            penalty, found = gradients(model, x, backend, condition=condition, **options)
        assert penalty.device.type == "cpu" and penalty.dtype == torch.float32 and torch.equal(penalty, wanted[0])
        assert relative(found, wanted[1]) == 0 and all(g is None or g.dtype == torch.float32 for g in found)


def test_a_loss_scale_beyond_float16():
    """65536, a GradScaler's initial scale, multiplies the gradients in float32."""
    model, x = critic(size=16, dtype=torch.float32), points(4, 16, torch.float32)
    with torch.autocast("cpu", torch.float16):
        ours, theirs = (gradient_penalty(model, x, weight=0.1, backend=name) for name in ("auto", "autograd"))
    weight = model.trunk[0].weight
    ours, theirs = (torch.autograd.grad(65536.0 * penalty, weight)[0] / 65536 for penalty in (ours, theirs))
    assert ours.isfinite().all() and (ours - theirs).norm() <= 2e-2 * theirs.norm()


class Free(nn.Module):
    """A critic whose weights are plain tensors: functions of them can be differentiated numerically."""

    def __init__(self, w1, b1, w2, w3):
        super().__init__()
        self.w1, self.b1, self.w2, self.w3 = w1, b1, w2, w3

    def forward(self, x):
        x = F.leaky_relu(F.conv2d(x, self.w1, self.b1, stride=2, padding=1), 0.2)
        x = x + F.conv2d(x, self.w2, padding=1)
        return F.linear(F.relu(x).flatten(1), self.w3)


@pytest.mark.parametrize("options", MODES, ids=lambda o: o["mode"])
def test_gradcheck(options):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 1, 3, 3), (2,), (2, 2, 3, 3), (1, 18)]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    x = torch.randn(2, 1, 6, 6, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *w: gradient_penalty(Free(*w), x, **options), weights)


def test_weights_that_are_computed():
    """The penalty's gradient flows on into what a weight is computed from."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1)).double().eval()
    nn.utils.parametrizations.weight_norm(model[0])
    assert_same(model, points(), 1e-12)


def test_parameters_frozen_or_shared():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), Twice(2), nn.Flatten(), nn.Linear(72, 1)).double()
    assert_same(model, points(), 1e-12)
    model[0].requires_grad_(False)
    assert_same(model, points(), 1e-12)
    model.requires_grad_(False)
    assert not gradient_penalty(model, points()).requires_grad


def test_a_gradient_of_zero_norm():
    model = critic()
    with torch.no_grad():
        model.tail[3].weight.zero_()
    penalty, ours = gradients(model, points(), "auto")
    assert penalty == 10 and all(not g.any() for g in ours)
    assert_same(model, points(), 1e-12)


def test_pre_activations_of_exactly_zero():
    """Zero takes the slope's side, as in torch; no NaN, and the penalty sees the slope."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(72, 1)).double()
    zeros = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    for name in ENGINES:
        assert_same(model.double(), zeros, 1e-12)
        assert_same(model.float(), zeros.float(), 1e-5, name)


def test_samples_do_not_couple():
    model = critic()
    whole = gradient_penalty(model, points(4))
    parts = [gradient_penalty(model, points(4)[i : i + 1]) for i in range(4)]
    assert torch.allclose(whole, torch.stack(parts).mean())


def test_no_gradient_flows_into_the_points():
    x = points().requires_grad_()
    penalty = gradient_penalty(critic(), x)
    assert torch.autograd.grad(penalty, x, allow_unused=True) == (None,)


def test_it_scales_with_the_incoming_gradient_and_repeats():
    model, x = critic(), points()
    parameters = list(model.parameters())
    once = torch.autograd.grad(gradient_penalty(model, x), parameters)
    thrice = torch.autograd.grad(3 * gradient_penalty(model, x), parameters)
    again = torch.autograd.grad(gradient_penalty(model, x), parameters)
    assert relative(thrice, [3 * g for g in once]) < 1e-14
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.parametrize("through", ["backward", "grad"])
def test_its_gradients_have_no_gradient(through):
    model = critic()
    weight = model.trunk[0].weight
    # A layer above and a layer below: no dependence of the penalty may silently lack a derivative.
    for other in (model.tail[0].weight, weight):
        (gradient,) = torch.autograd.grad(gradient_penalty(model, points()), other, create_graph=True)
        with pytest.raises(RuntimeError, match="gradient_penalty is differentiable once"):
            if through == "backward":
                gradient.square().sum().backward()
            else:
                torch.autograd.grad(gradient.square().sum(), [weight])


@pytest.mark.parametrize("through", ["backward", "grad"])
def test_an_op_of_order_one_inside_a_penalty_raises(through):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm, self.linear = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(72, 1)

        def forward(self, x):
            x = norm_act(self.convolution(x), self.norm.weight, self.norm.bias, None, None, backend="reference")
            return self.linear(x.flatten(1))

    model = Normed().double()
    for weight in (model.convolution.weight, model.norm.weight, model.linear.weight):
        penalty = gradient_penalty(model, points(), backend="autograd")
        with pytest.raises(RuntimeError, match="norm_act is differentiable once"):
            penalty.backward() if through == "backward" else torch.autograd.grad(penalty, [weight])


def test_compiled_whole():
    model, x = critic(size=16, dtype=torch.float32), points(4, 16, torch.float32)
    exact = gradients(model, x, "autograd")[1]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gradient_penalty(model, x), fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x), list(model.parameters()))
    assert relative(ours, exact) <= 1e-5


def test_strides_of_one_pixel_have_no_meaning():
    """Such strides make torch's own grouped convolutions read wrong numbers."""
    model = nn.Sequential(nn.Conv2d(4, 4, (4, 1), padding=1, groups=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(72, 1))
    x = torch.randn(3, 4, 4, 4).contiguous(memory_format=torch.channels_last)
    wanted = gradient_penalty(model, x)
    weight = model[0].weight.data
    model[0].weight.data = torch.empty_strided(weight.shape, (8, 1, 2, 32)).copy_(weight)
    assert torch.allclose(gradient_penalty(model, x), wanted, 1e-5)


def test_a_changed_critic_is_traced_again():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(72, 1)).double()
    assert_same(model, points(), 1e-12)
    model[1].negative_slope = 0.7
    assert_same(model, points(), 1e-12)
    model[1] = nn.ReLU()
    assert_same(model, points(), 1e-12)
    model[1] = nn.Identity()
    model[1] = nn.SiLU()
    with pytest.raises(InputError, match="SiLU"):
        gradient_penalty(model, points())
    model[1] = nn.ReLU()
    model.append(nn.Dropout(0.5)).eval()
    assert_same(model, points(), 1e-12)
    with pytest.raises(InputError, match=r"layer 4 \(Dropout\) drops at random"):
        gradient_penalty(model.train(), points())


def replaced(model):
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))


def loaded(model):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


def averaged(model):
    from diffusers.training_utils import EMAModel

    average = EMAModel(model.parameters(), decay=0.5)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    average.step(model.parameters())
    average.copy_to(model.parameters())


def optimised(model):
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    gradient_penalty(model, points()).backward()
    optimizer.step()


def by_numpy(model):
    model[0].weight.detach().numpy()[:] *= 2


WRITES = {
    "data": lambda model: model[0].weight.data.mul_(2),
    "numpy": by_numpy,
    "average": averaged,
    "fused optimiser": optimised,
    "another parameter": replaced,
    "assigned state": loaded,
    "no bias": lambda model: setattr(model[0], "bias", None),
    "slope": lambda model: setattr(model[1], "negative_slope", 0.9),
    "padding": lambda model: setattr(model[0], "padding", (2, 2)),
    "stride and padding": lambda model: (setattr(model[0], "stride", 2), setattr(model[0], "padding", (4, 4))),
}


@pytest.mark.parametrize("name", WRITES)
def test_changed_weights_and_options_are_seen(name):
    """The cached plan holds neither, however they were changed."""
    if name == "average":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    model = model.append(nn.Linear(32, 1)).double()
    before = gradient_penalty(model, points()).item()
    WRITES[name](model)
    assert gradient_penalty(model, points()).item() != before or name == "no bias"
    assert_same(model, points(), 1e-12)


class Blended(nn.Module):
    """A number that the forward reads from a buffer, as a growing network does to fade in new layers."""

    def __init__(self, read):
        super().__init__()
        self.a, self.read = nn.Conv2d(1, 2, 3), read
        self.register_buffer("alpha", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("kernel", torch.ones(1, 2, 3, 3, dtype=torch.float64))

    def forward(self, x):
        return F.conv2d(F.leaky_relu(self.a(x), 0.2) * READINGS[self.read](self.alpha), self.kernel)


READINGS = {"item": torch.Tensor.item, "float": float, "list": lambda alpha: alpha.reshape(1).tolist()[0]}


@pytest.mark.parametrize("read", READINGS)
def test_numbers_read_from_a_buffer_are_read_again(read):
    model = Blended(read).double()
    for alpha in (0.5, 2.0):
        model.alpha.fill_(alpha)
        model.kernel.data.mul_(1.5)
        assert_same(model, points(), 1e-12)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="computes with values of tensors"):
        torch.compile(lambda x: gradient_penalty(model, x), fullgraph=True, backend="eager")(points())


def test_a_computed_weight_is_refused():
    class Halved(Blended):
        def forward(self, x):
            return F.conv2d(self.a(x), self.kernel / 2)

    with pytest.raises(InputError, match="conv2d in the critic's forward has a weight that is computed"):
        gradient_penalty(Halved("item").double(), points())


def test_attributes_that_are_objects_are_seen_to_change():
    class Configured(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.slopes, self.config = nn.Conv2d(1, 2, 3), [0.2], CriticConfig()

        def forward(self, x):
            return F.leaky_relu(F.leaky_relu(self.a(x), self.slopes[0]).mean((2, 3)), self.config.slope).sum(1)

    model = Configured().double()
    assert_same(model, points(), 1e-12)
    model.slopes[0] = 0.8
    assert_same(model, points(), 1e-12)
    model.config.slope = 0.5
    assert_same(model, points(), 1e-12)


def test_a_slope_changed_after_compilation():
    model, x = critic(size=8, dtype=torch.float32), points(4, 8, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: critic_gradients(model, x, x.flip(0), a=x[:, 0, 0, 0]), fullgraph=True, backend="eager")
    for slope in (0.2, 0.9):
        model.trunk[1].negative_slope = slope
        exact = critic_gradients(model, x, x.flip(0), a=x[:, 0, 0, 0], backend="autograd")
        assert relative(compiled(x).gradients, exact.gradients) <= 1e-5


def chain(*layers):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(1)).double()
    model(points())
    return model


class Looks(nn.Module):
    def forward(self, x):
        return x.flatten(1).sum(1) if x.max() > 0 else x.flatten(1).mean(1)


REFUSED = [
    (chain(nn.BatchNorm2d(4)), r"layer 1 \(BatchNorm2d\) is not piecewise linear, or couples samples"),
    (chain(nn.InstanceNorm2d(4)), r"layer 1 \(InstanceNorm2d\)"),
    (chain(nn.GroupNorm(2, 4)), r"layer 1 \(GroupNorm\)"),
    (chain(nn.SiLU()), r"layer 1 \(SiLU\)"),
    (chain(nn.Tanh()), r"layer 1 \(Tanh\)"),
    (chain(nn.MaxPool2d(2)), r"layer 1 \(MaxPool2d\)"),
    (chain(nn.PReLU()), r"layer 1 \(PReLU\)"),
    (chain(nn.Upsample(scale_factor=2, mode="bilinear")), r"layer 1 \(Upsample\) up-samples by bilinear"),
    (chain(nn.Conv2d(4, 4, 3, padding_mode="reflect")), r"layer 1 \(Conv2d\) pads with reflect"),
    (chain(nn.Conv2d(4, 4, 4, padding="same")), r"layer 1 \(Conv2d\) pads one side more"),
    (nn.Sequential(nn.Flatten(0), nn.Linear(192, 1)).double(), r"layer 0 \(Flatten\) joins samples"),
    (Looks(), "forward cannot be traced"),
]


@pytest.mark.parametrize("model, message", REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_layers_without_a_tangent_pass_are_named(model, message):
    with pytest.raises(InputError, match=message) as caught:
        gradient_penalty(model, points())
    assert "backend='autograd'" in str(caught.value)
    gradient_penalty(model, points(), backend="autograd")


class Returning(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, x, condition):
        return self.returned(x, condition)


def test_functions_and_hooks_without_a_tangent_pass_are_named():
    class Smooth(nn.Module):
        def forward(self, x):
            return F.gelu(x).flatten(1).sum(1)

    with pytest.raises(InputError, match="gelu in the critic's forward"):
        gradient_penalty(Smooth(), points())
    model = critic()
    model.trunk[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(InputError, match=r"layer trunk.0 \(Conv2d\) has hooks"):
        gradient_penalty(model, points())
    model = critic()
    model.tail[0].forward = lambda x: x
    with pytest.raises(InputError, match=r"layer tail.0 \(Conv2d\) has hooks or a forward of its own"):
        gradient_penalty(model, points())
    for returned, message in ((lambda x, c: (x, c), "one tensor$"), (lambda x, c: c, "one tensor that depends on its first")):
        with pytest.raises(InputError, match=f"critic must return {message}"):
            gradient_penalty(Returning(returned), points(), condition=points())
    with pytest.raises(InputError, match="critic must be a torch.nn.Module"):
        gradient_penalty(lambda x: x.sum(), points())
    with pytest.raises(InputError, match="critic must be a module or a function"):
        gradient_penalty(3, points())


BAD = [
    ({"x_hat": points()[0]}, r"x_hat must be .* \(N, C, H, W\)"),
    ({"x_hat": points().long()}, "x_hat must be a floating-point"),
    ({"x_hat": points()[:0]}, "x_hat holds no samples"),
    ({"x_hat": points().float()}, r"layer trunk.0 \(Conv2d\) has weights of torch.float64"),
    ({"x_hat": points().to("meta")}, r"layer trunk.0 \(Conv2d\) has weights of torch.float64 on cpu.*on meta"),
    ({"x_hat": points().fill_(float("nan"))}, "x_hat holds numbers that are not finite"),
    ({"weight": -1.0}, "weight must be a number of at least 0"),
    ({"target": float("nan")}, "target must be a number of at least 0"),
    ({"mode": "three-sided"}, "mode must be one of two-sided, one-sided, r1"),
    ({"backend": "fastest"}, "backend must be one of"),
]


@pytest.mark.parametrize("backend", ["auto", "autograd"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_penalty_without_a_gradient(backend, mode):
    model, x = critic(), points()
    wanted = gradient_penalty(model, x, backend=backend)
    with mode():
        for x_hat in (x, x.clone()):
            found = gradient_penalty(model, x_hat, backend=backend)
            assert torch.equal(found, wanted) and not found.requires_grad


@pytest.mark.parametrize("backend", ["auto", "autograd"])
def test_parameters_of_inference_mode(backend):
    with torch.inference_mode():
        frozen = critic()
    with pytest.raises(InputError, match="critic.*inference mode"):
        gradient_penalty(frozen, points(), backend=backend)


@pytest.mark.parametrize("value", [np.float32(10), fractions.Fraction(10), torch.tensor(10.0), 10, True])
@pytest.mark.parametrize("backend", ["auto", "autograd"])
def test_weights_of_any_type_of_number(value, backend):
    wanted = gradient_penalty(critic(), points(), weight=float(value), backend=backend)
    assert torch.equal(gradient_penalty(critic(), points(), weight=value, backend=backend), wanted)


@pytest.mark.parametrize("value", [pytest.param(10**400, id="huge"), 1e300, float("inf"), "1", None, torch.zeros(2)])
def test_weights_that_are_no_finite_numbers(value):
    for name in ("weight", "target"):
        with pytest.raises(InputError, match=name):
            gradient_penalty(critic(), points(), **{name: value})


@pytest.mark.parametrize("changes, message", BAD, ids=[message[:20] for _, message in BAD])
def test_bad_input_is_named(changes, message):
    options = {"x_hat": points(), **changes}
    with pytest.raises(InputError, match=message):
        gradient_penalty(critic(), options.pop("x_hat"), **options)


def test_bad_conditions_and_weights_are_named():
    model, condition = critic(2), torch.zeros(3, 2, 4, 4, dtype=torch.float64)
    for bad in (condition[:2], condition.to("meta")):
        with pytest.raises(InputError, match=r"condition must be \(3, ...\) on cpu"):
            gradient_penalty(model, points(), condition=bad)
    with pytest.raises(InputError, match="condition must hold real numbers"):
        gradient_penalty(model, points(), condition=condition.to(torch.complex64))
    nested = torch.nested.nested_tensor(list(condition))
    for bad in (3.0, nested):
        with pytest.raises(InputError, match="condition must be a (dense )?tensor"):
            gradient_penalty(model, points(), condition=bad)
        with pytest.raises(InputError, match="x_hat must be a (dense )?tensor"):
            gradient_penalty(model, bad, condition=condition)
    with pytest.raises(InputError, match="condition must have 2 channels"):
        gradient_penalty(model, points())
    for bad in (condition[..., :3], condition[..., :0]):
        with pytest.raises(InputError, match="cat in the critic's forward joins .* which do not fit each other"):
            gradient_penalty(model, points(), condition=bad)
    with torch.no_grad():
        model.tail[0].weight[0] = float("inf")
    with pytest.raises(InputError, match="parameter tail.0.weight holds numbers that are not finite"):
        gradient_penalty(model, points(), condition=condition)
    assert not torch.isfinite(gradient_penalty(model, points(), condition=condition, check_finite=False))
    with pytest.raises(InputError, match="x_hat holds numbers that are not finite"):
        gradient_penalty(lambda x: x.square().sum((1, 2, 3)), points() * float("nan"), backend="autograd")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_asked_for_by_name_runs_or_raises():
    with pytest.raises(BackendUnavailableError, match="cuda"):
        gradient_penalty(critic(), points(), backend="cuda")
