"""Damage to the bytes of a file, and to what they say, drawn from a generator: equal draws give equal damage."""

import json
import math
import struct

ODD_NUMBERS = (0, -1, 1, 2, 3, 0.5, -0.5, 7, 255, 256, 2**31, 2**63, 10**30, -(10**30), 1e300, math.nan, math.inf, -math.inf)
ODD_TEXTS = ("", "x", "\u0000", "\u2603\U0001f600", "../x", "nan", "1e400", "0x10", "a" * 5000, "\ud800", "<b>", "$x$", "%s{}")
ODD_VALUES = (None, True, False, [], {}, [[8]], [None], {"a": {"b": []}}, *ODD_NUMBERS, *ODD_TEXTS)
ODD_CELLS = (
    *ODD_NUMBERS,
    "",
    "x",
    "\u0000",
    "\u2603",
    "nan",
    "1e400",
    "a" * 5000,
    " 1",
    "1 ",
    '"1"',
    "1,5",
    "1\n2",
    "\r",
    "1_0",
)
RAW = ("1e400", "-1e400", "1E999999", "01", "+1", "1_000", "0x1F", "Infinity", "'x'", "1e-400", "9" * 400, "[" * 3000, "")
"""Values in JSON's place that are none, or that no float64 holds."""


def truncated(draw, data):
    """The beginning: nothing, a few bytes, all but a few, or a part of any length."""
    lengths = (0, draw.randrange(min(len(data), 64) + 1), max(0, len(data) - 1 - draw.randrange(64)), draw.randrange(len(data)))
    return data[: draw.choice(lengths)]


def bits_flipped(draw, data):
    """One to many flipped bits, half of the time all of them near the beginning."""
    data, end = bytearray(data), draw.choice((len(data), min(len(data), 256)))
    for _ in range(draw.choice((1, 1, 1, 2, 8, 64))):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(data)


def block_overwritten(draw, data):
    """A block of zeros, of ones, or of anything, as a bad sector leaves it."""
    size = draw.choice((1, 4, 16, 64, 512, 4096))
    place = draw.randrange(len(data))
    block = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))[: len(data) - place]
    return data[:place] + block + data[place + len(block) :]


def blocks_swapped(draw, data):
    """Two blocks of equal size in each other's place."""
    size = draw.choice((1, 4, 16, 64, 512))
    if len(data) < 2 * size:
        return data[::-1]
    a = draw.randrange(len(data) - 2 * size + 1)
    b = draw.randrange(a + size, len(data) - size + 1)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def tail_doubled(draw, data):
    """The last bytes twice."""
    return data + data[-draw.choice((1, 2, 8, 64, 512, len(data))) :]


def bytes_inserted(draw, data):
    """Bytes that were not there, anywhere."""
    place, size = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 8, 100))
    return data[:place] + draw.choice((bytes(size), b" " * size, b"\n" * size, draw.randbytes(size))) + data[place:]


BYTES = (truncated, bits_flipped, block_overwritten, blocks_swapped, tail_doubled, bytes_inserted)


def key_changed(draw, data):
    """JSON of which an object lacks a key, has one more, one of another name, or one twice."""
    value = json.loads(data)
    holder = draw.choice([node for node in _nodes(value) if isinstance(node, dict) and node])
    key, way = draw.choice(sorted(holder)), draw.randrange(4)
    if way == 3:
        # Twice in the text, with another value the first or the second time.
        members = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in holder.items()]
        members.insert(draw.randrange(len(members) + 1), f"{json.dumps(key)}: {json.dumps(draw.choice(ODD_VALUES))}")
        return _with_raw(value, holder, "{" + ", ".join(members) + "}")
    taken = holder.pop(key)
    if way == 1:
        holder |= {key: taken, draw.choice(("x", "", "_y", "__metadata__", "constructor", "\u2603")): draw.choice(ODD_VALUES)}
    elif way == 2:
        holder[draw.choice((key[:-1], key.upper(), key + "_", key[::-1]))] = taken
    return _text(value)


def value_changed(draw, data):
    """JSON with one value of another type or size, with two values swapped, or a value that is no JSON."""
    value = json.loads(data)
    holders = [node for node in _nodes(value) if node and isinstance(node, (dict, list))]
    holder = draw.choice(holders)
    key = draw.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    way, now = draw.randrange(6), holder[key]
    if way == 0:
        holder[key] = _RAW
        return _text(value).replace(json.dumps(_RAW).encode(), draw.choice(RAW).encode())
    if way == 1:
        other = draw.choice(holders)
        other_key = draw.choice(sorted(other) if isinstance(other, dict) else range(len(other)))
        other_value = other[other_key]
        if not _within(now, other) and not _within(other_value, holder):
            holder[key], other[other_key] = other_value, now
    elif way == 2 and isinstance(now, (int, float)):
        holder[key] = draw.choice((now + 1, now - 1, now * 2, -now, float(now), now * 1.01, str(now), [now], now * 10**20))
    elif way == 3 and isinstance(now, list):
        holder[key] = draw.choice((now[:-1], now * 2, now[::-1], [*now, *now[:1]], [str(part) for part in now], now * 500))
    else:
        holder[key] = draw.choice(ODD_VALUES)
    return _text(value)


_RAW = "raw value here"


def _nodes(value):
    yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(part)


