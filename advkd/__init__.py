"""One-step image generation distilled from diffusion models.

``import advkd`` imports torch and little else; diffusers, accelerate, torchmetrics and matplotlib are imported where they are
used.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdvKDPipeline": "export.pipeline",
    "Autoencoder": "models.autoencoder",
    "BackendUnavailableError": "errors",
    "Cascade": "diffusion.cascade",
    "Classifier": "models.classifier",
    "Critic": "models.critic",
    "CriticConfig": "models.critic",
    "CriticGradients": "ops.critic.update",
    "DenoiserPipeline": "export.denoiser_pipeline",
    "DenoiserStudent": "diffusion.denoiser_student",
    "DistillConfig": "methods.adv_kd",
    "Distiller": "training.distillation",
    "EvaluationConfig": "evaluation.evaluate",
    "FusedDDIMScheduler": "diffusion.schedulers",
    "FusedDDPMScheduler": "diffusion.schedulers",
    "FusedDEISMultistepScheduler": "diffusion.deis_scheduler",
    "FusedDPMSolverMultistepScheduler": "diffusion.schedulers",
    "FusedEulerDiscreteScheduler": "diffusion.schedulers",
    "FusedHeunDiscreteScheduler": "diffusion.heun_scheduler",
    "FusedStudent": "models.fused_student",
    "FusedUniPCMultistepScheduler": "diffusion.unipc_scheduler",
    "InputError": "errors",
    "LatentTeacher": "diffusion.teacher",
    "Sampler": "diffusion.denoiser_student",
    "Student": "models.student",
    "StudentConfig": "models.shape",
    "SuperResolution": "diffusion.cascade",
    "Teacher": "diffusion.teacher",
    "Trajectories": "data.trajectories",
    "critic_gradients": "ops.critic.update",
    "critic_step": "ops.critic.update",
    "distill_denoiser": "training.denoisers",
    "evaluate_folders": "evaluation.evaluate",
    "evaluate_student": "evaluation.evaluate",
    "export_onnx": "export.onnx",
    "load_student": "diffusion.students",
    "record_trajectories": "diffusion.recorder",
    "sharing": "runtime.neighbours",
    "train_autoencoder": "training.autoencoder",
    "train_classifier": "training.classifier",
    "train_teacher": "training.teacher",
    "write_report": "evaluation.report",
}
_ROOMS = ("cli", "data", "diffusion", "engines", "evaluation", "export", "methods", "models", "ops", "runtime", "training")
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"advkd.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'advkd' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"advkd.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS) | set(_ROOMS))


def _map_kernels():
    """In a bare checkout the Triton kernels lie beside the package; an installed copy has them inside it."""
    folder = Path(__file__).parent.parent / "kernels"
    if (Path(__file__).parent / "kernels").is_dir() or not folder.is_dir():
        return
    spec = importlib.util.spec_from_file_location(
        "advkd.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["advkd.kernels"] = module
    spec.loader.exec_module(module)
    globals()["kernels"] = module


_map_kernels()
