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
        ``forward`` and ``backward`` evaluations, those of :meth:`Method.evaluations`.
    """
    forward, backward = 0, 0
    if info is not None:
        # A teacher that takes the weight itself evaluates its network once.
        each = 2 if info.guidance and "takes_guidance" not in info.teacher else 1
        forward = num * each * Solver(info.solver).evaluations(info.steps)
    for stage in stages:
        ahead, back = method.evaluations(stage)
        forward += round(ahead * stage.updates * stage.batch_size)
        backward += round(back * stage.updates * stage.batch_size)
    return {"forward": forward, "backward": backward}


def unpaid(record: dict[str, Any], manifests: Sequence[str], parts: Sequence[dict[str, int]]) -> int:
    """Number of recorded trajectories that no earlier run of a student has paid for.

    Args:
        record: the student's training record.
        manifests: digests of the recordings' manifests, which runs keep under ``trajectories``.
        parts: what each recording holds, in the same order.

    Returns:
        Their number; a recording of a run that did not keep its digest counts as paid where its samples are in the record.
    """
    kept = {digest for run in record["runs"] for digest in run.get("trajectories", ())}
    older = any("samples" in run and "trajectories" not in run for run in record["runs"])
    return sum(
        part["num"]
        for digest, part in zip(manifests, parts, strict=True)
        if digest not in kept and not (older and part in record["samples"])
    )
