"""Price of a training run in network evaluations."""

from collections.abc import Sequence
from typing import Any

from ..data.dataset_info import DatasetInfo
from ..diffusion.solvers import Solver
from ..methods.base import Method, Stage


def run_cost(method: Method, stages: Sequence[Stage], info: DatasetInfo | None = None, num: int = 0) -> dict[str, Any]:
    """Network evaluations of all samples in some stages, the recording of trajectories among them.

    Args:
        method: the run's method.
        stages: those that count.
        info: description of the trajectories, or None.
        num: number of the trajectories that no earlier run has paid for.

    Returns:
        ``forward`` (of student and teacher) and ``backward`` evaluations.
    """
    forward, backward = 0, 0
    if info is not None:
        forward = num * Solver(info.solver).evaluations(info.steps) * (2 if info.guidance else 1)
    for stage in stages:
        ahead, back = method.evaluations(stage)
        forward += ahead * stage.updates * stage.batch_size
        backward += back * stage.updates * stage.batch_size
    return {"forward": forward, "backward": backward}
