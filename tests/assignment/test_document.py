"""wd.json: round trips, what is refused, other forms, and the check against a checkpoint."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from esdtool.assignment.check import check
from esdtool.assignment.document import Assignment, Default, DefaultRule, Entry
from esdtool.assignment.reading import load_assignment
from esdtool.checkpoint.base import TensorInfo
from esdtool.errors import AssignmentError, OutputError

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def _entry(decay: float, **fields: Any) -> Entry:
    described: dict[str, Any] = {"ratio": decay / 0.1, "alpha": 2.0, "role": "q_proj", "layer": 0, "shape": (8, 8)}
    return Entry(weight_decay=decay, **(described | fields))


@pytest.fixture
def assignment() -> Assignment:
    return Assignment(
        created_by="esdtool test",
        base_weight_decay=0.1,
        default=Default.of("no-decay", 0.1),
        parameters={Q: _entry(0.067), K: _entry(0.5, role="k_proj", note="a remark", alpha=None)},
        left_out={"pooler.weight": "outside"},
    )


def _written(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_round_trip(assignment: Assignment, tmp_path: Path) -> None:
    path = tmp_path / "wd.json"
    assignment.save(path)
    assert load_assignment(path) == assignment
    first = path.read_bytes()
    load_assignment(path).save(path)
    assert path.read_bytes() == first
    assert len(first.splitlines()) == 17  # one line a parameter


def test_a_json_parser_is_enough(assignment: Assignment, tmp_path: Path) -> None:
    path = tmp_path / "wd.json"
    assignment.save(path)
    decays = {name: entry["weight_decay"] for name, entry in json.loads(path.read_text())["parameters"].items()}
    assert decays == {Q: 0.067, K: 0.5} == assignment.decays


def test_only_the_decay_is_required(tmp_path: Path) -> None:
    by_hand = {
        "format": "esdtool.weight_decay",
        "version": 1,
        "base_weight_decay": 0.1,
        "parameters": {Q: {"weight_decay": 1, "colour": "red"}},
        "colour": "blue",
    }
    loaded = load_assignment(_written(tmp_path / "wd.json", by_hand))
    assert loaded.decays == {Q: 1.0}
    assert loaded.default.decay(2) is None


def test_the_schema_accepts_what_is_written(assignment: Assignment) -> None:
    schema = Assignment.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(assignment.to_json()), schema)
    broken = json.loads(assignment.to_json())
    broken["parameters"][Q]["weight_decay"] = -1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_members_of_a_fused_parameter(tmp_path: Path, assignment: Assignment) -> None:
    document = json.loads(assignment.to_json())
    document["members"] = {"experts.gate_up_proj": {"aggregate": "median", "from": ["experts.0.w1", "experts.0.w3"]}}
    loaded = load_assignment(_written(tmp_path / "wd.json", document))
    assert loaded.members["experts.gate_up_proj"].members == ("experts.0.w1", "experts.0.w3")
    assert json.loads(loaded.to_json())["members"] == document["members"]


def _broken(document: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


WEIGHT = ("parameters", Q, "weight_decay")
BAD_VALUES: list[tuple[tuple[str, ...], object, str]] = [
    (WEIGHT, float("nan"), f"{Q}: weight_decay: input should be a finite number"),
    (WEIGHT, float("inf"), f"{Q}: weight_decay: input should be a finite number"),
    (WEIGHT, 10**400, f"{Q}: weight_decay: input should be a finite number"),
    (WEIGHT, -0.1, f"{Q}: weight_decay: input should be greater than or equal to 0"),
    (WEIGHT, "0.1", f"{Q}: weight_decay: input should be a valid number"),
    (WEIGHT, True, f"{Q}: weight_decay: input should be a valid number"),
    (WEIGHT, None, f"{Q}: weight_decay: input should be a valid number"),
    (("parameters", Q, "shape"), [8.5, 8], f"{Q}: shape.0: input should be a valid integer"),
    (("parameters", Q, "ratio"), -1, f"{Q}: ratio: input should be greater"),
    (("parameters", Q), {}, f"{Q}: weight_decay: field required"),
    (("parameters", Q), 0.1, f"{Q}: input should be an object"),
    (("parameters",), [], "parameters: input should be an object"),
    (("base_weight_decay",), -1, "base_weight_decay: input should be greater"),
    (("default", "rules"), [{"match": "name=q", "weight_decay": 0}], "unknown rule 'name=q'"),
    (("default", "unlisted"), "sometimes", "default.unlisted: input should be 'keep', 'no-decay' or 'base'"),
    (("optimizer",), "sgd", "optimizer: input should be 'decoupled' or 'l2'"),
    (("version",), 3, "version 3 is not supported: this esdtool reads version 1 and 2"),
    (("version",), "1", "version '1' is not supported"),
    (("version",), True, "version True is not supported"),
    (("format",), "esdtool.analysis", 'not a weight-decay assignment (no "format": "esdtool.weight_decay")'),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), BAD_VALUES, ids=[f"{p[-1]}={str(v)[:9]}" for p, v, _ in BAD_VALUES]
)
def test_bad_values(path: tuple[str, ...], value: object, message: str, assignment: Assignment, tmp_path: Path) -> None:
    file = _written(tmp_path / "wd.json", _broken(json.loads(assignment.to_json()), path, value))
    with pytest.raises(AssignmentError) as caught:
        load_assignment(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"[1, 2]", "not a weight-decay assignment"),
    (b"{", "not valid JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"format": "esdtool.weight_decay", "format": "x"}', "'format' appears twice"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=[message for _, message in BAD_FILES])
def test_bad_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wd.json"
    path.write_bytes(content)
    with pytest.raises(AssignmentError, match=message):
        load_assignment(path)


def test_a_parameter_listed_twice(tmp_path: Path) -> None:
    path = tmp_path / "wd.json"
    path.write_text(
        '{"format": "esdtool.weight_decay", "version": 1, "base_weight_decay": 0.1,'
        '"parameters": {"a.weight": {"weight_decay": 0.1}, "a.weight": {"weight_decay": 0.2}}}'
    )
    with pytest.raises(AssignmentError, match=r"'a\.weight' appears twice"):
        load_assignment(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AssignmentError, match="No such file"):
        load_assignment(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file(
    assignment: Assignment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        assignment.save(tmp_path / "missing" / "wd.json")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    old = tmp_path / "wd.json"
    old.write_text("old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        assignment.save(old)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_other_forms(assignment: Assignment) -> None:
    rows = list(csv.DictReader(io.StringIO(assignment.to_csv())))
    assert [(row["parameter"], float(row["weight_decay"]), row["shape"]) for row in rows] == [
        (Q, 0.067, "8x8"),
        (K, 0.5, "8x8"),
    ]
    more = assignment.model_copy(update={"parameters": {**assignment.parameters, "x.weight": _entry(0.067)}})
    assert json.loads(more.to_torch_groups()) == [
        {"weight_decay": 0.067, "params": [Q, "x.weight"]},
        {"weight_decay": 0.5, "params": [K]},
    ]


@pytest.mark.parametrize(
    ("rule", "matching"),
    [("ndim<2", {0, 1}), ("ndim <= 2", {0, 1, 2}), ("ndim==2", {2}), ("ndim>=3", {3}), ("ndim>1", {2, 3})],
)
def test_rules(rule: str, matching: set[int]) -> None:
    default = Default(weight_decay=0.3, rules=(DefaultRule(match=rule, weight_decay=0.0),))
    assert {ndim for ndim in range(4) if default.decay(ndim) == 0.0} == matching
    assert {ndim for ndim in range(4) if default.decay(ndim) == 0.3} == set(range(4)) - matching


def test_another_base(assignment: Assignment) -> None:
    other = assignment.with_base(0.2)
    assert other.decays == pytest.approx({Q: 0.134, K: 1.0})
    assert other.base_weight_decay == 0.2
    based = assignment.model_copy(update={"default": Default.of("base", 0.1)}).with_base(0.2)
    assert based.default.weight_decay == 0.2
    ruled = Default(weight_decay=0.05, rules=(DefaultRule(match="ndim<2", weight_decay=0.0),))
    scaled = assignment.model_copy(update={"default": ruled}).with_base(0.2)
    assert (scaled.default.decay(2), scaled.default.decay(1)) == (0.1, 0.0)
    kept = assignment.model_copy(update={"default": Default()}).with_base(0.2)
    assert kept.default.weight_decay is None


def test_another_base_needs_ratios() -> None:
    no_ratio = Assignment(base_weight_decay=0.1, parameters={Q: Entry(weight_decay=0.2)})
    assert no_ratio.with_base(0.3).decays[Q] == pytest.approx(0.6)
    with pytest.raises(AssignmentError, match=f"{Q}: no ratio"):
        no_ratio.model_copy(update={"base_weight_decay": 0.0}).with_base(0.3)
    with pytest.raises(AssignmentError, match="not negative"):
        no_ratio.with_base(-1)


def _tensors(**shapes: tuple[int, ...]) -> list[TensorInfo]:
    known: dict[str, tuple[int, ...]] = {Q: (8, 8), K: (8, 8), "model.norm.weight": (8,), **shapes}
    return [TensorInfo(name=name, shape=shape, dtype="float32", file="f") for name, shape in known.items()]


def test_check_accepts(assignment: Assignment) -> None:
    report = check(assignment, _tensors())
    assert (report.ok, report.problem, report.matched, report.unlisted) == (True, None, (Q, K), 1)


def test_check_looks_through_wrappers(assignment: Assignment) -> None:
    wrapped = [
        TensorInfo(name=f"module._orig_mod.{tensor.name}", shape=tensor.shape, dtype="float32", file="")
        for tensor in _tensors()
    ]
    assert check(assignment, wrapped).ok


def test_check_finds(assignment: Assignment) -> None:
    shape = check(assignment, _tensors(**{K: (8, 9)}))
    assert not shape.ok
    assert shape.problem == f"{K} is 8x8 in the file, 8x9 in the model"
    unknown = check(assignment, [tensor for tensor in _tensors() if tensor.name != Q])
    assert unknown.problem == f"{Q} is not in the model"
    layer = {f"model.layers.1.self_attn.{role}_proj.weight": (8, 8) for role in "qkv"}
    uncovered = check(assignment, _tensors(**layer))
    assert uncovered.problem == "model.layers.1.self_attn.q_proj.weight of the model is not in the file (and 2 more)"
    assert check(assignment.model_copy(update={"left_out": dict.fromkeys(layer, "x")}), _tensors(**layer)).ok
    empty = check(assignment.model_copy(update={"parameters": {}}), _tensors()[2:])
    assert empty.problem == "the file lists no parameter"


def test_neither_torch_nor_numpy_is_imported() -> None:
    code = "import sys, esdtool.assignment.assign; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
