"""``freqmask evaluate``: how good a backbone is, on images with labels.

A number means little alone. Put random weights, raw pixels, the same backbone with public weights and your
run into one table:

    freqmask evaluate linear pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from freqmask.commands.command import command, running_options
from freqmask.errors import UserError
from freqmask.imports import uncollected
from freqmask.interop.formats import PIXELS, check_model
from freqmask.options import Range, Seeds
from freqmask.options.of_evaluation import (
    FineTuned,
    FineTuning,
    Frozen,
    HarderImages,
    Labelled,
    Models,
    Parts,
    Scenes,
    Segmenting,
    Trained,
    Weights,
    Windows,
)

Feature = Literal["mean", "class_token"]
SHARED = (Models, Labelled, Windows, Frozen)  # of the protocols that leave the backbone as it is
PARTS: dict[str, str] = {}  # name of a protocol -> what `freqmask evaluate --help` says of it


def protocol(summary: str, *groups: type) -> Callable[[Callable[..., Any]], Callable[..., list[Any]]]:
    """Make a command of a function that gives a `freqmask.evaluation.protocol.Protocol`, called as the function is.

    The function tells the protocol's own options. The command line, the twin in Python, the list of protocols, table
    and rows follow; the docstring ends with what all of them return and raise.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., list[Any]]:
        @functools.wraps(function)
        def measure(*args: Any, **kwargs: Any) -> list[Any]:
            for model in running_options()["model"]:
                if model != PIXELS:
                    check_model(str(model))
            with uncollected():
                way, options = function(*args, **kwargs), running_options()
                from freqmask.evaluation.protocol import run_protocol
                from freqmask.reporting.page import refresh_report

            way.name = function.__name__
            summaries = run_protocol(way, options)
            for name in options["model"]:
                if (Path(name) / "config.yaml").is_file():
                    refresh_report(Path(name))
            return list(summaries)

        PARTS[function.__name__] = summary
        measure.__doc__ = f"""{inspect.getdoc(function)}

Returns:
    One `freqmask.evaluation.results.Summary` a model and variant: the numbers of the table.

Raises:
    UserError: a model, the data or a folder cannot be opened, labels or masks do not fit, or an option cannot be.
"""
        return command(*groups)(measure)

    return decorate


@protocol("the nearest training images vote", *SHARED)
def knn(
    model: list[str],
    *,
    k: Annotated[list[int] | None, Range(least=1)] = None,
    temperature: Annotated[float, Range(above=0)] = 0.07,
    feature: Feature = "mean",
    features: Literal["plain", "auto", "save"] = "plain",
    **options: Any,
) -> Any:
    """Measures backbones by their nearest neighbors: an image gets the class of the training images most like it.

    No training, so it is the fastest look; masked modelling scores lower here than in a linear probe. For
    instance: freqmask evaluate knn pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        k: neighbors that vote; 10 20 100 200. Those above the training images are left out.
        temperature: of the votes, which weigh exp(similarity / temperature).
        feature: what stands for an image: the mean of the map, or the class token where there is one.
        features: auto also measures those that held-out training images choose: centered or whitened, of a block,
            mean, class token or both, blocks side by side; save keeps the choice beside the weights for embed.
    """
    from freqmask.evaluation.knn import NEIGHBORS, Knn

    return Knn(k or NEIGHBORS, temperature, feature, features)


@protocol("a softmax head on frozen features", *SHARED)
def linear(
    model: list[str],
    *,
    rates: Annotated[list[float] | None, Range(above=0)] = None,
    epochs: Annotated[float, Range(above=0)] = 50,
    **options: Any,
) -> Any:
    """Measures backbones by a linear head on frozen features.

    A sweep (learning rates, mean and class token, blocks at 1/2, 3/4 and the end) is trained in one pass; the
    head is chosen on held-out training images, never on the test images. For instance:
    freqmask evaluate linear pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        rates: learning rates of the sweep, from strong regularization to little; nine from 0.0001 to 100.
        epochs: passes over the training images; small sets get at least 1,000 steps.
    """
    from freqmask.evaluation.linear import LEARNING_RATES, Linear

    return Linear(rates or LEARNING_RATES, epochs)


@protocol("a handful of labels a class", *SHARED)
def fewshot(
    model: list[str],
    *,
    shots: list[str] | None = None,
    tune: Literal["frozen", "finetune", "both"] = "frozen",
    epochs: Annotated[float | None, Range(above=0)] = None,
    strength: Annotated[float, Range(above=0)] = 1.0,
    feature: Feature = "mean",
    **options: Any,
) -> Any:
    """Measures backbones where labels are few.

    Logistic regression on the frozen features of a handful of images, or all weights fine-tuned on them with
    three published settings (learning rate 2e-3 with warm-up; 2e-4 without; 2e-4 for 100 epochs). For instance:
    freqmask evaluate fewshot pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        shots: labels to learn from: images a class (5), or a share of the training images (10%); 1 5 10 1% 10%.
        tune: frozen features, all weights fine-tuned (finetune), or both beside each other. With it the devices
            train together.
        epochs: of fine-tuning in the first two settings; 50.
        strength: scikit-learn's C of the logistic regression.
        feature: what stands for an image: the mean of the map, or the class token where there is one.
    """
    if tune != "frozen":
        from freqmask.evaluation.fewshot import TunedFewshot

        return TunedFewshot(running_options())
    if epochs is not None:
        raise UserError(
            f"epochs ({epochs:g}) are those of fine-tuning; leave them out, or give --tune finetune"
        )
    from freqmask.evaluation.fewshot import SHOTS, Fewshot

    return Fewshot(shots or SHOTS, feature, strength)


