"""FOLK: MFM, and a teacher that sees the whole image (docs/methods.md, FOLK)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from freqmask.backbones import Backbone, Features
from freqmask.errors import UserError
from freqmask.filters import Filtered
from freqmask.heads import ProjectionHead
from freqmask.losses import SpectrumLoss, sum_over_processes
from freqmask.methods.method import Method
from freqmask.methods.mfm import masking_filter, reconstruction_health
from freqmask.options.of_methods import FOLKOptions
from freqmask.rng import Keys, combine
from freqmask.spectrum import Images, single_or_double
from freqmask.training.optim import cosine_momentum, update_ema

# A step count is known to the trainer only; DINO's first epoch is about this share of its published runs.
FROZEN_SHARE = 0.01
OUTPUTS = 65_536  # prototypes, as published


class FOLK(Method):
    """Frequency-guided masking with a teacher.

    loss = reconstruction_weight mean over views v of MFM(v)
    + distillation_weight mean over views of H(teacher(other view), student(filtered view)).

    The student sees filtered views only, the teacher originals only; it is the student's moving average and
    gets no gradient. What is not public of the paper has DINO's published values. Both views run through
    a network as one batch; so batch norm sees both, filtered in the student, original in the teacher.

    Its options are those of :class:`~freqmask.options.of_methods.FOLKOptions`. ``views="two"``: both views are
    filtered and both are the teacher's (the paper's); ``"one"``: half of the passes, the first view is filtered
    and the teacher sees the second.
    """

    name = "folk"
    about = "hides some frequencies; the network predicts them, and what a teacher says of the whole image"
    Options: ClassVar[type[FOLKOptions]] = FOLKOptions
    n_views = 2
    default_backbone = "student"
    parts = ("reconstruction", "distillation")
    student: Backbone
    current_teacher_temperature: Tensor

    def build(self, options: FOLKOptions) -> None:
        """Losses, filter, heads and teacher."""
        if max(options.reconstruction_weight, options.distillation_weight) == 0:
            raise UserError(
                "reconstruction_weight (0) and distillation_weight (0) must be at least 0 and not both 0"
            )
        self.loss = SpectrumLoss(
            options.masked_weight, options.kept_weight, options.reduce, options.gamma, options.focal
        )
        outputs = OUTPUTS if options.outputs == "auto" else options.outputs
        self.distillation = DistillationLoss(
            outputs, options.student_temperature, options.teacher_temperature_start, options.center_momentum
        )
        self.filter = masking_filter(options, self.settings, self.student.is_cnn)
        dim = self.student.feature_dim
        self.decoder = self.make_decoder()
        self.student_head = ProjectionHead(dim, outputs, options.hidden_size, options.bottleneck_size)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.student_head).requires_grad_(False)
        self.options, self.clamp, self.distil = options, options.clamp, options.distil
        self.freeze_last_layer_steps = options.freeze_last_layer_steps
        # A tensor, so that compiled code does not depend on its value and a checkpoint carries it.
        self.register_buffer("current_teacher_temperature", torch.tensor(self.temperature(0, 1)))
        if options.distil == "class_token" and not self.student.has_class_token:
            raise UserError(
                f"distil (class_token) needs a class token; {self.student.name} has none, try distil=auto"
            )
        self.train()

    def forward(
        self, views: Sequence[Images], keys: Keys | None = None, details: bool = False
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss of two views of each image, with its parts ``reconstruction`` and ``distillation``."""
        views, keys = self.checked(views, keys)
        options = self.options
        seen, taught = (views, [views[1], views[0]]) if options.views == "two" else (views[:1], views[1:])
        view_keys = [combine(keys, number) for number in range(len(seen))]
        filtered = [self.filter(*view, clamp=self.clamp) for view in zip(seen, view_keys, strict=True)]

        # One batch holds all views; the teacher's come in crossed order, so that row i of the student's is
        # to predict row i of the teacher's.
        features = self.student(self.normalise(torch.cat([view.images for view in filtered])))
        predictions = self.decoder(features.feature_map, seen[0].shape[-2:]).chunk(len(seen))
        targets = [self.normalise(view) for view in seen]
        student_logits = self.student_head(self.distilled(features))
        teacher_logits = self.teach(torch.cat(list(taught)))

        losses = [
            self.loss(prediction, target, view.keep)
            for prediction, target, view in zip(predictions, targets, filtered, strict=True)
        ]
        reconstruction = torch.stack(losses).mean()
        distillation = self.distillation(student_logits, teacher_logits, self.current_teacher_temperature)
        loss = options.reconstruction_weight * reconstruction + options.distillation_weight * distillation
        if self.training:
            self.distillation.collect(teacher_logits)
        parts = {"reconstruction": reconstruction.detach(), "distillation": distillation.detach()}
        if details:
            parts |= self.health(predictions, targets, filtered, view_keys, teacher_logits)
        return {"loss": loss, **parts}

    def train(self, mode: bool = True) -> FOLK:
        """The teacher, as DINO's, drops no paths and units (``drop_path_rate``): batch norm alone trains in it."""
        super().train(mode)
        for part in self.teacher.modules():
            # batch norm goes on, and what keeps numbers of its weights until it trains again (LeViT's positions)
            keeps_on = hasattr(part, "running_var") or type(part).train is not nn.Module.train
            part.training = mode and keeps_on
        return self

    @torch.no_grad()
    def teach(self, originals: Images) -> Float[Tensor, "batch outputs"]:
        """The teacher's outputs for unfiltered views in [0, 1]: cosines, before temperature and center."""
        return self.teacher_head(self.distilled(self.teacher(self.normalise(originals))))

    def distilled(self, features: Features) -> Float[Tensor, "batch dim"]:
        """The feature that student and teacher are compared in: the class token, or the pooled map (``distil``)."""
        if self.distil == "pooled" or features.class_token is None:
            return features.pooled
        return features.class_token

    @torch.no_grad()
    def health(
        self,
        predictions: Sequence[Tensor],
        targets: Sequence[Tensor],
        filtered: Sequence[Filtered],
        view_keys: Sequence[Tensor],
        teacher_logits: Tensor,
    ) -> dict[str, Float[Tensor, ""]]:
        """The reconstruction's health over all views, and ``collapse`` in nats (docs/methods.md, small pictures).

        Args:
            predictions: of each view, (B, C, H, W), normalized.
            targets: the unfiltered views, normalized.
            filtered: what the student saw of each view.
            view_keys: of each view, int64 (B,).
            teacher_logits: the teacher's outputs for all views, (views * B, K).
        """
        keeps = [view.keep for view in filtered]
        prediction, target, keep, keys = (
            torch.cat(list(views)) for views in (predictions, targets, keeps, view_keys)
        )
        health = reconstruction_health(self.loss, prediction, target, keep, self.filter, keys)
        teacher = self.distillation.teacher_probabilities(teacher_logits, self.current_teacher_temperature)
        return {**health, "collapse": collapse_number(teacher)}

    def before_optimizer_step(self, step: int, total_steps: int) -> None:
        """Drops the last layer's gradient while it is frozen, so that it takes no share of the clipping."""
        if step < self.frozen_steps(total_steps):
            self.student_head.last_layer.grad = None

    def after_step(self, step: int, total_steps: int) -> None:
        """Moves the teacher and the center, and sets the temperature for the next step."""
        self.distillation.update_center()
        momentum = cosine_momentum(self.options.ema_momentum, step, total_steps)
        update_ema(self.teacher, self.student, momentum)
        update_ema(self.teacher_head, self.student_head, momentum)
        self.current_teacher_temperature.fill_(self.temperature(step + 1, total_steps))

    def frozen_steps(self, total_steps: int) -> int:
        """In how many first steps the last layer stands still."""
        frozen = self.freeze_last_layer_steps
        return math.ceil(FROZEN_SHARE * total_steps) if frozen == "auto" else int(frozen)

    def temperature(self, step: int, total_steps: int) -> float:
        """The teacher's temperature at a step: linear from its start to its end, then constant."""
        start, end = self.options.teacher_temperature_start, self.options.teacher_temperature
        steps = self.options.teacher_temperature_warmup * total_steps
        progress = min(step / steps, 1.0) if steps > 0 else 1.0
        return start + (end - start) * progress


