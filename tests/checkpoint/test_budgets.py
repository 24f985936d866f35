"""Small files that ask for much: refused before memory is taken, in every container."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import gguf
import h5py
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from esdtool.checkpoint import from_state_dict, open_checkpoint
from esdtool.checkpoint.limits import JSON_BYTES, NAME_CHARACTERS, NAME_SEGMENTS
from esdtool.errors import CheckpointError
from tests.checkpoint.gguf_files import writer_to
from tests.checkpoint.keras_arrays import normal
from tests.checkpoint.messages import message
from tests.checkpoint.onnx_files import model_of


def refusal(path: Path, name: str) -> str:
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(name)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_tensors_of_far_more_elements_than_are_stored(tmp_path):
    wide = 60_000
    one = torch.ones(1)
    crow = torch.zeros(wide + 1, dtype=torch.int64)
    made = {
        "expanded": one.expand(wide, wide),
        "coo": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), one, (wide, wide), check_invariants=True),
        "csr": torch.sparse_csr_tensor(crow, crow[:0], one[:0], (wide, wide), check_invariants=True),
    }
    path = tmp_path / "w.pt"
    for name, tensor in made.items():
        torch.save({"w": tensor}, path)
        assert f"refused: {4 * wide**2} bytes of data from" in refusal(path, "w"), name


@pytest.mark.parametrize("new_format", [True, False])
def test_tensor_that_reaches_beyond_its_storage(tmp_path, new_format):
    path = tmp_path / "w.pt"
    tensor = torch.arange(6.0).reshape(2, 3)
    torch.save({"w": tensor}, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    # The pickle has K\x02K\x03\x86 for the shape (2, 3), and K\x03K\x01\x86 for its strides.
    for old, new in ((b"K\x02K\x03\x86", b"K\x09K\x03\x86"), (b"K\x03K\x01\x86", b"K\x7fK\x01\x86")):
        assert content.count(old) == 1
        damaged = content.replace(old, new)
        if new_format:  # the archive's checksums
            with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(path, "w") as copy:
                for name in archive.namelist():
                    copy.writestr(name, archive.read(name).replace(old, new))
        else:
            path.write_bytes(damaged)
        assert "damaged: it reaches beyond the 24 bytes of its storage" in refusal(path, "w")


def test_structures_that_share_members(tmp_path):
    path = tmp_path / "w.pt"
    weight = torch.ones(2, 2)
    lists: list = []
    for _ in range(60):
        lists = [lists, lists]
    torch.save({"w": weight, "extra": lists}, path)
    assert set(open_checkpoint(path).tensors) == {"w"}
    tree: dict = {"w": weight}
    for _ in range(25):
        tree = {"a": tree, "b": tree}
    torch.save({"m": tree, "w": weight}, path)
    assert "its lists and mappings share their members" in message(path)
    circle: list = []
    circle.append(circle)
    assert set(from_state_dict({"w": weight, "extra": circle}).tensors) == {"w"}


@pytest.mark.parametrize("key", [b")" + b"\x85" * 20, b"(" * 4 + b"t" * 4, b"]", b"}"])
def test_keys_whose_hash_could_take_for_ever(tmp_path, key):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}" + key + b"Ns.")
    assert message(path).startswith(f"{path}: not a file that torch.save wrote, or damaged: ")


def test_pickle_that_inflates(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + b"N0" * 2**22 + b"}.")
        archive.writestr("w/version", b"3\n")
    assert "data.pkl: refused: 8388612 bytes of data from" in message(path)


def test_archive_that_was_packed_again(tmp_path):
    """A deflated archive of honest content is read, whatever the level."""
    tensors = {"w": torch.randn(50, 40), "b": torch.zeros(3)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    checkpoint = open_checkpoint(path)
    assert checkpoint.read("w").equal(tensors["w"])
    assert checkpoint.read_rows("w", 7, 11).equal(tensors["w"][7:11])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a" * (NAME_CHARACTERS + 1), f"name of {NAME_CHARACTERS + 1} characters"),
        ("a." * NAME_SEGMENTS + "w", "name of more than 100 segments"),
        (f"layers.{'9' * 19}.w", "a number of more than 18 digits"),
    ],
)
def test_names(tmp_path, suffix, name, expected):
    path = tmp_path / f"m{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save({name: torch.ones(2, 2)}, path)
    assert message(path).startswith(f"{path}: refused: a tensor's name")
    assert expected in message(path)
    with pytest.raises(CheckpointError, match=expected):
        from_state_dict({name: torch.ones(2, 2)})


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"hidden_size": ' + b"9" * 5000 + b"}"])
def test_json_that_is_deep_or_long(tmp_path, content):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    assert message(tmp_path).startswith(f"{tmp_path / 'config.json'}: not valid JSON: ")


def test_json_of_gigabytes(tmp_path):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(20 * 2**30)
    refused = f"refused: {20 * 2**30} bytes, more than the {JSON_BYTES} that are read of such a part"
    assert message(tmp_path) == f"{tmp_path / 'config.json'}: {refused}"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": ["llama"]}, "model_type: Input should be a valid string"),
        ({"model_type": 3}, "model_type: Input should be a valid string"),
        ({"hidden_size": "big"}, "hidden_size: Value error, not a whole number"),
        ({"text_config": {"num_attention_heads": 1.5}}, "num_attention_heads: Value error, not a whole number"),
        ({"vocab_size": 10**12}, "vocab_size: Value error, not a whole number"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"quantization_config": {"bits": "four"}}, "quantization_config.bits: Input should be a valid number"),
        ({"quantization_config": {"weight_block_size": f"{'9' * 5000}x1"}}, "quantization_config.weight_block_size"),
        ({"quantization_config": {"config_groups": {"a": 3}}}, "quantization_config.config_groups.a"),
    ],
)
def test_configuration_of_wrong_types(tmp_path, config, expected):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message(tmp_path).startswith(f"{tmp_path / 'config.json'}: {expected}")


@pytest.mark.parametrize("text", ['{"model_type": "\\ud800"}', '{"x": ["\\udfff"]}'])
def test_half_a_surrogate_pair(tmp_path, text):
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    assert message(tmp_path) == f"{tmp_path / 'config.json'}: not valid JSON: half of a surrogate pair in a text"


@pytest.mark.parametrize("field", [8, 16], ids=["tensors", "metadata"])
@pytest.mark.parametrize("size", [0, 2**34], ids=["short", "holes"])
def test_gguf_counts(tmp_path, field, size):
    path = writer_to(tmp_path)({"x": normal(4)}, sizes={"words": ["a", "b"]})
    content = bytearray(path.read_bytes())
    content[field : field + 8] = b"\xff" * 8
    path.write_bytes(content)
    if size:
        with path.open("r+b") as file:
            file.truncate(size)
    assert message(path).startswith(f"{path}: ")


def test_gguf_array_of_endless_length(tmp_path):
    path = tmp_path / "m.gguf"
    key = b"\x01\0\0\0\0\0\0\0k" + struct.pack("<IIQ", 9, 8, 2**64 - 1)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    with path.open("r+b") as file:
        file.truncate(2**34)
    assert message(path).startswith(f"{path}: damaged GGUF header: ")


def test_gguf_offsets(tmp_path):
    """As llama.cpp: aligned, in order, and one after the other."""
    write = writer_to(tmp_path)
    path = write({"a": normal(64), "b": normal(32), "c": normal(64)})
    content = path.read_bytes()
    reader = gguf.GGUFReader(path)
    fields = [int(tensor.field.parts[-1].ctypes.data - reader.data.ctypes.data) for tensor in reader.tensors]
    offsets = [struct.unpack_from("<Q", content, field)[0] for field in fields]
    assert offsets == [0, 256, 384]
    for field, offset in ((fields[1], 128), (fields[1], 260), (fields[1], 0), (fields[0], 32), (fields[2], 512)):
        changed = bytearray(content)
        struct.pack_into("<Q", changed, field, offset)
        path.write_bytes(changed)
        assert f"lies at {offset} of the data, expected" in message(path)


def test_keras_configuration_of_gigabytes(tmp_path):
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        file["layers/dense/vars/0"] = normal(6, 4)
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", weights.getvalue())
        archive.writestr("config.json", b"\0" * (JSON_BYTES + 1))
    assert "config.json: refused: " in message(path)


def test_hdf5_data_that_are_not_there(tmp_path):
    path = tmp_path / "m.h5"
    (tmp_path / "other.bin").write_bytes(bytes(4000))
    shape, where = (100_000, 100_000), "layers/dense/vars/0"
    layout = h5py.VirtualLayout((10, 10), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (10, 10))

    def filtered(file):
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((10, 10))
        plan.set_filter(301, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple((10, 10))
        h5py.h5d.create(file.create_group("layers").id, b"x", h5py.h5t.IEEE_F32LE, space, dcpl=plan)

    makers = {
        "bytes of data from 0 stored": lambda file: file.create_dataset(where, shape, "f4", chunks=(1000, 1000)),
        "chunks": lambda file: file.create_dataset(where, (2, 2), "f4", maxshape=(None, None), chunks=(9999, 9999)),
        "its data lie in another file": lambda file: file.create_dataset(
            where, (10, 10), "f4", external=[(str(tmp_path / "other.bin"), 0, 4000)]
        ),
        "refused: its data lie in another file": lambda file: file.create_virtual_dataset(where, layout),
        "compressed with filter 301": filtered,
    }  # fmt: skip
    for expected, make in makers.items():
        with h5py.File(path, "w") as file:
            make(file)
        assert expected in message(path)


def test_hdf5_links(tmp_path):
    """Links out of the file, to nowhere and in circles are passed over; a group of endless depth is refused."""
    path = tmp_path / "m.h5"
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = normal(6, 4)
    with h5py.File(path, "w") as file:
        file["layers/dense/vars/0"] = normal(6, 4)
        file["again"] = file["layers"]
        file["layers/dense/circle"] = file["layers"]
        file["model_weights"] = h5py.SoftLink("/nowhere")
        file["layers/dense_1/vars"] = h5py.ExternalLink("other.h5", "/")
        file["out"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/secret")
    assert len(open_checkpoint(path).tensors) == 1
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(2000):
            group = group.create_group("a")
        group["w"] = normal(6, 4)
    assert "nested too deeply" in message(path)


def functions(tmp_path: Path, calls: dict[str, list[str]]) -> Path:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
    built = model_of(
        [helper.make_node(next(iter(calls)), ["w"], ["y"], domain="d")], [numpy_helper.from_array(normal(2, 2), "w")]
    )
    for name, called in calls.items():
        nodes = [helper.make_node(other, ["x"], [f"y{i}"], domain="d") for i, other in enumerate(called)]
        nodes.append(helper.make_node("Identity", ["x"], ["y"]))
        built.functions.append(helper.make_function("d", name, ["x"], ["y"], nodes, opsets))
    built.opset_import.append(helper.make_opsetid("d", 1))
    path = tmp_path / "m.onnx"
    path.write_bytes(built.SerializeToString())
    return path


@pytest.mark.parametrize(
    "calls", [{"f": ["f"]}, {"f": ["g"], "g": ["f"]}, {"f": [], "g": ["h"], "h": ["i"], "i": ["g"]}]
)
def test_onnx_functions_that_call_themselves(tmp_path, calls):
    assert "a function calls itself" in message(functions(tmp_path, calls))


def test_onnx_functions_that_grow(tmp_path):
    calls = {f"f{i}": [f"f{i + 1}"] * 2 for i in range(30)} | {"f30": []}
    assert "nodes once" in message(functions(tmp_path, calls))
    few = {f"f{i}": [f"f{i + 1}"] * 2 for i in range(3)} | {"f3": []}
    assert set(open_checkpoint(functions(tmp_path, few)).tensors) == {"w"}


@pytest.mark.parametrize(
    "attributes", [{"axis": 0, "block_size": 2**40}, {"axis": 7}, {"axis": -9, "block_size": 1}, {"block_size": -1}]
)
def test_onnx_blocks_that_do_not_fit(tmp_path, attributes):
    codes = numpy_helper.from_array(np.ones((8, 6), dtype=np.int8), "c")
    scale = numpy_helper.from_array(normal(4, 3), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s"], ["w"], **attributes),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Constant", [], []),
        helper.make_node("Transpose", ["c"], []),
    ]
    path = tmp_path / "m.onnx"
    path.write_bytes(model_of(nodes, [codes, scale]).SerializeToString())
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["c"].dtype == "int8"
    assert checkpoint.read("c").shape == (8, 6)


@pytest.mark.parametrize("dims", [[2**40, 2**40], [-4], [2**62] * 3, [1] * 200])
def test_onnx_shapes(tmp_path, dims):
    proto = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(16))
    path = tmp_path / "m.onnx"
    onnx.save(model_of([helper.make_node("Identity", ["x"], ["y"])], [proto]), path)
    assert message(path).startswith(f"{path}: tensor 'w': damaged: ")


def test_pickle_protocols_of_any_number_are_read(tmp_path):
    """`torch.save` lets the user choose the protocol."""
    tensors = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    path = tmp_path / "w.pt"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        torch.save(tensors, path, pickle_protocol=protocol)
        checkpoint = open_checkpoint(path)
        assert all(checkpoint.read(name).equal(tensor) for name, tensor in tensors.items())


def test_lists_deeper_than_the_interpreter_allows(tmp_path):
    path = tmp_path / "w.pt"
    deep = b"X\x01\0\0\0z" + b"]" * 100_000 + b"a" * 99_999
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2, 2)}, buffer)
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            copy.writestr(name, content[:-1] + deep + b"s." if name.endswith("data.pkl") else content)
    assert set(open_checkpoint(path).tensors) == {"w"}
