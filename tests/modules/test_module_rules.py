from __future__ import annotations

import pytest

from esdtool.modules import general
from esdtool.modules.families import load_families
from esdtool.modules.rules import Fused, Stacked, compile_pattern, matches, score


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("mlp.fc1", "layers.0.mlp.fc1", True),
        ("mlp.fc1", "mlp.fc1", True),
        ("mlp.fc1", "layers.0.xmlp.fc1", False),
        ("mlp.fc1", "layers.0.mlp.fc1.linear", False),
        ("self_attn|attn.out_proj", "h.0.attn.out_proj", True),
        ("self_attn|attn.out_proj", "h.0.cross.out_proj", False),
        ("*_norm", "h.0.q_norm", True),
        ("*_norm", "h.0.q_norm.linear", False),
        ("h.*.c_fc", "h.0.c_fc", True),
        ("h.*.c_fc", "h.0.mlp.c_fc", False),
        ("layers.#.fc1", "layers.12.fc1", True),
        ("layers.#.fc1", "layers.mlp.fc1", False),
        ("expert_#.wi", "experts.expert_12.wi", True),
        ("embeddings.**", "bert.embeddings.word_embeddings", True),
        ("embeddings.**", "backbone.embeddings", True),
        ("embeddings.**", "bert.my_embeddings.word", False),
        ("^output", "output", True),
        ("^output", "model.output", True),
        ("^output", "model.layers.0.output", False),
        ("^model", "model", True),
        ("a+b", "x.a+b", True),
    ],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert matches(score(pattern, "role"), tuple(path.split("."))) is expected


@pytest.mark.parametrize("pattern", ["", "a..b", "**", "**.a", "a.**.b", "^", "a."])
def test_bad_patterns_are_rejected(pattern: str) -> None:
    with pytest.raises(ValueError, match="bad pattern"):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (Fused(parts=("k_proj", "v_proj")), "fused: k_proj and v_proj in one tensor"),
        (Fused(parts=("q_proj", "k_proj", "v_proj")), "fused: q_proj, k_proj and v_proj in one tensor"),
        (Stacked(parts=("down_proj",)), "stacked: down_proj of all experts in one tensor"),
        (Stacked(parts=("gate_proj", "up_proj")), "stacked: fused gate_proj and up_proj of all experts in one tensor"),
    ],
)
def test_reasons_are_words(verdict: Fused | Stacked, reason: str) -> None:
    assert verdict.reason == reason


def test_every_family_file_is_found_and_gated_tables_come_first() -> None:
    families = load_families()
    assert {"bert", "mamba", "rwkv", "qwen1", "olmo1", "modernbert"} <= {family.name for family in families}
    gated = [bool(family.model_types) for family in families]
    assert gated == sorted(gated, reverse=True)
    for family in families:
        assert family.rules
        assert family.marker is None or compile_pattern(family.marker)
        assert (family.marker is None) or family.model_types, f"{family.name}: a marker needs model_types"


def test_no_table_states_a_pattern_twice() -> None:
    tables = [general.COMPANIONS, general.NOT_SCORED, general.MANY_IN_ONE, general.ROLES]
    for rules in [*tables, *(family.rules for family in load_families())]:
        stated = [(rule.pattern, rule.beside) for rule in rules]
        assert len(stated) == len(set(stated))