class DistillationLoss(nn.Module):
    """Cross-entropy of the student with the centered, sharpened teacher, in DINO's published form.

    p_t = softmax((teacher - center) / teacher_temperature), p_s = softmax(student / student_temperature),
    loss = - mean over images of sum(p_t log p_s). The center is a moving mean of the teacher's outputs and
    keeps one output from winning everywhere; it moves once a step, however many parts the batch is cut into.

    Args:
        outputs: length K of the heads' outputs.
        student_temperature: above 0.
        teacher_temperature: above 0; ``forward`` may override it, for a warm-up.
        center_momentum: how much of the old center remains, in [0, 1].

    Raises:
        UserError: for a setting out of range.
    """

    center: Tensor

    def __init__(
        self,
        outputs: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if outputs < 2:
            raise UserError(f"outputs ({outputs}) must be at least 2; 65536 is the usual choice")
        if min(student_temperature, teacher_temperature) <= 0:
            raise UserError(
                f"student_temperature ({student_temperature}) and teacher_temperature ({teacher_temperature}) "
                "must be above 0; 0.1 and 0.04 are the usual choice"
            )
        if not 0 <= center_momentum <= 1:
            raise UserError(f"center_momentum ({center_momentum}) must be in [0, 1]; 0.9 is the usual choice")
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, outputs))
        # the sum of the teacher's outputs since the center moved, and how many: no buffer, for those may be in bf16
        self.collected: Tensor | None = None

    def forward(
        self,
        student_logits: Float[Tensor, "batch outputs"],
        teacher_logits: Float[Tensor, "batch outputs"],
        teacher_temperature: float | Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        """The cross-entropy; no gradient reaches the teacher.

        Args:
            student_logits: of one view.
            teacher_logits: of another view of the same images.
            teacher_temperature: today's, instead of the constructor's; a tensor spares compiled code a
                recompilation when it changes.

        Returns:
            A scalar in nats. The center is left alone: see ``collect`` and ``update_center``.
        """
        targets = self.teacher_probabilities(teacher_logits, teacher_temperature)
        log_student = F.log_softmax(single_or_double(student_logits) / self.student_temperature, dim=-1)
        return -(targets * log_student).sum(-1).mean()

    @torch.no_grad()
    def teacher_probabilities(
        self,
        teacher_logits: Float[Tensor, "batch outputs"],
        teacher_temperature: float | Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, "batch outputs"]:
        """What the student is asked to predict.

        Args:
            teacher_logits: of one view.
            teacher_temperature: as in ``forward``.

        Returns:
            Probabilities, each row adds up to 1.
        """
        temperature = self.teacher_temperature if teacher_temperature is None else teacher_temperature
        return F.softmax((single_or_double(teacher_logits) - self.center) / temperature, dim=-1)

    @torch.no_grad()
    def collect(self, teacher_logits: Float[Tensor, "batch outputs"]) -> None:
        """Takes note of the teacher's outputs for a part of the step's images, or for all of them."""
        logits = single_or_double(teacher_logits)
        count = logits.new_full((1, 1), float(len(logits)))
        part = torch.cat((logits.sum(0, keepdim=True), count), dim=1)
        self.collected = part if self.collected is None else self.collected + part

    @torch.no_grad()
    def update_center(self) -> None:
        """Moves the center towards the mean of what was collected, over all processes; batches may differ in size."""
        if self.collected is None:
            return
        total = sum_over_processes(self.collected)
        self.center.lerp_((total[:, :-1] / total[:, -1:]).to(self.center.dtype), 1.0 - self.center_momentum)
        self.collected = None


def collapse_number(probabilities: Float[Tensor, "batch outputs"]) -> Float[Tensor, ""]:
    """Entropy of the mean distribution minus the mean entropy over the images: 0 when collapsed.

    Args:
        probabilities: the teacher's, one row an image.

    Returns:
        What the images tell apart, in nats, from 0 to log(min(batch, outputs)); below 0.1 after warm-up the
        teacher says the same of every image.
    """

    def entropy(shares: Tensor) -> Tensor:
        return -torch.xlogy(shares, shares).sum(-1)

    probabilities = single_or_double(probabilities)
    return entropy(probabilities.mean(0)) - entropy(probabilities).mean()
