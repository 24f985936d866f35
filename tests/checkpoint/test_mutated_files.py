"""Damaged files of every container: a catalogue and other numbers, or one line that names the file. Nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from esdtool.checkpoint import open_checkpoint
from esdtool.errors import CheckpointError
from tests.checkpoint.samples import DATA, WRITERS

INPUTS = 150


def mutate(content: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, inserted, repeated or cut."""
    data = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 8])):
        if not data:
            break
        spot = generator.randrange(len(data))
        kind = generator.random()
        if kind < 0.6:
            data[spot] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        elif kind < 0.75:
            data[spot : spot + 8] = generator.choice([b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little")])
        elif kind < 0.85:
            data[spot:spot] = data[spot : spot + generator.randrange(1, 40)]
        else:
            del data[spot : spot + generator.randrange(1, 40)]
    return bytes(data) or b"\0"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numbers of nonsense
@pytest.mark.parametrize("container", sorted(WRITERS))
@pytest.mark.parametrize("part", ["opened", "data"])
def test_damage_is_one_line(tmp_path: Path, container: str, part: str) -> None:
    if part == "data" and container not in DATA:
        pytest.skip("one file holds all")
    path = WRITERS[container](tmp_path)
    target = path if part == "opened" else tmp_path / DATA[container]
    content = target.read_bytes()
    generator = random.Random(f"{container} {part}")
    refused: list[str] = []
    for _ in range(INPUTS):
        # Headers are at the beginning; of a zip archive also at the end.
        head = generator.randrange(64, 2048)
        changed = mutate(content[:head], generator) + content[head:]
        if generator.random() < 0.3:
            changed = content[:-head] + mutate(content[-head:], generator)
        target.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(path)
            for name, info in checkpoint.tensors.items():
                assert checkpoint.read(name).shape == info.shape
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > INPUTS // 20
    for text in refused:
        assert str(tmp_path) in text
        assert text.isprintable()
        assert "weights_only" not in text
        assert len(text) < 1000
