"""How often the rules about data speak of networks that are well: from the repository's root,

    PYTHONPATH=src:tests python tests/probes/health/false_alarms.py [--seeds 5] [--first 0]

trains an MLP and a convolutional network with batches of 32, 60 and 128 on scikit-learn's digits, diagnoses each on
batches of its training data and of others, and prints what was found and how near the measures came to thresholds.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from batchnorm.probes.health import Subject, diagnose, rules
from batchnorm.probes.health.disagreement import APART
from batchnorm.probes.health.stale import stale
from batchnorm.probes.health.survey import Survey
from oracles.digits import batches, convnet, mlp, train


def main(seeds: range) -> None:
    torch.set_num_threads(1)
    data_rules = [rule.code for rule in rules() if rule.code.startswith("BN3")]
    found: Counter[str] = Counter()
    trainings = diagnoses = 0
    share = ratio = ratio_of_large = between = dead = 0.0
    for make in (mlp, convnet):
        for size in (32, 60, 128):
            for seed in seeds:
                torch.manual_seed(seed)
                model = train(make(), 300, size, seed=seed)
                trainings += 1
                for held_out in (False, True):
                    data = batches(size, min(8, (597 if held_out else 1200) // size), seed, held_out)
                    diagnosis = diagnose(model, data, select=data_rules)
                    diagnoses += 1
                    found.update(diagnosis.codes)
                    for finding in diagnosis:
                        print(f"{make.__name__}, batch {size}, seed {seed}, held out {held_out}: {finding}")
                    survey = Survey.take(Subject(model, data))
                    for seen in survey.layers:
                        judged = stale(seen)
                        assert judged is not None
                        share = max(share, float(judged[0].double().mean()))
                        between = max(between, seen.evaluated.means.ratio())
                        dead = max(dead, float((seen.units.high <= 0).double().mean()))
                    for parting in (survey.outputs, *(seen.parting for seen in survey.layers)):
                        ratio = max(ratio, parting.distance / parting.noise)
                        if parting.distance > APART:
                            ratio_of_large = max(ratio_of_large, parting.distance / parting.noise)
    print(f"{trainings} trainings, {diagnoses} diagnoses, findings by code: {dict(found) or 'none'}")
    print(f"largest share of stale channels of a layer {share:.3f}; of dead units {dead:.3f}; F {between:.2f}")
    print(f"largest distance over noise {ratio:.2f}, where the distance is above {APART}: {ratio_of_large:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    main(range(given.first, given.first + given.seeds))
