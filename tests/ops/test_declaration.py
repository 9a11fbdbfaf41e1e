"""Declared ops: schemas, launchers, the choice among them, empty tensors, refusal of gradients in direct calls."""

import pytest
import torch

from advkd.errors import BackendUnavailableError, InputError
from advkd.ops import registry
from advkd.ops.declaration import declare


def write(x, scale, out):
    out.copy_(scale * x)


def make(x, scale):
    return scale * x


SCALE = declare("declared_scale(Tensor x, float scale, Tensor(a!) out) -> ()", reference=write, backends=(), group="declared")
COUNT = declare(
    "declared_count(Tensor x, Tensor(a!) out, Tensor(b!)? other) -> ()",
    reference=lambda x, out, other: out.fill_(len(x)),
    backends=(),
    empty=lambda x, out, other: out.fill_(-1),
    group="declared",
)
TIMES = declare(
    "declared_times(Tensor x, float scale) -> Tensor",
    reference=make,
    backends=("cpu",),
    launchers={"cpu": lambda x, scale: scale * x + 1},
    fake=lambda x, scale, backend: torch.empty_like(x),
    dtypes={"cpu": (torch.float32,)},
)


TABLES = (registry.IMPLEMENTED, registry.BY_NAME, registry.CAPABILITY, registry.STORED)
ENTRIES = [{name: table.pop(name) for name in ("declared", "declared_times")} for table in TABLES]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """These ops are in the registry for these tests alone."""
    for table, entries in zip(TABLES, ENTRIES):
        for name, entry in entries.items():
            monkeypatch.setitem(table, name, entry)


def test_the_backend_stands_before_what_is_written_or_at_the_end():
    assert str(SCALE.overload._schema) == "advkd::declared_scale(Tensor x, float scale, str backend, Tensor(a!) out) -> ()"
    assert str(COUNT.overload._schema).startswith("advkd::declared_count(Tensor x, str backend, Tensor(a!) out, Tensor(b!)? ")
    assert str(TIMES.overload._schema) == "advkd::declared_times(Tensor x, float scale, str backend) -> Tensor"


def test_launchers_take_the_arguments_without_the_backend():
    x, out = torch.ones(3), torch.empty(3)
    SCALE(x, 2.0, "auto", out)
    assert torch.equal(out, 2 * x)
    SCALE.launchers["reference"](x, 3.0, out)
    assert torch.equal(out, 3 * x)


def test_the_first_argument_chooses_the_backend():
    x = torch.ones(3)
    assert torch.equal(TIMES(x, 2.0, "cpu"), torch.full((3,), 3.0))
    assert torch.equal(TIMES(x, 2.0, "reference"), torch.full((3,), 2.0))
    assert torch.equal(TIMES(x.double(), 2.0, "auto"), torch.full((3,), 2.0).double())
    with pytest.raises(InputError, match="backend 'cpu' of declared_times takes"):
        TIMES(x.double(), 2.0, "cpu")
    with pytest.raises(BackendUnavailableError, match="not written for this op yet"):
        TIMES(x, 2.0, "triton")
    with pytest.raises(BackendUnavailableError, match="cannot run declared on cpu"):
        SCALE(x, 2.0, "cpu", torch.empty(3))


def test_empty_tensors():
    out = torch.full((1,), 7.0)
    SCALE(torch.empty(0), 2.0, "auto", out)
    assert out == 7, "nothing is done"
    COUNT(torch.empty(2, 0), "auto", out, None)
    assert out == -1
    COUNT(torch.empty(2, 1), "auto", out, None)
    assert out == 2
    assert TIMES(torch.empty(0), 2.0, "reference").shape == (0,)


@pytest.mark.parametrize("place", [0, 3])
def test_direct_calls_refuse_gradients(place):
    arguments = [torch.ones(3), 2.0, "auto", torch.empty(3)]
    arguments[place] = arguments[place].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="declared_scale has no gradient"):
        SCALE(*arguments)
    with pytest.raises(RuntimeError, match="declared_scale has no gradient"):
        torch.compile(lambda: SCALE(*arguments), backend="eager")()
    with torch.no_grad():
        SCALE(*arguments)
    with pytest.raises(RuntimeError, match="declared_times has no gradient"):
        TIMES(torch.ones(3, requires_grad=True), 2.0, "reference").sum().backward()


def test_opcheck():
    torch.library.opcheck(SCALE.overload, (torch.ones(3), 2.0, "auto", torch.empty(3)))
    torch.library.opcheck(TIMES.overload, (torch.ones(3), 2.0, "reference"))
