"""The protocols on frozen features that answer once a round: k-NN, linear probe, few labels."""

from __future__ import annotations

from collections.abc import Sequence

from freqmask.evaluation import fewshot, knn, linear
from freqmask.evaluation.labelled import Round
from freqmask.evaluation.protocol import Bench, Outcome, Protocol


class Knn(Protocol):
    """Votes of the nearest training images.

    Args:
        neighbours: numbers k that vote; those larger than the training part are left out.
        temperature: of the votes.
        feature: ``mean`` or ``class_token``.
    """

    name, seeded = "knn", False

    def __init__(self, neighbours: Sequence[int], temperature: float, feature: str) -> None:
        self.neighbours, self.temperature, self.feature = list(neighbours), temperature, feature
        self.title = f"k-NN by cosine, temperature {temperature:g}"
        self.headline = f"k={20 if 20 in neighbours else min(neighbours)}"

    def run(self, bench: Bench, one: Round, seed: int) -> dict[str, Outcome]:
        """One answer a k."""
        values = bench.end(self.feature)
        answers = knn.predict(
            bench.tensor(values, one.test),
            bench.tensor(values, one.train),
            bench.labels(one.train),
            bench.classes,
            knn.usable(self.neighbours, len(one.train)),
            self.temperature,
        )
        return {
            f"k={k}": Outcome(predicted.cpu().numpy(), learnt_from=len(one.train))
            for k, predicted in answers.items()
        }


class Linear(Protocol):
    """The sweep of softmax heads.

    Args:
        rates: peak learning rates of the sweep.
        epochs: passes over the training images.
    """

    name, seeded, headline, inside = "linear", True, "plain", True

    def __init__(self, rates: Sequence[float], epochs: float) -> None:
        self.rates, self.epochs = list(rates), epochs
        self.title = "linear probe, chosen on held-out training images"

    def run(self, bench: Bench, one: Round, seed: int) -> dict[str, Outcome]:
        """The plain head and, where classes differ in size, the one with class weights."""
        inside = bench.inside()
        chosen = linear.choose_and_fit(
            {name: bench.tensor(values, one.train) for name, values in inside.items()},
            bench.labels(one.train),
            bench.classes,
            groups=bench.groups(one.train),
            seed=seed,
            rates=self.rates,
            epochs=self.epochs,
        )
        test = {name: bench.tensor(values, one.test) for name, values in inside.items()}
        return {
            variant: Outcome(sweep.predict(test)[0].cpu().numpy(), head.describe(), len(one.train))
            for variant, (head, sweep) in chosen.items()
        }


class Fewshot(Protocol):
    """Logistic regression on few labels.

    Args:
        shots: images a class, or shares in per cent.
        feature: ``mean`` or ``class_token``.
        strength: scikit-learn's C.
    """

    name, seeded = "fewshot", True

    def __init__(self, shots: Sequence[str], feature: str, strength: float) -> None:
        self.shots = fewshot.parse_shots(list(shots))
        self.feature, self.strength = feature, strength
        self.title = "few labels, logistic regression on frozen features"
        self.headline = fewshot.words_of("10" if "10" in self.shots else self.shots[-1])

    def run(self, bench: Bench, one: Round, seed: int) -> dict[str, Outcome]:
        """One answer a number of labels; the draw is the same for every model."""
        values, labels = bench.end(self.feature), bench.data.labels[one.train]
        outcomes = {}
        for shot in self.shots:
            drawn = one.train[fewshot.draw(labels, shot, seed)]
            predicted = fewshot.logistic_regression(
                values[drawn], bench.data.labels[drawn], values[one.test], values[one.train], self.strength
            )
            outcomes[fewshot.words_of(shot)] = Outcome(predicted, learnt_from=len(drawn))
        return outcomes
