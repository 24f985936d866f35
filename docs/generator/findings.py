"""Make the reference of findings from the rules themselves and the recorded calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esdtool.analysis.finding import Severity
from esdtool.findings.rules import load_rules
from generator.markdown import NOTICE, cell, code, table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "findings.json"

_OF_UPDATES = ("cancelling-merge", "lora-spike")
"""Rules about updates, which weights by themselves do not call for."""

INTRODUCTION = """# Findings

`esdtool analyze` says first what is wrong in a model, or worth knowing: in the terminal, in Markdown (`--format
markdown`), in HTML (`--html`) and in JSON (`--json`, key `findings`; in Python `esdtool.analyze(...).findings`).
Each finding says where it is, what was measured and how sure that is, what it usually means, what it does not
prove, and what to do. The gravest stand first. Modules that differ only in numbers share a line, so that the list
stays short for any model.

`--fail-on warning` (or `error`) ends the command with exit code 4 if there is a finding of that severity or a
graver one, so that a training pipeline can stop on it. All files are written all the same.

```sh
esdtool analyze CKPT --quiet --json analysis.json --fail-on error
```

"""

CALIBRATION = """
## How often a finding is false

`python benchmarks/findings.py CHECKPOINT ... --json benchmarks/results/findings.json` measures it:
"""

CHANCE = """
Limits that are a matter of chance (alphas and their standard errors) are set for 1 % a model, divided by the number
of its modules (Bonferroni). All other limits are sizes of an effect, several times what the sound models above
have.
"""


def page() -> str:
    """Return the whole page."""
    text = [NOTICE, INTRODUCTION, "| severity | meaning |\n|---|---|\n"]
    text += [f"| `{Severity[name].value}` | {cell(words)} |\n" for name, words in attribute_docs_of_members().items()]
    text.append("\n")
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = []
    for name, rule in load_rules().items():
        rows.append([f"[`{name}`](#{name})", cell(rule.title), _rate(name, recorded)])
    text.append(table(["rule", "finding", "false in random matrices / heavy-tailed models"], rows))
    for name, rule in load_rules().items():
        text.append(f"\n## {name}\n\n**{rule.title}.** {rule.meaning}\n\n")
        text.append(f"- Measured: {rule.evidence}\n- Not proven: {rule.caveat}\n- What to do: {rule.action}\n")
        if rule.after:
            text.append(f"- Not looked for in modules of: {', '.join(code(other) for other in sorted(rule.after))}.\n")
        text.append(f"- Sources: {'; '.join(rule.sources)}.\n")
    text += [CALIBRATION, _calibration(recorded), CHANCE]
    return "".join(text)


def attribute_docs_of_members() -> dict[str, str]:
    """Return the texts under the severities, whose assignments have no annotations."""
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(Severity))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for member, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(member.targets[0], ast.Name)
            found[member.targets[0].id] = inspect.cleandoc(str(text.value.value))
    return found


def _rate(rule: str, recorded: dict[str, Any]) -> str:
    random, planted = recorded["random"], recorded["planted"]
    if rule in _OF_UPDATES:
        updates = recorded["updates"]
        return f"{updates['found'].get(rule, 0)} of {updates['models']:,} models of {updates['modules']} random updates"
    if rule == "ks-limits":
        exact = recorded["within limits"]
        return f"{exact['found']} of {exact['models']:,} models of {exact['modules']} Pareto tails within the limits"
    false = 0 if rule == "untrained" else random["found"].get(rule, 0)
    of_random = "right in all" if rule == "untrained" else f"{false} of {random['matrices']:,}"
    if rule == "untrained" and random["found"].get(rule, 0) < random["matrices"]:
        of_random = f"missed in {random['matrices'] - random['found'].get(rule, 0)} of {random['matrices']:,}"
    return f"{of_random} / {planted['found'].get(rule, 0)} of {planted['models']:,}"


def _calibration(recorded: dict[str, Any]) -> str:
    random, planted = recorded["random"], recorded["planted"]
    false = sum(count for rule, count in random["found"].items() if rule != "untrained")
    rows = [
        [
            f"{random['matrices']:,} random matrices, each a model",
            f"`untrained` in {random['found'].get('untrained', 0):,}",
            f"{false} false",
        ],
        [
            f"{planted['models']:,} models of {planted['modules']} heavy-tailed matrices",
            "nothing is to be found",
            f"{sum(planted['found'].values())} false",
        ],
    ]
    updates = recorded["updates"]
    rows.append(
        [
            f"{updates['models']:,} merges of two models that changed {updates['modules']} matrices independently, "
            "and as many LoRA adapters of random factors",
            "nothing is to be found",
            f"{sum(updates['found'].values())} false",
        ]
    )
    for name, found in recorded["real"].items():
        words = "; ".join(f"{item['severity']} `{item['rule']}`: {', '.join(item['where'])}" for item in found)
        rows.append([f"`{name}`", cell(words) or "nothing found", ""])
    text = table(["what", "found", ""], [[*row] for row in rows])
    return "\n" + text
