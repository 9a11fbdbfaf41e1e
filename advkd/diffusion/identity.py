"""Everything that a teacher's paths depend on, as JSON values."""

import hashlib
import json
import math
from typing import Any

from ..runtime.files import digest


def identity_of(teacher: Any, autocast: Any, powers: Any) -> dict[str, Any]:
    """Identity of a teacher in diffusers' format.

    Args:
        teacher: a :class:`~advkd.diffusion.teacher.Teacher`.
        autocast: dtype of its mixed precision, or None.
        powers: :class:`~advkd.diffusion.noise_power.NoisePower` of an analytic solver's paths, or None.

    Returns:
        See :meth:`~advkd.diffusion.teacher.Teacher.identity`.
    """
    told = {"takes_guidance": teacher.most_guidance, "takes_latent": teacher.latent, "takes_low": list(teacher.low or ())}
    network = {k: v for k, v in sorted(teacher.unet.config.items()) if not k.startswith("_")}
    return {
        "name": teacher.name,
        "parameters": teacher.num_parameters(),
        "weights_sha256": digest(teacher.unet.state_dict()),
        "network_sha256": hashlib.sha256(json.dumps(network, sort_keys=True).encode()).hexdigest(),
        "schedule_sha256": digest({"alpha_bars": teacher.alpha_bars}),
        "prediction": teacher.prediction,
        "clip": teacher.clip if math.isfinite(teacher.clip) else None,
        "variance": str(teacher.scheduler.config.get("variance_type")),
        **({"autocast": str(autocast)} if autocast else {}),
        **{name: value for name, value in told.items() if value},
        **({"noise_power": list(powers.values)} if powers else {}),
        **({"autoencoder_sha256": teacher.autoencoder.sha256} if teacher.autoencoder else {}),
    }
