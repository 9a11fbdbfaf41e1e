"""ADV-KD as a method of the trainer; its recipes and distances are in tests/system/test_distill.py."""

from advkd.data.trajectories import Trajectories
from advkd.methods.adv_kd import recipe
from advkd.training.distillation import Distiller

from ..conftest import tiny_student


def tiny_run(data, out, seed=0, weights=0, **options):
    """Six updates of the paper's recipe with everything that a joint one may add."""
    changes = {"recipe": "paper", "updates": (1, 1, 1, 3), "critic_updates": 2, "augment": True, "kl": 0.1, "mse": 1.0}
    changes |= {"critic_channels": 4, "critic_max_channels": 8, "batch_sizes": (8,), "ema": 0.9, "conditional": True}
    config = recipe("joint", **changes, checkpoint_every=2, seed=seed)
    return Distiller(Trajectories(data), tiny_student(seed + weights), config, out, **options)
