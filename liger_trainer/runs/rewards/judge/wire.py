"""Encode plain data as bytes, for messages to and from an untrusted process.

Decoding returns only built-in values of exactly these types: None, bool, int, float, complex, str,
bytes, bytearray, list, tuple, set, frozenset, dict, range, and iterators of such values.

    value   = tag count ":" payload
    payload = count bytes of text for a scalar, count values for a container
"""

import os

MAX_BYTES = 4 * 1024**2  # per message
_MAX_ITEMS = 100_000  # per iterator, which may be infinite
_HEADER = 8  # bytes of the length that precedes a message
_SCALARS = {
    b"i": lambda text: int(text, 16),
    b"f": lambda text: float.fromhex(text.decode()),
    b"s": lambda text: text.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"y": bytearray,
}
_CONTAINERS = {
    b"l": list,
    b"t": tuple,
    b"e": set,
    b"z": frozenset,
    b"d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    b"c": lambda items: complex(*items),
    b"r": lambda items: range(*items),
    b"j": iter,
}
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_CONSTANTS = {b"N": None, b"T": True, b"F": False}


def encode(value) -> bytes:
    """Return `value` as bytes; an instance of a subclass is encoded as the built-in type.

    Raises TypeError for values that are not plain data, and ValueError for too large ones.
    """
    parts = []
    try:
        _encode(value, parts)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    data = b"".join(parts)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes, more than {MAX_BYTES}")
    return data


def decode(data: bytes):
    """Return the value of `data`. Raise ValueError for bytes that `encode` does not produce."""
    try:
        value, end = _decode(data, 0)
    except (TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"not plain data: {error}") from error
    if end != len(data):
        raise ValueError("not plain data: more than one value")
    return value


def send(descriptor: int, value) -> None:
    """Write `value` as one message."""
    data = encode(value)
    data = memoryview(len(data).to_bytes(_HEADER, "big") + data)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int):
    """Read one message. Raise EOFError at the end, and ValueError for a malformed message."""
    size = int.from_bytes(_read(descriptor, _HEADER), "big")
    if size > MAX_BYTES:
        raise ValueError(f"a message of {size} bytes, more than {MAX_BYTES}")
    return decode(_read(descriptor, size))


def items_of(values) -> list:
    """Return the items of an iterable. Raise ValueError if there are too many to send."""
    items = []
    for item in values:
        items.append(item)
        if len(items) > _MAX_ITEMS:
            raise ValueError(f"an iterator of more than {_MAX_ITEMS} items")
    return items


def _read(descriptor: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.read(descriptor, min(size - len(data), 65536))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _encode(value, parts: list) -> None:
    if value is None:
        parts.append(b"N")
    elif isinstance(value, bool):
        parts.append(b"T" if value else b"F")
    elif isinstance(value, int):
        _scalar(b"i", b"%x" % value, parts)
    elif isinstance(value, float):
        _scalar(b"f", float.hex(value).encode(), parts)
    elif isinstance(value, str):
        _scalar(b"s", value.encode("utf-8", "surrogatepass"), parts)
    elif isinstance(value, (bytes, bytearray)):
        _scalar(b"b" if isinstance(value, bytes) else b"y", bytes(value), parts)
    elif isinstance(value, list):
        _container(b"l", value, parts)
    elif isinstance(value, tuple):
        _container(b"t", value, parts)
    elif isinstance(value, dict):
        _container(b"d", [part for item in value.items() for part in item], parts)
    elif isinstance(value, (set, frozenset)):
        _container(b"e" if isinstance(value, set) else b"z", list(value), parts)
    elif isinstance(value, complex):
        _container(b"c", [value.real, value.imag], parts)
    elif isinstance(value, range):
        _container(b"r", [value.start, value.stop, value.step], parts)
    elif hasattr(value, "__next__") or isinstance(value, _VIEWS):
        _container(b"j", items_of(value), parts)
    else:
        raise TypeError(type(value).__name__)


def _scalar(tag: bytes, text: bytes, parts: list) -> None:
    parts.append(b"%b%d:%b" % (tag, len(text), text))


def _container(tag: bytes, items: list, parts: list) -> None:
    parts.append(b"%b%d:" % (tag, len(items)))
    for item in items:
        _encode(item, parts)


def _decode(data: bytes, at: int):
    """Return the value that starts at `at`, and where it ends."""
    tag = data[at : at + 1]
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at + 1
    colon = data.find(b":", at, at + 12)
    if colon < 0 or not data[at + 1 : colon].isdigit():
        raise ValueError("not plain data: no length")
    count, at = int(data[at + 1 : colon]), colon + 1
    if count > len(data) - at:
        raise ValueError("not plain data: cut off")
    if tag in _SCALARS:
        return _SCALARS[tag](data[at : at + count]), at + count
    if tag not in _CONTAINERS:
        raise ValueError(f"not plain data: {tag!r}")
    items = []
    for _ in range(count):
        item, at = _decode(data, at)
        items.append(item)
    return _CONTAINERS[tag](items), at
