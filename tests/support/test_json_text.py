"""JSON of others is read or refused in one line; ours is read back by every reader."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from pydantic import BaseModel

from esdtool.support.json_text import JsonTextError, escaped, model_json, parse_json


class Named(BaseModel):
    name: str
    values: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        ('{"a": [-' + "1" * 5000 + "]}", "too many digits"),
        ("{", "line 1, column 2"),
        ("", "line 1, column 1"),
        (b"\xff\xfe\xff", "."),
        (b'{"a": "\xe9"}', "not UTF-8 text at byte 7"),
    ],
)
def test_what_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(JsonTextError, match=reason) as raised:
        parse_json(text)
    assert len(str(raised.value).splitlines()) == 1


def test_every_character_comes_back() -> None:
    # Whoever reads the text: json, and pydantic but for the lone surrogates that it refuses.
    everything = " ".join(map(chr, range(sys.maxunicode + 1)))  # apart, or two surrogates would become one character
    text = escaped(json.dumps(everything, ensure_ascii=False))
    assert json.loads(text) == everything
    assert all(unicodedata.category(character)[0] in "LMNPSZ" for character in set(text))
    paired = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    written = model_json(Named(name=paired))
    assert Named.model_validate_json(written).name == paired


def test_ordinary_documents_are_what_pydantic_writes() -> None:
    model = Named(name="größe ≤ 2", values=(1e-7, 1e16, 0.1, -0.0))
    assert model_json(model) == model.model_dump_json(indent=1) + "\n"


def test_a_name_in_bytes_that_are_no_utf8(tmp_path: object) -> None:
    model = Named(name="caf\udce9", values=(0.1, 1e-7))
    text = model_json(model)
    text.encode("utf-8")
    assert Named.model_validate(json.loads(text)) == model
