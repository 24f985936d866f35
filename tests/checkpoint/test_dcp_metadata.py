"""Hostile `.metadata` of torch.distributed.checkpoint folders: nothing is called, and parts must tile their tensors."""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from esdtool.checkpoint import open_checkpoint
from esdtool.checkpoint.dcp.metadata import _misfit
from esdtool.checkpoint.formats.torch_save.plain_pickle import CallsCodeError, Instance, PickleError, Symbol, load_plain
from esdtool.errors import CheckpointError
from tests.checkpoint.messages import message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "torch.distributed is unavailable": on purpose
        dcp.save({"w.weight": torch.arange(12.0).reshape(4, 3)}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def change(folder: Path, edit) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata, metadata.state_dict_metadata["w.weight"])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def call(*names: str, argument: str) -> bytes:
    """A pickle that calls a function with the name of the next, and the last with `argument`."""
    calls = b"".join(b"(S'" + name.encode() + b"'\ntR" for name in (*names[1:], argument))
    return b"c" + names[0].replace(" ", "\n").encode() + b"\n" + calls + b"."


@pytest.mark.parametrize(
    "names",
    [
        ["torch.serialization _get_layout", "torch._import_dotted_name", "os.mkdir"],
        ["torch.serialization _get_layout", "torch.save"],
        ["torch.distributed.checkpoint.metadata StorageMeta", "os.mkdir"],
        ["torch._C _import_dotted_name", "os.mkdir"],
        ["os mkdir"],
        ["builtins getattr"],
        ["pathlib PosixPath.mkdir"],
        ["torch Size.__init__"],
    ],
)
def test_calls_are_refused_and_not_made(tmp_path, names):
    marker = tmp_path / "made"
    (tmp_path / ".metadata").write_bytes(call(*names, argument=str(marker)))
    assert message(tmp_path).startswith(f"{tmp_path / '.metadata'}: ")
    assert not marker.exists()


def test_nothing_of_what_is_admitted_is_looked_up():
    """Whatever symbols a stream may name, calls of them stay records."""
    symbols = [Symbol("os", "mkdir"), Symbol("torch", "save"), Symbol("nowhere", "at_all")]
    for symbol in symbols:
        stream = call(f"{symbol.module} {symbol.name}", argument="/nowhere")
        value = load_plain(stream, symbols)
        assert isinstance(value, Instance)
        assert (value.symbol, value.arguments) == (symbol, ("/nowhere",))
        with pytest.raises(CallsCodeError):
            load_plain(stream, [])


def test_plain_values_are_those_of_the_standard_library():
    nested = {"a": {"b": [{}]}}
    tree = {
        "text": "\u00e9", "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, True, None], 3: [(0, "x")],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], (1, "a"): 2, "shared": [nested, nested],
    }  # fmt: skip
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        # Before protocol 3 bytes are spelled as a call of a codec.
        data = pickle.dumps(tree | ({"bytes": b"\0x"} if protocol > 2 else {}), protocol)
        value = load_plain(io.BytesIO(data), [])
        assert value == pickle.loads(data)
        assert value["shared"][0] is value["shared"][1]


def test_damaged_streams_are_one_kind_of_error():
    generator = random.Random(0)
    content = pickle.dumps({"a": [1, "x", (2.5, None)], "b": {"c": b"d"}}, 4)
    for _ in range(3000):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 2, 6])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        with contextlib.suppress(PickleError):
            load_plain(bytes(damaged), [])


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02}r\xff\xff\xff\x0f.",  # a memo of 2^28 places
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"p" + b"9" * 30 + b"\n.",
        b"I" + b"9" * 5000 + b"\n.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # text of 2^63 bytes
        b"\x80\x04\x8b\xff\xff\xff\x7f.",  # a number of 2^31 bytes
        b"(" * 100_000,
        b")" + b"\x85" * 100_000 + b".",
    ],
    ids=["memo", "longer memo", "memo of a long number", "digits", "long digits", "text", "number", "marks", "tuples"],
)
def test_sizes_are_not_believed(tmp_path, stream):
    (tmp_path / ".metadata").write_bytes(stream)
    assert message(tmp_path).startswith(f"{tmp_path / '.metadata'}: not the metadata of torch.distributed.checkpoint")


def shared(depth: int) -> tuple:
    value: tuple = ("ab",)
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    "edit",
    [
        lambda metadata, _: setattr(metadata, "planner_data", {"w.weight": (shared(60), "weight")}),
        lambda metadata, _: setattr(metadata, "planner_data", {"w.weight": ("a",) * 10_000}),
        lambda _, stored: setattr(stored, "size", torch.Size([4] * 17)),
        lambda _, stored: setattr(stored, "chunks", shared(60)),
        lambda _, stored: setattr(stored.properties, "dtype", "float32"),
        lambda metadata, _: setattr(metadata, "storage_data", None),
        lambda metadata, _: metadata.state_dict_metadata.update({"other": shared(60)}),
    ],
)
def test_records_of_wrong_types_are_damage(folder, edit):
    change(folder, edit)
    assert message(folder).startswith(f"{folder / '.metadata'}: not the metadata of torch.distributed.checkpoint")


