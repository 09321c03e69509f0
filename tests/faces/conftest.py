"""Checkpoints of TensorFlow (V2) and of PyTorch, written without either and without the code that reads them."""

import struct
import zipfile

import numpy as np
import pytest

CODES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int8": 6, "int64": 9, "bool": 10, "float16": 19}
TABLE = np.arange(256, dtype=np.uint64)
for _ in range(8):
    TABLE = np.where(TABLE & np.uint64(1), (TABLE >> np.uint64(1)) ^ np.uint64(0x82F63B78), TABLE >> np.uint64(1))
TABLE = TABLE.tolist()


def masked_crc(data):
    """CRC-32C byte by byte, rotated by 15 bits, plus LevelDB's constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value):
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def message(**fields):
    """A protocol buffer of integers, bytes, and 4-byte integers (given as a list)."""
    found = b""
    for name, value in fields.items():
        number = int(name[1:])
        if isinstance(value, bytes):
            found += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, list):
            found += varint(number << 3 | 5) + value[0].to_bytes(4, "little")
        elif value:
            found += varint(number << 3) + varint(value)
    return found


def block(pairs):
    """A block of LevelDB, whose keys leave out what they share with the key before."""
    found, before = b"", b""
    for key, value in pairs:
        kept = 0
        while kept < min(len(before), len(key)) and before[kept] == key[kept]:
            kept += 1
        found += varint(kept) + varint(len(key) - kept) + varint(len(value)) + key[kept:] + value
        before = key
    return found + bytes(4) + (1).to_bytes(4, "little")


def table(pairs, size=40):
    """A table of LevelDB with blocks of a few keys."""
    found, handles = b"", []

    def add(content):
        nonlocal found
        handle = varint(len(found)) + varint(len(content))
        found += content + b"\0" + masked_crc(content + b"\0").to_bytes(4, "little")
        return handle

    pairs = sorted(pairs.items())
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        handles.append((part[-1][0], add(block(part))))
    filters = add(block([]))
    footer = filters + add(block(handles))
    return found + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


@pytest.fixture(scope="session")
def write_checkpoint():
    """Write `{name: array}` as the checkpoint of a prefix."""

    def write(prefix, arrays, **header):
        entries = {b"": message(f1=header.get("shards", 1), f2=header.get("big_endian", 0))}
        parts, offset = [], 0
        for name, value in sorted(arrays.items()):
            value = np.asarray(value)
            raw = value.tobytes()
            # A dimension of size 0 would be an empty message.
            shape = b"".join(message(f2=message(f1=size)) for size in value.shape)
            place = {"f4": offset, "f5": len(raw), "f6": [masked_crc(raw)]}
            entries[name.encode()] = message(f1=CODES[str(value.dtype)], f2=shape, **place)
            parts.append(raw)
            offset += len(raw)
        prefix.with_name(prefix.name + ".index").write_bytes(table(entries))
        prefix.with_name(prefix.name + ".data-00000-of-00001").write_bytes(b"".join(parts))
        return prefix

    return write


STORAGES = {"float32": "FloatStorage", "uint8": "ByteStorage", "int64": "LongStorage"}


def pickled(value, storages, legacy):
    """The operations of pickle that make a tree of dicts, lists, texts, numbers and tensors."""
    make = lambda part: pickled(part, storages, legacy)  # noqa: E731
    if isinstance(value, dict):
        return b"}" + b"".join(make(key) + make(inner) + b"s" for key, inner in value.items())
    if isinstance(value, list):
        return b"]" + b"".join(make(inner) + b"a" for inner in value)
    if isinstance(value, tuple):
        return b"(" + b"".join(map(make, value)) + b"t"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, int) and not isinstance(value, bool):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, np.ndarray):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    key = str(len(storages))
    # A broadcast array is a view of one value.
    storages[key] = stored = value if all(value.strides) else value[(0,) * value.ndim].reshape(1)
    kind = b"ctorch\n" + STORAGES[str(value.dtype)].encode() + b"\n"
    place = make(("storage", kind, key, "cpu", stored.size, *([None] if legacy else []))) + b"Q"
    strides = tuple(step // value.itemsize for step in value.strides)
    hooks = b"ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + make((place, 0, value.shape, strides, False, hooks)) + b"R"
    return b"ctorch._utils\n_rebuild_parameter\n" + make((tensor, True, hooks)) + b"R"


@pytest.fixture(scope="session")
def write_torch():
    """Write a tree as `torch.save` writes it, every tensor as a parameter; bytes are operations of pickle."""

    def write(path, tree, legacy=False):
        storages = {}
        program = b"\x80\x02" + pickled(tree, storages, legacy) + b"."
        if not legacy:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", program)
                for key, array in storages.items():
                    archive.writestr(f"archive/data/{key}", array.tobytes())
            return path
        magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
        parts = [magic, *(b"\x80\x02" + pickled(part, {}, True) + b"." for part in (1001, {"little_endian": True}))]
        keys = b"\x80\x02" + pickled(list(storages), {}, True) + b"."
        values = [array.size.to_bytes(8, "little") + array.tobytes() for array in storages.values()]
        path.write_bytes(b"".join([*parts, program, keys, *values]))
        return path

    return write
