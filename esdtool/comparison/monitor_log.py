"""Read the JSONL file that `SpectralMonitor` writes, as analyses of the weights at each step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from esdtool.analysis.document import Analysis, Settings, Source
from esdtool.analysis.module_record import ModuleResult
from esdtool.analysis.summary import summarize
from esdtool.comparison.trajectory import Trajectory, make_trajectory
from esdtool.errors import CheckpointError
from esdtool.optim.monitor_writers import FORMAT, VERSION
from esdtool.support.json_text import JsonTextError, parse_json

Line = Mapping[str, Any]


def read_monitor_log(path: str | Path) -> dict[int, Analysis]:
    """Read the analyses of a monitor's log by step, in order; each has the numbers that were logged.

    Raises:
        CheckpointError: if the file cannot be read, is another one, or holds no reading yet.
    """
    try:
        texts = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    header: Line | None = None
    lines: dict[int, tuple[Line, Line]] = {}
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
        except JsonTextError as error:
            if number == len(texts):  # half-written when the run was killed
                continue
            raise CheckpointError(f"{path}: line {number} is not JSON: {error}") from error
        if isinstance(line, dict) and line.get("format") == FORMAT:
            header = line
            start = line.get("start_step")
            # What an attempt wrote after the state from which another one went on is void.
            lines = {step: held for step, held in lines.items() if isinstance(start, int) and step <= start}
        elif header is None or not isinstance(line, dict) or type(line.get("step")) is not int:
            raise CheckpointError(f"{path}: line {number} is no line of a SpectralMonitor's log")
        else:
            lines[line["step"]] = header, line
    if header is not None and header.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: log version {header.get('version')!r} is not supported (this esdtool reads {VERSION})"
        )
    if not lines:
        raise CheckpointError(f"{path}: no reading of a SpectralMonitor in it yet")
    try:
        return {step: _analysis(*lines[step], location=f"{path}, step {step}") for step in sorted(lines)}
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise CheckpointError(f"{path}: damaged log of a SpectralMonitor: {str(error).splitlines()[0]}") from error


def trajectory_of_log(path: str | Path) -> Trajectory:
    """Read a monitor's log as the trajectory of its readings.

    Raises:
        CheckpointError: as `read_monitor_log`.
    """
    return make_trajectory(list(read_monitor_log(path).values()))


def last_of_log(path: str | Path) -> Analysis:
    """Read the last reading of a monitor's log.

    Raises:
        CheckpointError: as `read_monitor_log`.
    """
    return list(read_monitor_log(path).values())[-1]


def _analysis(header: Line, line: Line, *, location: str) -> Analysis:
    modules = [
        ModuleResult.model_validate({**described, **_numbers(line["modules"].get(described["name"]))})
        for described in header["modules"]
    ]
    return Analysis(
        created_by=header["created_by"],
        source=Source(checkpoint=location, model_type=header["model_type"]),
        settings=Settings.model_validate(header["settings"]),
        modules=tuple(modules),
        summary=summarize(modules, num_skipped=0),
    )


def _numbers(found: Line | None) -> Line:
    return {"status": "not measured"} if found is None else found