def part(offsets, sizes) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    ("size", "parts", "expected"),
    [
        ((4, 3), [((0, 0), (2, 3))] * 2, "damaged: its saved parts overlap"),
        ((4, 3), [((0, 0), (2, 3)), ((1, 0), (3, 3))], "damaged: its saved parts overlap"),
        ((3, 4), [((0, 0), (4, 3))], "damaged: a part [4, 3] at [0, 0] sticks out of [3, 4]"),
        ((4, 3), [((1, 0), (4, 3))], "damaged: a part [4, 3] at [1, 0] sticks out of [4, 3]"),
        ((12,), [((0, 0), (4, 3))], "damaged: a part [4, 3] at [0, 0] sticks out of [12]"),
        ((8, 3), [((0, 0), (4, 3))], "only 12 of 24 elements were saved; the checkpoint is incomplete"),
    ],
)
def test_parts_that_do_not_tile_their_tensor(folder, size, parts, expected):
    def edit(metadata, stored):
        stored.size, stored.chunks = torch.Size(size), [part(*one) for one in parts]

    change(folder, edit)
    assert message(folder) == f"{folder / '.metadata'}: tensor 'w.weight': {expected}"


def test_tiling_is_decided_as_by_counting():
    """The oracle counts for each element in how many boxes it lies."""
    generator = random.Random(0)
    seen = set()
    for _ in range(3000):
        shape = tuple(generator.randrange(1, 4) for _ in range(generator.randrange(4)))
        cuts = [sorted({0, length, *generator.choices(range(length + 1), k=1)}) for length in shape]
        boxes = [
            (tuple(start for start, _ in box), tuple(stop - start for start, stop in box))
            for box in itertools.product(*(list(itertools.pairwise(axis)) for axis in cuts))
        ]
        if boxes and shape and generator.random() < 0.7:
            spot = generator.randrange(len(boxes))
            boxes[spot] = tuple(
                tuple(max(0, number + generator.choice([-1, 0, 0, 1])) for number in numbers) for numbers in boxes[spot]
            )
        inside = all(o + s <= n for offsets, sizes in boxes for o, s, n in zip(offsets, sizes, shape, strict=True))
        counts = np.zeros(shape, dtype=int)
        for offsets, sizes in boxes if inside else []:
            counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
        tiles = inside and bool((counts == 1).all())
        assert (_misfit(shape, boxes) == "") == tiles
        seen.add((inside, tiles))
    assert seen == {(True, True), (True, False), (False, False)}


def test_part_in_no_file(folder):
    change(folder, lambda metadata, _: metadata.storage_data.clear())
    assert message(folder) == (
        f"{folder / '.metadata'}: tensor 'w.weight': its part at [0, 0] lies in no file; the checkpoint is incomplete"
    )


def test_part_with_more_elements_than_bytes(folder):
    def edit(metadata, stored):
        stored.size, stored.chunks = torch.Size([2**20, 2**10]), [part((0, 0), (2**20, 2**10))]

    change(folder, edit)
    assert "in 1" in message(folder)
    assert "damaged: its part at [0, 0] is [1048576, 1024] of float32" in message(folder)


def test_parts_that_share_bytes(folder):
    def edit(metadata, stored):
        stored.size, stored.chunks = torch.Size([8, 3]), [part((0, 0), (4, 3)), part((4, 0), (4, 3))]
        (info,) = metadata.storage_data.values()
        metadata.storage_data[MetadataIndex("w.weight", torch.Size([4, 0]))] = info

    change(folder, edit)
    assert message(folder) == (
        f"{folder / '.metadata'}: tensor 'w.weight': damaged: two of its parts share bytes of __0_0.distcp"
    )


def test_part_of_another_shape(folder):
    def edit(metadata, stored):
        stored.size, stored.chunks = torch.Size([3, 4]), [part((0, 0), (3, 4))]

    change(folder, edit)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: cannot read: damaged: not the part that \.metadata"):
        checkpoint.read("w.weight")


def test_truncated_data(folder):
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    assert message(folder).startswith(f"{data}: truncated: tensor 'w.weight' ends at byte ")


def test_compressed_parts_are_refused(folder):
    def edit(metadata, _):
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["os.system"]

    change(folder, edit)
    assert "its bytes are compressed, which is not read" in message(folder)