def _within(value, holder):
    return any(node is holder for node in _nodes(value))


def _text(value):
    return json.dumps(value, indent=1).encode()


def _with_raw(value, holder, text):
    marker = dict(holder)
    holder.clear()
    holder[_RAW] = None
    whole = json.dumps(value)
    holder.clear()
    holder |= marker
    return whole.replace(json.dumps({_RAW: None}), text).encode()


def line_changed(draw, data):
    """TOML with a line dropped, doubled, or with another value."""
    lines = data.decode().splitlines()
    i, way = draw.randrange(len(lines)), draw.randrange(3)
    name = lines[i].partition("=")[0]
    if way == 0:
        del lines[i]
    else:
        value = draw.choice((*RAW, "inf", "nan", "-1", "1.0", "true", '""', "[1, 2]", "{a = 1}", "1979-05-27", "0o17", '"x"'))
        lines[i if way == 1 else len(lines) :] = [f"{name}= {value}", *(lines[i + 1 :] if way == 1 else [])]
    return "\n".join(lines).encode() + b"\n"


def cell_changed(draw, data):
    """A table with another cell, a row more or less, rows in another order, a row of fewer or more cells, or other titles."""
    lines = data.decode().splitlines()
    i, way = draw.randrange(len(lines)), draw.randrange(6)
    cells = lines[i].split(",")
    j = draw.randrange(len(cells))
    if way < 2:
        cells[j] = str(draw.choice(ODD_CELLS))
        lines[i] = ",".join(cells)
    elif way == 2:
        del lines[i]
    elif way == 3:
        lines.insert(draw.randrange(len(lines) + 1), lines[i])
    elif way == 4:
        draw.shuffle(lines)
    else:
        lines[i] = ",".join(draw.choice((cells[:-1], cells + ["1"], cells[::-1])))
    return ("\n".join(lines) + "\n").encode()


def header_changed(draw, data):
    """A safetensors file whose header says other offsets, dtypes, shapes, names or metadata, or has another length."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = sorted(set(header) - {"__metadata__"})
    name, other, way = draw.choice(names), draw.choice(names), draw.randrange(9)
    entry = header[name]
    if way == 0:
        entry["data_offsets"] = draw.choice((header[other]["data_offsets"], [0, 2**62], [-1, 3], [8, 0], [0], None, ["0", "4"]))
    elif way == 1:
        entry["dtype"] = draw.choice(("F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F128", "", 3, None))
    elif way == 2:
        shape = entry["shape"]
        entry["shape"] = draw.choice((shape[::-1], [1, *shape], [math.prod(shape)], [-1], [2**40], [0], shape[1:], None, "x"))
    elif way == 3:
        header[name], header[other] = header[other], header[name]
    elif way == 4:
        header[draw.choice((name + "x", name[:-1], "", "\u2603", other))] = header.pop(name)
    elif way == 5:
        del header[name]
    elif way == 6:
        return data[:8] + key_changed(draw, json.dumps(header).encode()).ljust(size)[:size] + body
    elif way == 7:
        length = draw.choice((0, 1, size - 1, size + 1, size + 8, 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + data[8:]
    else:
        found = header.get("__metadata__", {})
        changed = draw.choice((None, {}, {"format": "tf"}, {"format": 3}, {**found, "x": "y"}, *_altered(draw, found)))
        header["__metadata__"] = changed
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _altered(draw, metadata):
    """Metadata of which one text, JSON inside, is changed."""
    texts = [name for name, text in metadata.items() if isinstance(text, str) and text.startswith("{")]
    return [{**metadata, name: value_changed(draw, metadata[name].encode()).decode()} for name in texts * 6]


STRUCTURES = {
    "json": (key_changed, value_changed),
    "toml": (line_changed,),
    "csv": (cell_changed,),
    "safetensors": (header_changed,),
    "image": (),
    "pickle": (),
}
"""Changes of a file's sense, by its format."""

OTHERS = ("another file's contents", "another kind's contents")


def mutations(form, has_other=True):
    """Names of the mutations of files of a format, in order; ``has_other``: there is another file of the kind."""
    # Changes of the sense come twice: they leave a file that is closest to a right one.
    return [*(f.__name__.replace("_", " ") for f in BYTES + 2 * STRUCTURES[form]), *OTHERS[0 if has_other else 1 :]]


def damage(draw, data, form, mutation, others):
    """``(mutation, bytes)``: a file of a format after a mutation, or after another one where that changes nothing.

    ``others``: contents of another file of its kind, and of a file of another kind.
    """
    choice = mutations(form)
    while True:
        damaged = _mutated(draw, data, form, mutation, others)
        if _says(damaged, form) != _says(data, form):
            return mutation, damaged
        # The other file may be its equal, and an object may have one key alone.
        mutation = draw.choice(choice)


def _mutated(draw, data, form, mutation, others):
    if mutation in OTHERS:
        return others[OTHERS.index(mutation)]
    functions = {f.__name__.replace("_", " "): f for f in BYTES + STRUCTURES[form]}
    return functions[mutation](draw, data)


def _says(data, form):
    """JSON's values in their order, and the bytes of all else: JSON that is laid out another way is not damaged."""
    try:
        return repr(json.loads(data, object_pairs_hook=list)) if form == "json" else data
    except (ValueError, RecursionError):
        return data
