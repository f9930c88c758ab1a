"""What one model answers to images that were made harder: corrupted, attacked, or taken by others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freqmask.data.loader import make_loader
from freqmask.data.sampler import ChosenSampler
from freqmask.data.sources import Source
from freqmask.evaluation.answers import Answers
from freqmask.evaluation.attacks import Attack, size_of_change
from freqmask.evaluation.corrupted import CorruptedSubject
from freqmask.evaluation.corruptions import Corruption
from freqmask.evaluation.features import FeatureTable, compute_features, lasting, not_finite
from freqmask.evaluation.labelled import LabelledData, Round, subset
from freqmask.evaluation.protocol import Bench
from freqmask.evaluation.results import Result
from freqmask.evaluation.subjects import Subject, as_float

CLEAN, CORRUPTED = "clean", "corrupted"
_ATTACKED_AT_ONCE = 64  # images; gradients need several times the memory of a look


@dataclass
class Examination:
    """A model, the images of DATA, and what classifies: one head a round.

    Attributes:
        bench: the model, begun, and the images.
        answers: by round.
        seed: of the heads.
        head: how it is called in the records.
    """

    bench: Bench
    answers: list[Answers]
    seed: int
    head: str

    @property
    def tested(self) -> np.ndarray:
        """Numbers of the images that are answered for, round by round."""
        return self.bench.data.tested

    def clean(self) -> Result:
        """The answers to the images as they are."""
        values = self.bench.table("end").values
        return self._result(CLEAN, {name: rows[self.tested] for name, rows in values.items()})

    def corrupted(self, corruption: Corruption) -> Result:
        """The answers to corrupted test images."""
        subject = CorruptedSubject(self.bench.subject, corruption)
        images = subset(self.bench.data, self.tested)
        table = compute_features(subject, images, "end", self.bench.place, quiet=True)
        facts = {
            "corruption": corruption.name,
            "severity": corruption.severity,
            "constants": corruption.strengths.describe(),
            "frost": (corruption.frost or "drawn") if corruption.name == "frost" else "",
        }
        return self._result(f"{corruption.name} {corruption.severity}", table.values, facts)

    def attacked(self, attack: Attack) -> Result:
        """The answers to adversarial test images, made against this model and its heads."""
        found = [
            self._attack(attack, one, answers)
            for one, answers in zip(self.bench.data.rounds, self.answers, strict=True)
        ]
        predicted, losses, harder, change = (np.concatenate(parts) for parts in zip(*found, strict=True))
        facts = {
            "attack": attack.describe(),
            "loss": float(losses.mean()),
            "adversarial_loss": float(harder.mean()),
            "largest_change": float(change.max()),
        }
        return Result(self.bench.subject, attack.name, self.seed, self.tested, predicted, self._facts(facts))

    def _attack(self, attack: Attack, one: Round, answers: Answers) -> list[np.ndarray]:
        """Answers, losses before and after, and sizes of the changes, of a round's test images."""
        bench, count = self.bench, len(one.test)
        source, labels = subset(bench.data, one.test), torch.from_numpy(bench.data.labels[one.test])
        size = min(bench.place.batch_size or _ATTACKED_AT_ONCE, count)
        arguments = (attack, bench.subject, answers, source, labels, size, bench.place.workers)
        kept = [*lasting(bench.subject, source), answers]
        found = dict(bench.place.run(_attack_images, count, size, arguments, kept))
        return [
            np.concatenate(parts) for parts in zip(*(found[first] for first in sorted(found)), strict=True)
        ]

    def _result(
        self, variant: str, values: dict[str, np.ndarray], facts: dict[str, Any] | None = None
    ) -> Result:
        """Each round's head answers for its own images."""
        ends = np.cumsum([len(one.test) for one in self.bench.data.rounds])[:-1]
        parts = np.split(np.arange(len(self.tested)), ends)
        said = [
            answers.logits(self.bench.place, {name: rows[part] for name, rows in values.items()}).argmax(
                dim=1
            )
            for answers, part in zip(self.answers, parts, strict=True)
        ]
        predicted = torch.cat(said).cpu().numpy()
        return Result(
            self.bench.subject, variant, self.seed, self.tested, predicted, self._facts(facts or {})
        )

    def _facts(self, further: dict[str, Any]) -> dict[str, Any]:
        chosen = "; ".join(dict.fromkeys(answers.chosen for answers in self.answers if answers.chosen))
        learnt = " ".join(str(answers.learnt_from) for answers in self.answers)
        return {"head": self.head, "train_images": learnt, "chosen": chosen, **further}


def _attack_images(
    device: torch.device,
    images: range,
    attack: Attack,
    subject: Subject,
    answers: Answers,
    source: Source,
    labels: Tensor,
    size: int,
    workers: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """A batch's first number; its answers, losses before and after, sizes of the changes; in whatever process."""

    def classify(batch: Tensor) -> Tensor:
        return answers.differentiable(subject.features(batch, "end"))

    first = images.start
    for batch in make_loader(subject.dataset(source), ChosenSampler(images), size, workers):
        clean, keys = as_float(batch["views"][0].to(device)), batch["keys"].to(device)
        truth = labels[first : first + len(clean)].to(device)
        harder = attack.run(classify, clean, truth, keys)
        with torch.no_grad():
            before, after = classify(clean).float(), classify(harder).float()
        losses = (F.cross_entropy(logits, truth, reduction="none") for logits in (before, after))
        change = size_of_change(harder - clean, attack.norm)
        yield first, [part.cpu().numpy() for part in (after.argmax(dim=1), *losses, change)]
        first += len(clean)


def answer_variant(
    subject: Subject,
    answers: Answers,
    data: LabelledData,
    columns: Sequence[int] | None,
    variant: str,
    seed: int,
    bench: Bench,
) -> Result:
    """The answers to a test set of others, among the classes that it has.

    Args:
        subject: the model, begun.
        answers: its head.
        data: the test set.
        columns: which of the head's classes those of the test set are; None where they are the same.
        variant: its name.
        seed: of the head.
        bench: where to compute.
    """
    table: FeatureTable = compute_features(subject, data.source, "end", bench.place, quiet=True)
    images = np.flatnonzero(table.read)
    trouble = "features are not finite; no result" if is_broken(table) else ""
    if trouble:
        return Result(subject, variant, seed, images, np.empty(0), trouble=trouble)
    logits = answers.logits(bench.place, {name: rows[images] for name, rows in table.values.items()})
    predicted = (logits if columns is None else logits[:, list(columns)]).argmax(dim=1).cpu().numpy()
    facts = {"folder": data.name, "left_out": len(table.skipped), "chosen": answers.chosen}
    return Result(subject, variant, seed, images, predicted, facts)


def is_broken(table: FeatureTable) -> bool:
    """Whether some features are not finite."""
    return any(not_finite(values) for values in table.values.values())


def together(results: Sequence[Result], variant: str = CORRUPTED) -> Result:
    """Several results on the same images as one: its accuracy is their mean, its interval draws whole images."""
    first = results[0]
    facts = {name: value for name, value in first.facts.items() if name in ("head", "train_images", "chosen")}
    names = list(dict.fromkeys(str(result.facts.get("corruption", "")) for result in results))
    severities = sorted({int(result.facts.get("severity", 0)) for result in results})
    facts |= {"corruption": " ".join(names), "severity": " ".join(map(str, severities))}
    facts["constants"] = first.facts.get("constants", "")
    return Result(
        first.subject,
        variant,
        first.seed,
        np.concatenate([result.images for result in results]),
        np.concatenate([result.predicted for result in results]),
        facts,
    )