@protocol("which frequencies a model uses", *SHARED)
def bands(
    model: list[str],
    *,
    head: Literal["linear", "knn", "own"] = "linear",
    radii: Annotated[list[float] | None, Range(above=0)] = None,
    seeds: Seeds = None,
    **options: Any,
) -> Any:
    """Shows which frequencies a model uses: its accuracy on low-, high- and band-passed test images.

    The head learns from whole images; only the test images are filtered. For instance:
    freqmask evaluate bands pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        head: what classifies: a linear or k-NN head on frozen features, trained on whole images; or own, the
            model's own classifier (exported classifiers, and timm:NAME on ImageNet's classes).
        radii: in frequency bins; the default are seven from a sixteenth of the highest frequency to all of it.
        seeds: of the head and of random: weights; 0.
    """
    from freqmask.evaluation.bands_and_attacks import Bands

    return Bands(head, radii)


@protocol("corrupted, adversarial and other people's test images", HarderImages, *SHARED)
def robustness(
    model: list[str],
    *,
    data: list[str] | None = None,
    head: Literal["linear", "own"] = "linear",
    seeds: Seeds = None,
    **options: Any,
) -> Any:
    """Measures classifiers on images made harder: common corruptions, adversarial attacks, ImageNet-C, -A, -R, -Sketch.

    The head learns from clean images; test images are corrupted (15 ways, 5 severities) or attacked (FGSM, PGD).
    For instance: freqmask evaluate robustness pixels random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        data: images with labels, as for the other protocols. It may be left out with --head own where --folder
            names what is tested on.
        head: what classifies: a linear head on frozen features, trained on clean images; or own, the model's
            own classifier (what finetune leaves behind, and timm:NAME on ImageNet's classes).
        seeds: of the head and of random: weights; 0.
    """
    from freqmask.evaluation.bands_and_attacks import make_attacks
    from freqmask.evaluation.corruptions import SEVERITIES, choose_corruptions
    from freqmask.evaluation.robustness import Robustness

    budget: Any = (options[name] for name in ("norm", "epsilon", "steps", "step_size", "random_start"))
    return Robustness(
        head=head,
        corruptions=choose_corruptions(options["corruptions"] or ["common"]),
        severities=sorted(set(options["severities"] or SEVERITIES)),
        attacks=make_attacks(options["attacks"] or ["fgsm", "pgd"], *budget),
        folders=[Path(one) for one in options["folder"] or []],
        constants=options["constants"],
        frost=options["frost"],
        test_images=options["test_images"],
    )


@protocol(
    "all weights learn; a classifier for timm is left behind",
    Models,
    Labelled,
    FineTuning,
    Windows,
    FineTuned,
)
def finetune(
    model: list[str],
    *,
    shots: str | None = None,
    seeds: Seeds = None,
    **options: Any,
) -> Any:
    """Measures backbones after fine-tuning: all weights learn, with the published recipe.

    Every model and seed becomes a run folder with a classifier that timm loads; interrupted, the same command
    resumes it. random: is the supervised baseline. For instance:
    freqmask evaluate finetune random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        shots: learn from few labels: images a class (5), or a share of the training images (10%), the same ones
            for every model; the default is all.
        seeds: mean and standard deviation are over these; 0. They draw the head, the order, crops and mixing, the
            labels of shots, and the weights of random:.
    """
    from freqmask.evaluation.finetune import Finetune

    return Finetune(running_options())


@protocol(
    "a class for every pixel: UperNet on the backbone", Models, Scenes, Parts, Segmenting, Weights, Trained
)
def segment(
    model: list[str],
    *,
    data: str | None = None,
    seeds: Seeds = None,
    **options: Any,
) -> Any:
    """Measures backbones by semantic segmentation: UperNet on top, all weights learn, mean IoU on test images.

    Every model and seed becomes a run folder; interrupted, the same command resumes it, and finished networks are
    taken as they are. It needs pip install 'freqmask[seg]'. For instance:
    freqmask evaluate segment random:RUN timm:vit_small_patch16_224 RUN --data DATA

    Args:
        data: a folder with images/train beside masks/train (annotations and labels will do for masks), or
            train/images beside train/masks, and the same for test or val; or images beside masks, which we part.
        seeds: mean and standard deviation are over these; 0. They draw the decoder's weights, the order, crops, and
            the weights of random:.
    """
    from freqmask.evaluation.segmentation import Segment

    return Segment(running_options())
