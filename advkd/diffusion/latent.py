"""Models of the same states as another one: its latents, where it has an autoencoder, and its classes."""

from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..models.autoencoder import sha256_of
from .teacher import LatentTeacher, Teacher

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def around(network: "UNet2DModel", model: Teacher, scheduler: Any, name: str) -> Teacher:
    """A network that draws the states of another model.

    Args:
        network: the network; as for :class:`Teacher`.
        model: the other model; its classes and its autoencoder are taken.
        scheduler: as for :class:`Teacher`.
        name: as for :class:`Teacher`.

    Returns:
        A :class:`LatentTeacher` where ``model`` has an autoencoder, else a :class:`Teacher`.
    """
    if model.autoencoder is None:
        return Teacher(network, scheduler, name, model.classes)
    return LatentTeacher(network, scheduler, model.autoencoder, name, model.classes)


def require_same_latents(student: Teacher, teacher: Teacher) -> None:
    """Refuse two models of which one draws no latents, or those of another autoencoder.

    Args:
        student: the one that is trained.
        teacher: the one that it learns from.

    Raises:
        InputError: their autoencoders have different digests.
    """
    ours, theirs = (sha256_of(model.autoencoder) for model in (student, teacher))
    if ours != theirs:
        found = [f"latents of the autoencoder {sha256[:8]}" if sha256 else "pixels" for sha256 in (theirs, ours)]
        raise InputError(f"the teacher draws {found[0]}, the student {found[1]}: begin with one of the teacher's own students")
