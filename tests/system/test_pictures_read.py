"""Reading one picture: formats, orientation, transparency, gray or colour, and refusals."""

import io
import os
import pickle
import random
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import OPEN_INFO

from advkd.data import decoding
from advkd.data.decoding import PIXEL_LIMIT
from advkd.data.images import IMAGE_SUFFIXES, load_images, read_pictures
from advkd.errors import InputError

# Older versions refuse premultiplied gray by name.
NEW_ENOUGH = pytest.mark.skipif("La" not in dict(OPEN_INFO.values()), reason="this Pillow reads no premultiplied gray")
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack((RAMP, RAMP.T, 255 - RAMP), axis=2)
HALF_SEEN = (RAMP.T.astype(int) * 37 % 256).astype(np.uint8)
HALF_SEEN[:3], HALF_SEEN[3:6] = 0, 255


def png(depth, kind, rows, chunks=(), size=(16, 16), after=()):
    """A PNG file: bit depth, colour type, rows of bytes, and chunks before and after the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = ((b"IHDR", header), *chunks, (b"IDAT", pixels), *after, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def tiff(values, bits, photometric=1, sample_format=1, extra=None, size=(16, 16), order="<", more=()):
    """An uncompressed TIFF file of one strip whose bytes are ``values``."""
    samples = len(bits)
    tags = {256: size[0], 257: size[1], 259: 1, 262: photometric, 277: samples, 278: size[1], 279: len(values), **dict(more)}
    tags[273] = 8
    arrays = {258: bits, 339: (sample_format,) * samples} | ({338: (extra,)} if extra is not None else {})
    place = 8 + len(values)
    outside = b""
    for tag, array in arrays.items():
        body = struct.pack(f"{order}{len(array)}H", *array)
        if len(body) > 4:
            tags[tag] = (3, len(array), struct.pack(f"{order}I", place + len(outside)))
            outside += body + b"\0" * (len(body) % 2)
        else:
            tags[tag] = (3, len(array), body.ljust(4, b"\0"))
    entries = b""
    for tag, value in sorted(tags.items()):
        kind, count, body = value if isinstance(value, tuple) else (4, 1, struct.pack(f"{order}I", value))
        entries += struct.pack(f"{order}HHI", tag, kind, count) + body
    directory = struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4
    beginning = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", place + len(outside))
    return beginning + values + outside + directory


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def read(folder, contents, name="picture.png"):
    """The picture as both readers, which must agree, return it: ``(H, W)`` or ``(H, W, 3)``."""
    (folder / name).write_bytes(contents)
    square, as_it_is = load_images(folder, 16)[0], read_pictures(folder, "--images")[0]
    if as_it_is.shape[1:] == (16, 16):
        assert torch.equal(square, as_it_is)
    return as_it_is.permute(1, 2, 0).squeeze(2).numpy()


def over_white(colours, alpha):
    colours, alpha = np.broadcast_arrays(colours, alpha if colours.ndim == alpha.ndim else alpha[..., None])
    return np.round((colours.astype(float) * alpha + 255.0 * (255 - alpha.astype(float))) / 255).astype(np.uint8)


EXIF_FORMATS = {
    "jpg": {"format": "JPEG", "quality": 95},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "tif": {"format": "TIFF"},
    "tiff": {"format": "TIFF", "compression": "tiff_lzw"},
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", EXIF_FORMATS)
def test_pictures_are_turned_as_their_metadata_say(suffix, orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(COLOURS[:12])
    contents = saved(image, exif=exif, **EXIF_FORMATS[suffix])
    # The oldest supported Pillow turns a TIFF twice here.
    plain = contents if suffix == "jpg" else saved(image, "PNG", exif=exif)
    with Image.open(io.BytesIO(plain)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    found = read(tmp_path, contents, f"a.{suffix}")
    assert found.shape == expected.shape == ((16, 12, 3) if orientation > 4 else (12, 16, 3))
    assert (found == expected).all()
    if orientation == 6 and suffix != "jpg":
        assert (found == np.rot90(COLOURS[:12], -1)).all()


@pytest.mark.parametrize("orientation", (3, 6))
def test_orientation_of_a_png_behind_its_pixels_or_in_xmp(orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    expected = np.rot90(RAMP, {3: 2, 6: -1}[orientation])
    rows = (tmp_path / "exif", png(8, 0, RAMP, after=((b"eXIf", exif.tobytes()[6:]),)))
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    words = (tmp_path / "xmp", png(8, 0, RAMP, ((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),)))
    for folder, contents in (rows, words):
        folder.mkdir()
        assert (read(folder, contents) == expected).all()


def test_sixteen_bits_palettes_and_alpha_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    for name, image in {
        "deep": Image.fromarray(RAMP.astype(np.uint16) * 257),
        "alpha": Image.fromarray(np.dstack((RAMP, np.full_like(RAMP, 255)))),
        "palette": Image.fromarray(RAMP).convert("P"),
        "bits": Image.fromarray(RAMP > 100),
    }.items():
        (tmp_path / name).mkdir()
        expected = np.where(RAMP > 100, 255, 0) if name == "bits" else RAMP
        assert (read(tmp_path / name, saved(image, "PNG", exif=exif)) == np.rot90(expected, -1)).all()


OPAQUE = {
    "8-bit PNG": png(8, 0, RAMP),
    "16-bit PNG": png(16, 0, (np.repeat(row, 2) for row in RAMP)),
    "16-bit TIFF": tiff((RAMP.astype("<u2") * 257).tobytes(), (16,)),
    "big-endian 16-bit TIFF": tiff((RAMP.astype(">u2") * 257).tobytes(), (16,), order=">"),
    "compressed big-endian TIFF": saved(
        Image.fromarray((RAMP.astype(np.int32) * 257).astype(">u2")), "TIFF", compression="tiff_lzw"
    ),
    "8-bit TIFF, 0 is white": tiff((255 - RAMP).tobytes(), (8,), photometric=0),
    "gray PNG with alpha": png(8, 4, np.dstack((RAMP, np.full_like(RAMP, 255))).reshape(16, -1)),
    "16-bit gray PNG with alpha": png(16, 4, np.dstack((RAMP, RAMP, np.full((16, 16, 2), 255, np.uint8))).reshape(16, -1)),
    "gray TIFF with alpha": tiff(np.dstack((RAMP, np.full_like(RAMP, 255))).tobytes(), (8, 8), extra=2),
    "palette of grays": png(8, 3, 255 - RAMP, ((b"PLTE", np.repeat(255 - RAMP.ravel(), 3).tobytes()),)),
    "unused colours": png(
        8, 3, RAMP // 2, ((b"PLTE", np.r_[np.repeat(np.arange(128), 3), [9, 0, 0]].astype(np.uint8).tobytes()),)
    ),
    "TIFF palette of grays with alpha": saved(Image.fromarray(RAMP).convert("PA"), "TIFF"),
    "BMP": saved(Image.fromarray(RAMP), "BMP"),
    "GIF": saved(Image.fromarray(RAMP), "GIF"),
    "JPEG": saved(Image.fromarray(RAMP * 0 + 77), "JPEG"),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_gray_pictures_have_one_channel(name, tmp_path):
    suffix = next(suffix for suffix in ("tif", "bmp", "gif", "jpg", "png") if suffix[:2].upper() in name or suffix == "png")
    expected = {"unused colours": RAMP // 2, "JPEG": RAMP * 0 + 77}.get(name, RAMP)
    found = read(tmp_path, OPAQUE[name], f"a.{suffix}")
    assert found.shape == (16, 16) and (found == expected).all()


def test_one_bit_and_twelve_bits(tmp_path):
    bits = np.packbits(RAMP > 100, axis=1)
    (tmp_path / "one").mkdir()
    assert (read(tmp_path / "one", png(1, 0, bits)) == np.where(RAMP > 100, 255, 0)).all()
    values = RAMP.astype(int).ravel() * 16 + 15
    pairs = np.stack((values[::2] >> 4, (values[::2] & 15) << 4 | values[1::2] >> 8, values[1::2] & 255), axis=1)
    (tmp_path / "twelve").mkdir()
    found = read(tmp_path / "twelve", tiff(pairs.astype(np.uint8).tobytes(), (12,)), "a.tif")
    assert (found.ravel() == values * 255 // 4095).all() and found.max() == 255


@pytest.mark.parametrize(
    "name, contents",
    [
        ("RGB.png", png(8, 2, COLOURS.reshape(16, -1))),
        ("same.png", png(8, 2, np.repeat(RAMP, 3, axis=1))),
        ("16-bit.png", png(16, 2, (np.repeat(row, 2) for row in COLOURS.reshape(16, -1)))),
        ("palette.png", saved(Image.fromarray(COLOURS).quantize(255), "PNG")),
        ("palette.gif", saved(Image.fromarray(COLOURS).quantize(255), "GIF")),
        ("RGB.bmp", saved(Image.fromarray(COLOURS), "BMP")),
        ("RGB.webp", saved(Image.fromarray(COLOURS), "WEBP", lossless=True)),
        ("RGB.tif", saved(Image.fromarray(COLOURS), "TIFF")),
        ("CMYK.jpg", saved(Image.fromarray(COLOURS).convert("CMYK"), "JPEG")),
        ("LAB.tif", tiff(COLOURS.tobytes(), (8, 8, 8), photometric=8)),
        ("RGB.jpg", saved(Image.fromarray(COLOURS), "JPEG")),
    ],
)
def test_colour_pictures_have_three(name, contents, tmp_path):
    with Image.open(io.BytesIO(contents)) as image:
        assert (read(tmp_path, contents, name) == np.asarray(image.convert("RGB"))).all()


def index_alpha(values):
    return (b"tRNS", bytes(values))


GRAY_PALETTE = (b"PLTE", np.repeat(np.arange(256), 3).astype(np.uint8).tobytes())
HUES = np.stack((np.arange(256), 255 - np.arange(256), np.arange(256) // 2), axis=1).astype(np.uint8)
SIXTEEN = [np.repeat(row, 2) for row in RAMP]
ONE_CLEAR = np.where(RAMP == 7, 0, 255)
FOURS, QUARTERS = RAMP >> 4, RAMP >> 6
TRANSPARENT = {
    "RGBA.png": (png(8, 6, np.dstack((COLOURS, HALF_SEEN)).reshape(16, -1)), COLOURS, HALF_SEEN),
    "RGBA.webp": (
        saved(Image.fromarray(np.dstack((COLOURS, HALF_SEEN))), "WEBP", lossless=True, exact=True),
        COLOURS,
        HALF_SEEN,
    ),
    "RGBA.tif": (tiff(np.dstack((COLOURS, HALF_SEEN)).tobytes(), (8,) * 4, 2, extra=2), COLOURS, HALF_SEEN),
    "LA.png": (png(8, 4, np.dstack((RAMP, HALF_SEEN)).reshape(16, -1)), RAMP, HALF_SEEN),
    "LA16.png": (
        png(16, 4, np.repeat(np.dstack((RAMP, HALF_SEEN)), 2, axis=2).reshape(16, -1)),
        RAMP,
        HALF_SEEN,
    ),
    "LA.tif": (tiff(np.dstack((RAMP, HALF_SEEN)).tobytes(), (8, 8), extra=2), RAMP, HALF_SEEN),
    "P-bytes.png": (png(8, 3, RAMP, ((b"PLTE", HUES.tobytes()), index_alpha(HALF_SEEN.ravel()))), HUES[RAMP], HALF_SEEN),
    "P-one.png": (png(8, 3, RAMP, ((b"PLTE", HUES.tobytes()), index_alpha([255] * 7 + [0]))), HUES[RAMP], ONE_CLEAR),
    "P-gray.png": (png(8, 3, RAMP, (GRAY_PALETTE, index_alpha(HALF_SEEN.ravel()))), RAMP, HALF_SEEN),
    "P.gif": (saved(Image.fromarray(COLOURS).quantize(255), "GIF", transparency=3), None, None),
    "L.gif": (saved(Image.fromarray(RAMP), "GIF", transparency=7, optimize=False), RAMP, ONE_CLEAR),
    "L.png": (png(8, 0, RAMP, ((b"tRNS", b"\0\7"),)), RAMP, ONE_CLEAR),
    "L4.png": (
        png(4, 0, FOURS[:, ::2] << 4 | FOURS[:, 1::2], ((b"tRNS", b"\0\3"),)),
        FOURS * 17,
        np.where(FOURS == 3, 0, 255),
    ),
    "L2.png": (
        png(
            2,
            0,
            QUARTERS[:, ::4] << 6 | QUARTERS[:, 1::4] << 4 | QUARTERS[:, 2::4] << 2 | QUARTERS[:, 3::4],
            ((b"tRNS", b"\0\1"),),
        ),
        QUARTERS * 85,
        np.where(QUARTERS == 1, 0, 255),
    ),
    "1.png": (png(1, 0, np.packbits(RAMP > 100, axis=1), ((b"tRNS", b"\0\0"),)), RAMP * 0 + 255, RAMP * 0 + 255),
    "1-white.png": (
        png(1, 0, np.packbits(RAMP > 100, axis=1), ((b"tRNS", b"\0\1"),)),
        np.where(RAMP > 100, 255, 0),
        RAMP * 0 + 255,
    ),
    "RGB.png": (
        png(8, 2, COLOURS.reshape(16, -1), ((b"tRNS", b"\0\x11\0\x11\0\xee"),)),
        COLOURS,
        np.where((COLOURS == (17, 17, 238)).all(axis=2), 0, 255),
    ),
    "16.png": (png(16, 0, SIXTEEN, ((b"tRNS", b"\7\7"),)), RAMP, ONE_CLEAR),
    "16-other.png": (png(16, 0, SIXTEEN, ((b"tRNS", b"\7\6"),)), RAMP, RAMP * 0 + 255),
    "PA.tif": (
        tiff(np.dstack((RAMP, HALF_SEEN)).tobytes(), (8, 8), 3, extra=2),
        None,
        None,
    ),
}
"""Contents, colours and alpha of pictures that are blended over white (None: as Pillow's RGBA)."""


def with_colour_map(contents):
    """Give a TIFF file of a palette its colour map, at the end of the file."""
    directory = struct.unpack_from("<I", contents, 4)[0]
    count = struct.unpack_from("<H", contents, directory)[0]
    entries = contents[directory + 2 : directory + 2 + 12 * count]
    end = directory + 2 + 12 * (count + 1) + 4
    entry = struct.pack("<HHII", 320, 3, 768, end)
    parts = sorted(
        [entries[i : i + 12] for i in range(0, len(entries), 12)] + [entry], key=lambda e: struct.unpack_from("<H", e)
    )
    colours = (HUES.T.astype("<u2") * 257).tobytes()
    return contents[:directory] + struct.pack("<H", count + 1) + b"".join(parts) + b"\0" * 4 + colours


TRANSPARENT["PA.tif"] = (with_colour_map(TRANSPARENT["PA.tif"][0]), HUES[RAMP], HALF_SEEN)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pictures_are_blended_over_white(name, tmp_path):
    contents, colours, alpha = TRANSPARENT[name]
    if colours is None:
        with Image.open(io.BytesIO(contents)) as image:
            pixels = np.asarray(image.convert("RGBA"))
        colours, alpha = pixels[..., :3], pixels[..., 3]
        assert (alpha == 0).any()
    found = read(tmp_path, contents, name)
    assert found.shape == colours.shape and (found == over_white(colours, alpha)).all()
    assert (found[alpha == 255] == colours[alpha == 255]).all() and (found[alpha == 0] == 255).all()


@pytest.mark.parametrize("channels", (pytest.param(1, marks=NEW_ENOUGH), 3))
def test_premultiplied_colours_are_blended_once(channels, tmp_path):
    """The file stores colour x alpha; over white the rest of white is added (Pillow rounds on the way to plain alpha)."""
    colours = RAMP[..., None] if channels == 1 else COLOURS
    stored = (colours.astype(int) * HALF_SEEN[..., None] // 255).astype(np.uint8)
    contents = tiff(np.dstack((stored, HALF_SEEN)).tobytes(), (8,) * (channels + 1), 1 if channels == 1 else 2, extra=1)
    found = read(tmp_path, contents, "a.tif")
    expected = (stored.astype(int) + 255 - HALF_SEEN[..., None]).squeeze()
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1


def test_pictures_that_look_alike_are_read_alike(tmp_path):
    generator = np.random.default_rng(0)
    alpha = np.zeros((16, 16, 1), np.uint8)
    alpha[4:12, 4:12] = 255
    hidden = [np.where(alpha == 255, COLOURS, generator.integers(0, 256, (16, 16, 3))) for _ in range(2)]
    for name, pixels in zip("ab", hidden, strict=True):
        Image.fromarray(np.dstack((pixels, alpha)).astype(np.uint8)).save(tmp_path / f"{name}.png")
    for images in (load_images(tmp_path, 16), read_pictures(tmp_path, "--images")):
        assert torch.equal(images[0], images[1])


FLOATS = (RAMP / 255).astype("<f4")
REFUSED = {
    "float.tif": (tiff(FLOATS.tobytes(), (32,), sample_format=3), "floating point has no known range"),
    "int32.tif": (tiff(RAMP.astype("<i4").tobytes(), (32,), sample_format=2), "no known range"),
    "uint32.tif": (tiff(RAMP.astype("<u4").tobytes(), (32,)), "no known range"),
    "int16.tif": (tiff(RAMP.astype("<i2").tobytes(), (16,), sample_format=2), "no known range"),
    "int8.tif": (tiff(RAMP.tobytes(), (8,), sample_format=2), "no known range"),
    "negative.tif": (tiff((RAMP.astype("<u2") * 257).tobytes(), (16,), photometric=0), "0 is white"),
    "deep-clear.png": (
        png(16, 2, (np.repeat(row, 2) for row in COLOURS.reshape(16, -1)), ((b"tRNS", b"\x11\x11\x11\x11\xee\xee"),)),
        "transparent colour of 16 bits",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_unknown_meaning_are_refused(name, tmp_path):
    contents, why = REFUSED[name]
    (tmp_path / name).write_bytes(contents)
    for reader in (load_images, lambda folder: read_pictures(folder, "--images")):
        with pytest.raises(InputError, match=f"{name} cannot be read .*{why}"):
            reader(tmp_path)


HUGE = {
    "a.png": png(1, 0, [b"\0" * 5000], size=(40_000, 40_000)),
    "a.gif": b"GIF89a"
    + struct.pack("<HHBBB", 40_000, 40_000, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 8, 8, 0)
    + b"\2\0;",
    "a.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "a.tif": tiff(b"\0" * 64, (8,), size=(40_000, 40_000)),
    "a.jpg": saved(Image.new("L", (8, 8)), "JPEG").replace(b"\x08\0\x08\0\x08", b"\x08\x9c\x40\x9c\x40", 1),
}


@pytest.mark.parametrize("limit_of_pillow", ("as it is", None))
@pytest.mark.parametrize("name", HUGE)
def test_too_many_pixels_are_refused_before_they_are_decoded(name, limit_of_pillow, tmp_path, monkeypatch):
    if limit_of_pillow != "as it is":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit_of_pillow)
    monkeypatch.setattr(decoding, "_raw_mode", lambda image: pytest.fail("not refused before it is decoded"))
    (tmp_path / name).write_bytes(HUGE[name])
    ours = "it has 40,000 x 40,000 pixels, more than the 134,217,728 that a picture may have"
    said = rf"{name} cannot be read \(({ours}|Image size \(1600000000 pixels\) exceeds)"
    for reader in (load_images, lambda folder: read_pictures(folder, "--images")):
        with pytest.raises(InputError, match=said):
            reader(tmp_path)
    assert PIXEL_LIMIT == 2**27


@pytest.mark.parametrize("limit_of_pillow", ("as it is", None))
def test_a_huge_canvas_of_a_webp_is_refused(limit_of_pillow, tmp_path, monkeypatch):
    if limit_of_pillow is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + (39_999).to_bytes(3, "little") * 2
    (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas)
    with pytest.raises(InputError, match="a.webp cannot be read"):
        load_images(tmp_path)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_the_limit_counts_pixels(suffix, tmp_path, monkeypatch):
    Image.new("L", (18, 17), 99).save(tmp_path / f"a{suffix}")
    monkeypatch.setattr(decoding, "PIXEL_LIMIT", 18 * 17)
    assert load_images(tmp_path, 8, 1).shape == (1, 1, 8, 8) and read_pictures(tmp_path, "--images").shape[2:] == (17, 18)
    monkeypatch.setattr(decoding, "PIXEL_LIMIT", 18 * 17 - 1)
    with pytest.raises(InputError, match="18 x 17 pixels, more than the 305 "):
        load_images(tmp_path)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(touched) (w) file closefile showpage\n%%EOF\n"


class Harm:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_files_of_other_formats_are_refused_and_run_nothing(suffix, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, *arguments, **_: started.append(arguments))
    others = {
        "eps": POSTSCRIPT,
        "pickle": pickle.dumps(Harm(tmp_path / "harmed")),
        "text": b"<html>404 Not Found</html>",
        "ppm": b"P5 16 16 255\n" + RAMP.tobytes(),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "empty": b"",
        "short": b"II",
    }
    reasons = {"pointer": "git lfs pull", "empty": "it is empty", "short": ""}
    for name, contents in others.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"a{suffix}").write_bytes(contents)
        for reader in (load_images, lambda folder: read_pictures(folder, "--images")):
            with pytest.raises(InputError, match=f"a{suffix} cannot be read .*{reasons.get(name, 'it is no PNG, JPEG')}"):
                reader(folder)
    assert not started and not (tmp_path / "harmed").exists()


def test_a_picture_under_another_pictures_suffix_is_read(tmp_path):
    assert (read(tmp_path, saved(Image.fromarray(RAMP), "BMP"), "a.JPG") == RAMP).all()


@pytest.mark.parametrize("chunk", ("zTXt", "iTXt", "iCCP"))
def test_text_that_unpacks_to_megabytes_is_refused(chunk, tmp_path):
    packed = zlib.compress(b"\0" * 2**26)
    body = b"key\0\1\0\0\0" + packed if chunk == "iTXt" else b"key\0\0" + packed
    (tmp_path / "bomb.png").write_bytes(png(8, 0, RAMP, ((chunk.encode(), body),)))
    with pytest.raises(InputError, match="bomb.png cannot be read .*(?i:too large)"):
        load_images(tmp_path)


def test_pixels_that_unpack_to_more_than_the_picture_are_left(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(8, 0, [*RAMP, b"\0" * 2**26]))
    assert (load_images(tmp_path, 16)[0, 0].numpy() == RAMP).all()


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for reader in (load_images, lambda folder: read_pictures(folder, "--images")):
        with pytest.raises(InputError, match="a.png is not a regular file"):
            reader(tmp_path)


def test_a_strip_whose_place_is_a_fraction(tmp_path):
    contents = tiff(RAMP.tobytes(), (8,))
    entry = struct.pack("<HHI", 273, 4, 1)
    assert entry in contents
    (tmp_path / "damaged.tif").write_bytes(contents.replace(entry, struct.pack("<HHI", 273, 5, 1)))
    with pytest.raises(InputError, match="damaged.tif cannot be read"):
        load_images(tmp_path, 16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "MPO"))
def test_damaged_files_are_named_whatever_is_damaged(format, tmp_path):
    """Bytes changed, removed or inserted anywhere give an image or the error that names the file."""
    exif = Image.Exif()
    exif[274] = 6
    image = Image.fromarray(RAMP if format in ("GIF", "BMP") else COLOURS)
    options = {} if format in ("GIF", "BMP") else {"exif": exif}
    if format == "MPO":
        options |= {"save_all": True, "append_images": [image]}
    whole, generator, refused = saved(image, format, **options), random.Random(0), 0
    path = tmp_path / "damaged.png"
    for _ in range(300):
        contents = bytearray(whole)
        for _ in range(generator.choice((1, 2, 8))):
            place = generator.randrange(min(len(contents), generator.choice((64, len(contents)))))
            if generator.random() < 0.1:
                del contents[place : place + generator.choice((1, 4, 1000))]
            contents[place : place + 1] = generator.randbytes(generator.choice((1, 1, 2)))
        path.write_bytes(contents)
        try:
            decoding.open_picture(path)
        except InputError as error:
            assert "damaged.png cannot be read" in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "error", (TypeError, KeyError, EOFError, zlib.error, struct.error, RecursionError, OverflowError, IndexError)
)
def test_any_error_while_a_picture_is_read_names_it(error, tmp_path, monkeypatch):
    def broken(image):
        raise error("inside")

    monkeypatch.setattr(decoding, "_raw_mode", broken)
    (tmp_path / "a.png").write_bytes(png(8, 0, RAMP))
    with pytest.raises(InputError, match="a.png cannot be read .*inside"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    "error, passed, said", [(KeyboardInterrupt, KeyboardInterrupt, ""), (MemoryError, InputError, "a.png cannot .*memory")]
)
def test_errors_that_are_not_the_pictures_pass(error, passed, said, tmp_path, monkeypatch):
    """The picture may be the cause of a lack of memory, so its name is given."""

    def broken(image):
        raise error

    monkeypatch.setattr(decoding, "_raw_mode", broken)
    (tmp_path / "a.png").write_bytes(png(8, 0, RAMP))
    with pytest.raises(passed, match=said):
        load_images(tmp_path)
