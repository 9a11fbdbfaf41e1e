"""Data sets of glyphs by name: a training range, and held-out references of any number, kept in the cache up to 2 GiB."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InputError
from ..ops.arguments import whole
from ..runtime.folders import cache_folder, require_output_folder
from ..runtime.progress import progress_bar
from .glyphs import CLASSES, FONTS, HELD_OUT, LARGEST, TRAINED, draw_glyphs, glyph_labels, require_glyphs, versions
from .kept_sets import KeptSet
from .labels import labels_in_turn

NAMES = {"glyphs": "all", "glyphs-digits": "digits", "glyphs-letters": "letters"}
"""Classes by the name of a data set."""

REFERENCE = 10_000
"""Images of a reference whose number is not given."""

FEW = 1000
"""Images that take seconds: they are drawn anew."""

LARGEST_KEPT = 2**31
"""Bytes of images that the cache keeps at most; of larger sets it keeps nothing."""

BATCH_SIZE = 50
"""Images between two moves of the progress bar."""


@dataclass(frozen=True)
class GlyphSet:
    """Consecutive images of glyphs, of seed 0.

    Attributes:
        classes: name of a set of classes, one of :data:`advkd.data.glyphs.CLASSES`.
        num: number of images.
        first: index of the first image.
        chosen: characters that the images take in turn by their place; empty: each image has a random one of the set.

    Raises:
        InputError: an unknown set of classes, a chosen character that is not in it, or a number out of range.
    """

    classes: str = "all"
    num: int = TRAINED
    first: int = 0
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_glyphs(LARGEST, self.classes)
        whole("num", self.num, 0, 2**62 - whole("first", self.first, 0, 2**62) + 1)
        if not isinstance(self.chosen, tuple) or any(name not in CLASSES[self.classes] for name in self.chosen):
            raise InputError(f"chosen must be some of {', '.join(CLASSES[self.classes])}, got {self.chosen!r}")

    @property
    def name(self) -> str:
        """Name of the data set."""
        return next(name for name, classes in NAMES.items() if classes == self.classes)

    @property
    def class_names(self) -> list[str]:
        """The characters, in the order of their labels."""
        return list(CLASSES[self.classes])

    def of(self, names: Sequence[str], option: str) -> "GlyphSet":
        """The set to compare images of some classes with.

        Args:
            names: names of the classes that these images take in turn; empty where they are not known.
            option: name of the set in errors.

        Returns:
            This set for all its classes, or for none that is known; else one of the classes in turn.

        Raises:
            InputError: a class that is not in the set.
        """
        if not names or sorted(names) == sorted(self.class_names):
            return self
        if missing := [name for name in names if name not in self.class_names]:
            raise InputError(f"{option} {self.name} has no class {missing[0]!r} as the model has{_remedy(names)}")
        return replace(self, chosen=tuple(names))

    def require(self, size: int, channels: int | None = None) -> None:
        """Refuse a shape that glyphs do not have.

        Args:
            size: side in pixels.
            channels: number of channels; None: theirs.

        Raises:
            InputError: a size that is not 4 * 2^k from 8 to 512, or other channels than 3.
        """
        require_glyphs(size, self.classes)
        if channels not in (None, 3):
            raise InputError(f"glyphs are in colour: channels must be 3, got {channels}")

    def images(self, size: int, channels: int | None = None, progress: bool = False) -> torch.Tensor:
        """The images, from the cache or drawn now: a killed run draws what is missing.

        Args:
            size: side in pixels, 4 * 2^k, from 8 to 512.
            channels: 3 or None.
            progress: show a bar.

        Returns:
            ``(num, 3, size, size)`` uint8 on the CPU.

        Raises:
            InputError: another shape, fonts that are not there, or a kept file that is damaged.
        """
        self.require(size, channels)

        def draw(count, start):
            indices, labels = range(self.first + start, self.first + start + count), self._in_turn(start, count)
            return draw_glyphs(indices, size, self.classes, 0, FONTS, labels)[0]

        is_kept = self.num >= FEW and self.num * 3 * size**2 <= LARGEST_KEPT
        cache = require_output_folder(cache_folder(), "the cache (ADVKD_CACHE)") if is_kept else None
        depends = [size, self.classes, self.first, versions(), *([self.chosen] if self.chosen else [])] if is_kept else []
        kept = KeptSet("glyphs", depends, self.num, (3, size, size), BATCH_SIZE, draw)
        with progress_bar(total=self.num, desc="glyphs", unit="image", shown=progress) as bar:
            return kept.images(cache, bar)

    def labels(self) -> torch.Tensor:
        """The images' classes.

        Returns:
            ``(num,)`` int64 on the CPU.
        """
        if (labels := self._in_turn(0, self.num)) is not None:
            return torch.tensor(labels, dtype=torch.int64, device="cpu")
        return glyph_labels(range(self.first, self.first + self.num), self.classes)

    def _in_turn(self, start, count):
        """Labels of images ``start .. start + count - 1``, or None where they are random."""
        labels = labels_in_turn([self.class_names.index(name) for name in self.chosen], start, count)
        return None if labels is None else labels.tolist()

    def description(self) -> dict[str, Any]:
        """JSON values that tell the images, but for their size: classes, range, and the versions that drew them."""
        told: dict[str, Any] = {"chosen": list(self.chosen)} if self.chosen else {}
        told |= {"first": self.first, "images": self.num, "versions": versions()}
        return {"data": "glyphs", "classes": self.classes, **told}


def named_like(names: Sequence[str]) -> str:
    """Name of the data set with exactly these classes.

    Args:
        names: names of the classes.

    Returns:
        A key of :data:`NAMES`; empty where there is none.
    """
    return next((name for name, own in NAMES.items() if sorted(names) == sorted(CLASSES[own])), "")


def _remedy(names):
    """End of a message: the smallest set that has the classes."""
    fitting = [name for name, own in NAMES.items() if set(names) <= set(CLASSES[own])]
    return f": name {fitting[-1]}" if fitting else ": glyphs are no measure of it"


def trained_glyphs(source: Any, classes: str = "", num: int = 0) -> GlyphSet | None:
    """The training range of glyphs, if ``source`` names them.

    Args:
        source: a name or a folder.
        classes: of ``glyphs``: ``digits``, ``letters`` or ``all``; empty for ``all``.
        num: number of images; 0 for :data:`advkd.data.glyphs.TRAINED`.

    Returns:
        The set; None for other data.

    Raises:
        InputError: an unknown set of classes, more images than the range has, or classes or a number with other data.
    """
    own = NAMES.get(str(source))
    if classes and str(source) != "glyphs":
        raise InputError(f"classes are of --data glyphs, not of {source}: leave --classes out")
    if own is None:
        _require_no_number("images", num, f"--data {source}")
        return None
    if classes and (not isinstance(classes, str) or classes not in CLASSES):
        raise InputError(f"classes of glyphs must be one of {', '.join(CLASSES)}, got {classes!r}")
    return GlyphSet(classes or own, whole("images", num, 0, HELD_OUT + 1) or TRAINED)


def held_out_glyphs(source: Any, num: int = 0, option: str = "--real") -> GlyphSet | None:
    """Glyphs that nothing is trained on, if ``source`` names them: the true distribution.

    Args:
        source: a name or a folder.
        num: number of images; 0 for :data:`REFERENCE`. Those of a smaller number are the first of a larger one.
        option: name of the source in errors.

    Returns:
        The set; None for other data.

    Raises:
        InputError: a number with other data, which have their own.
    """
    own = NAMES.get(str(source))
    if own is None:
        _require_no_number("real_num", num, f"{option} {source}")
        return None
    return GlyphSet(own, whole("real_num", num, 0, HELD_OUT) or REFERENCE, HELD_OUT)


def _require_no_number(name, num, source):
    if num:
        raise InputError(f"{name} is a number of glyphs, and {source} has its own: leave --{name.replace('_', '-')} out")
