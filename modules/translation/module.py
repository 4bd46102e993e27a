"""Unpaired image-to-image translation between domains."""

import math
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.adversarial.base import WATCHED, AdversarialModule, AdversarialOptimization, as_float, as_uint8
from modules.adversarial.health import Health
from modules.adversarial.objectives import LeastSquares, Objective, Regularizer, Verdict
from modules.adversarial.players import at_rest
from modules.answers import Answer, PictureAnswers
from modules.base import Stage
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.extractors import JUDGE, Seen
from modules.measures.judge import Judge
from modules.measures.sets import frechet_distance
from modules.networks import BackboneError
from modules.networks.backbones import untrained
from modules.networks.parts import Draws, describe, within
from modules.networks.translators import ResidualTranslator, Translator
from modules.pictures.sheets import Image, as_address, sheet, stacked
from modules.ranges import NonNegative, NonNegativeInt, PositiveInt
from modules.spec import Backbone, DataSpec
from modules.training_data import given_data, training_data
from modules.translation.translators import (
    ImagePool,
    SeparateTranslators,
    SharedTranslator,
    by_domain,
    domain_of,
    told,
    values_of,
)

SHIFT = 2  # maximum random shift of the judge's training images, in pixels
PICTURED = 8


class TranslationModule(AdversarialModule):
    """Image-to-image translation between domains, trained on unpaired images of each.

    | kind | parts |
    |---|---|
    | CycleGAN (the default; Zhu et al. 2017, arXiv:1703.10593) | a generator and a discriminator for each domain, ``LeastSquares``, an image pool |
    | StarGAN (Choi et al. 2018, arXiv:1711.09020) | ``shared: true``: one of each for all domains. The generator gets the wanted domain as constant channels, the discriminator also classifies the domain. ``Wasserstein`` with ``GradientPenalty``, ``pool: 0``, ``identity: 0`` |

    The generator minimises, besides the adversarial loss: ``cycle`` · mean |G(G(x, there), back) − x|, ``identity`` ·
    mean |G(x, its own domain) − x|, and, if it is shared, ``domain`` times the cross-entropy of the target domain;
    values of images are in [-1, 1]. The discriminator has one score per patch.

    The generator's moving average is evaluated by a judge: a small convnet that is trained at the start of the run on
    the labelled training images, and whose name is part of the metrics' names. ``fd``: the Fréchet distance of its
    features between translations into a domain and real images of it (for each value of each attribute, averaged), and
    ``fd_untranslated``, the same for untranslated images of other domains; one metric for each attribute (``domain``,
    or the data's own): the fraction of translations that the judge classifies as the target value; ``content``, if the
    data define content to preserve: the fraction in which the judge recognises it. Metrics ending in ``_real`` are
    those of real images, an upper bound. ``cycle``: mean error of an image after translation and back, for values in
    [0, 1]. `Health` monitors translations of fixed training images, and reports failures.

    Args:
        data: description of the data. Domains are its ``label_names``; ``attributes`` are what they differ in.
        backbone: the network of the discriminator, or of each discriminator if there are several: ``patchgan``, or any
            timm name with feature maps. ``compile`` compiles the generators.
        translator: layers of the generator.
        objective: losses of both players; by default least squares.
        regularizer: gradient penalty of the discriminator.
        shared: one generator and one discriminator for all domains, instead of one per domain.
        cycle: weight of the cycle consistency loss.
        identity: weight of the identity loss: an image that is already in the target domain must not change.
        domain: weight of the domain classification loss.
        pool: number of earlier translations per domain that are kept for the discriminator.
        judge_steps: training steps of the judge, with 64 images each.
        health_every: steps of the generator between two health checks.
        stop_on_failure: stop the training when it fails; the best checkpoint is kept.
        optimization: optimisers and schedules of both players.

    Raises:
        BackboneError: the backbone cannot be created, or parts are incompatible.
    """

    takes = ("label_names", "attributes", "in_chans", "image_size")
    series: ClassVar[tuple[str, ...]] = ("val/translations",)
    monitor = f"val/fd_{JUDGE}"
    training_only: ClassVar[tuple[str, ...]] = ("generator.", "others.")
    discriminator_parts: ClassVar[tuple[str, ...]] = ("backbone", "others", "head")

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("patchgan"),
        optimization: AdversarialOptimization | None = None,
        translator: Translator | None = None,
        objective: Objective | None = None,
        regularizer: Regularizer | None = None,
        shared: bool = False,
        cycle: NonNegative = 10.0,
        identity: NonNegative = 5.0,
        domain: NonNegative = 1.0,
        pool: NonNegativeInt = 50,
        judge_steps: PositiveInt = 1200,
        health_every: PositiveInt = 100,
        stop_on_failure: bool = False,
    ) -> None:
        super().__init__(data, backbone, optimization)
        self.answers = PictureAnswers(max(96, *self.size))
        in_chans = data.in_chans
        self.attributes = {
            name: list(values) for name, values in (data.attributes or {"domain": self.label_names}).items()
        }
        self.sizes = [len(values) for values in self.attributes.values()]
        self.shared, self.judge_steps = shared, judge_steps
        domains = len(self.label_names)
        if domains < 2 or math.prod(self.sizes) != domains:
            raise BackboneError(
                "Translation needs two or more domains: use data with labels, such as --data DomainFolder with a "
                "folder for each domain."
            )
        if len(self.sizes) > 1 and not shared:
            raise BackboneError(
                f"These domains differ in {' and '.join(self.attributes)}: --model.shared true has one generator for all "
                "combinations."
            )
        self.objective, self.regularizer = objective or LeastSquares(), regularizer
        if self.objective.energy:
            raise BackboneError("Patches have a score, not an autoencoder's error: choose another objective.")
        self.weights = {"cycle": cycle, "identity": identity, "domain": domain}
        for name, value in {**self.weights, "pool": pool, "judge_steps": judge_steps}.items():
            within(name, value, 0)
        within("health_every", health_every, 1)
        self.health: Health = Health(health_every)
        self.stop_on_failure, self._right_share = stop_on_failure, torch.zeros(())
        copies = 1 if shared else domains
        self.others = nn.ModuleList(self._another() for _ in range(copies - 1))
        with torch.no_grad():
            features = self.backbone.eval().forward_features(torch.zeros(1, in_chans, *self.size))
        self.backbone.train()
        if features.ndim != 4 or str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC"):
            raise BackboneError(
                f"{backbone.name} has no feature maps in the order C×H×W to score patches of: use patchgan."
            )
        channels = features.shape[1]
        scores = nn.ModuleList(nn.Conv2d(channels, 1, 4, padding="same") for _ in range(copies))
        self.head = nn.ModuleDict({"scores": scores})
        if shared:
            self.head["classes"] = nn.Linear(channels, sum(self.sizes))
        self.translator = describe(layers := translator or ResidualTranslator())
        self.play(
            SharedTranslator(layers, in_chans, self.sizes)
            if shared
            else SeparateTranslators([deepcopy(layers) for _ in range(domains)], in_chans)
        )
        self.pool = ImagePool(pool)
        self.judge: Judge = Judge(self, self._questions, name=JUDGE, steps=judge_steps, shift=SHIFT)
        self._seen: list[Tensor] = []
        self._watched: tuple[Tensor, Tensor] | None = None

    def _another(self) -> nn.Module:
        """Creates another backbone of the same kind; with the same weights, if they are pretrained."""
        return deepcopy(self.backbone) if self.pretrained else untrained(self.backbone, self.in_chans, self.image_size)

    @override
    def parts(self) -> dict[str, Any]:
        return {
            "translator": self.translator,
            "objective": describe(self.objective),
            "shared": self.shared,
        }

    # The players

    def forward(self, image: Tensor, domain: Tensor) -> Tensor:
        """Translates images with the generators' moving average, float B×C×H×W in [-1, 1]; see
        `SeparateTranslators`."""
        return self.average(image, domain)

    def discriminate(self, image: Tensor, domain: Tensor) -> tuple[Verdict, Tensor | None]:
        """Applies the discriminator of the given domains, int64 B, to normalised images, float B×C×H×W.

        Returns:
            The verdict, with a score per patch, float B×P; and, for a shared discriminator, the logits of the
            attributes' values, float B×K.
        """
        scores: Any = self.head["scores"]
        if not self.shared:
            bodies: list[Any] = [self.backbone, *self.others]
            pairs = zip(bodies, scores, strict=True)
            networks = [lambda x, b=body, s=score: s(b.forward_features(x)).flatten(1) for body, score in pairs]
            score = by_domain(networks, image, domain).float()
            return Verdict(score, score), None
        features = self.backbone.forward_features(image)
        score = scores[0](features).flatten(1).float()
        return Verdict(score, score), self.head["classes"](features.mean((2, 3))).float()

    def wanted(self, domain: Tensor, uniform: Tensor) -> Tensor:
        """Draws target domains: any combination for a shared generator, otherwise any domain except the image's own.

        Args:
            domain: domains of the images, int64 B.
            uniform: float B×A in [0, 1) for A attributes.
        """
        sizes = torch.tensor(self.sizes, device=domain.device)
        if self.shared:
            return domain_of((uniform * sizes).long(), self.sizes)
        return (domain + 1 + (uniform[:, 0] * (sizes[0] - 1)).long()) % sizes[0]

    def _draw(self, domain: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Draws target domains, and the pool's random numbers, float B×2."""
        count = len(self.sizes)
        drawn = self.draw(lambda n, generator: torch.rand(n, count + 2, generator=generator), len(domain), *key)
        return self.wanted(domain, drawn[:, :count]), drawn[:, count:]

    @override
    def discriminator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        image, domain = batch["image"], batch["label"]
        wanted, draws = self._draw(domain, key)
        with torch.no_grad():
            fake = self.pool.exchange(as_uint8(self.generator(as_float(image), wanted)), wanted, draws)
        real, fake = self.normalize(image), self.normalize(fake)
        (verdict, logits), (other, _) = self.discriminate(real, domain), self.discriminate(fake, wanted)
        self._right_share = self.accuracy(verdict, other)
        losses = {"loss": self.objective.discriminator(verdict, other)}
        if self.regularizer is not None and self.discriminator_steps % self.regularizer.every == 0:
            # Averaged over patches, so that the penalty does not grow with the image.
            losses["penalty"] = self.regularizer(lambda x: self.discriminate(x, domain)[0].score.mean(1), real, fake)
        if logits is not None:
            losses["domain_loss"] = told(logits, values_of(domain, self.sizes), self.sizes)
        return losses

    @override
    def generator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        wanted, _ = self._draw(batch["label"], key)
        return self.costs(self.generator, batch["image"], batch["label"], wanted)[0]

    def costs(
        self, generator: nn.Module, image: Tensor, domain: Tensor, wanted: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Computes the losses of a generator.

        Args:
            generator: the generators, or their moving average.
            image: uint8 B×C×S×S.
            domain: domains of the images, int64 B.
            wanted: target domains, int64 B.

        Returns:
            The terms; the translations and the back-translations, float B×C×H×W in [-1, 1].
        """
        real = as_float(image)
        fake = generator(real, wanted)
        back = generator(fake, domain)
        verdict, logits = self.discriminate(self.as_input(fake), wanted)
        terms = {
            "generator_loss": self.objective.generator(verdict),
            "cycle_loss": self.weights["cycle"] * (back.float() - real).abs().mean(),
        }
        if self.weights["identity"]:
            same = generator(real, domain)
            terms["identity_loss"] = self.weights["identity"] * (same.float() - real).abs().mean()
        if logits is not None:
            cost = told(logits, values_of(wanted, self.sizes), self.sizes)
            terms["wanted_domain_loss"] = self.weights["domain"] * cost
        return terms, fake, back

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Checks the health of the training at intervals."""
        share = self._right_share
        if self.trainer.world_size > 1:
            share = torch.as_tensor(self.trainer.strategy.reduce(share, reduce_op="mean"))
        self.health.note(step + 1, share, self.gradient_norm)
        if (step + 1) % self.health.every == 0:
            self.check_health(step + 1)
        return {}

    @torch.no_grad()
    def check_health(self, step: int) -> None:
        """Checks the health of the training on translations of fixed training images."""
        if self._watched is None:
            batch = training_data(self.trainer).samples("train", WATCHED)
            image = batch["image"].to(self.device)
            wanted = self.wanted(batch["label"], Draws(batch["image"], False).uniform(len(self.sizes))).to(self.device)
            self._watched = image, wanted
        image, wanted = self._watched
        with at_rest(self.generator):
            made = self.generator(as_float(image), wanted)
        self.tell_health(step, image, made, self._content)

    def _content(self, seen: Seen) -> Tensor | None:
        """Returns the judge's probabilities of the content, its last head, float N×K; None if it has no such head."""
        sizes = self.judge.extractor.sizes
        if seen.probabilities is None or len(sizes) == len(self.sizes):
            return None
        return seen.probabilities.split(sizes, 1)[-1]

    # Evaluation

    def _questions(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
        """Returns the targets of the judge: the value of each attribute, and the content if the data have it."""
        truth = values_of(batch["label"], self.sizes)
        if "content" not in batch:
            return truth, self.sizes
        content = batch["content"]
        return torch.cat([truth, content[:, None]], 1), [*self.sizes, int(content.max()) + 1]

    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        """Computes the loss of the generator's moving average; in evaluation, the target domain depends on the image
        only."""
        image, domain = batch["image"], batch["label"]
        wanted = self.wanted(domain, Draws(image, False).uniform(len(self.sizes)).to(self.device))
        terms, fake, back = self.costs(self.average, image, domain, wanted)
        extractor = self.judge.extractor
        seen, made = extractor(image.contiguous()), extractor(as_uint8(fake))
        figures = {"cycle": (back.float() - as_float(image)).abs().mean() / 2}
        kinds = {"_real": (seen, domain), "": (made, wanted)}
        for kind, (answers, asked) in kinds.items():
            assert answers.probabilities is not None
            parts = answers.probabilities.split(extractor.sizes, 1)
            truths = dict(zip(self.attributes, values_of(asked, self.sizes).unbind(1), strict=True))
            if "content" in batch and len(parts) > len(truths):
                truths["content"] = batch["content"]
            for (name, truth), part in zip(truths.items(), parts, strict=False):
                figures[f"{name}{kind}_{extractor.name}"] = (part.argmax(1) == truth).float().mean()
        numbers = torch.stack([domain, wanted], 1).to(seen.features.dtype)
        self._seen.append(torch.cat([seen.features, made.features, numbers], 1))
        return Losses({"loss": Losses(terms).total}, figures)

    def _distances(self) -> dict[str, Tensor | float]:
        """Computes the Fréchet distances, over all processes."""
        figures: dict[str, Tensor | float] = {}
        rows, self._seen = self.gathered(torch.cat(self._seen)), []
        size = (rows.shape[1] - 2) // 2
        real, fake = rows[:, :size], rows[:, size:-2]
        own, asked = (values_of(numbers.long(), self.sizes) for numbers in (rows[:, -2], rows[:, -1]))
        for kind, those, theirs in (("", fake, asked), ("_untranslated", real, None)):
            distances = []
            for a, values in enumerate(self.sizes):
                for value in range(values):
                    there = own[:, a] == value
                    made = ~there if theirs is None else theirs[:, a] == value
                    if there.any() and made.any():
                        distances.append(frechet_distance(real[there], those[made]))
            distances = distances or [frechet_distance(real, those)]  # if there are only a few images
            figures[f"fd{kind}_{self.judge.extractor.name}"] = sum(distances) / len(distances)
        return figures

    @override
    def report(self, stage: Stage) -> Report:
        report, data = Report(self._distances()), given_data(self.trainer)
        if data is not None:
            report.pictures["translations"] = lambda: self._translations(data.samples(stage, PICTURED))
        return report

    def _translations(self, batch: dict[str, Tensor]) -> Image:
        return self.sheet(batch["image"], batch["label"])

    @torch.no_grad()
    def sheet(self, image: Tensor, domain: Tensor) -> Image:
        """Draws images above their translations into each domain and their back-translations.

        Args:
            image: uint8 N×C×S×S.
            domain: int64 N.
        """
        image, domain = image.to(self.device), domain.to(self.device)
        rows = {"image": image} | {name: self.translate(image, self.asked(domain, [name])) for name in self.asks}
        values = values_of(domain, self.sizes)
        there = self.average(as_float(image), domain_of((values + 1) % values.new_tensor(self.sizes), self.sizes))
        rows["there and back"] = as_uint8(self.average(there, domain))
        return stacked(sheet(part, len(part), heading=name) for name, part in rows.items())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state that an exact resume needs."""
        super().on_save_checkpoint(checkpoint)
        pools = [self.pool.state()] * self.trainer.world_size
        if self.trainer.world_size > 1:  # each process has its own images
            torch.distributed.all_gather_object(pools, self.pool.state())
        checkpoint["gan"]["pools"] = pools

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if saved := checkpoint.get("gan"):
            pools = saved["pools"] if "pools" in saved else [saved["pool"]]  # earlier versions kept one
            self.pool.restore(pools[self.global_rank % len(pools)])

    # Inference

    @property
    def asks(self) -> dict[str, tuple[int, int]]:
        """Target values by name, each with the indices of its attribute and value."""
        given = [value for values in self.attributes.values() for value in values]
        return {
            value if given.count(value) == 1 else f"{name} {value}": (a, k)
            for a, (name, values) in enumerate(self.attributes.items())
            for k, value in enumerate(values)
        }

    def asked(self, domain: Tensor, names: list[str]) -> Tensor:
        """Replaces some attributes of domains.

        Args:
            domain: domains of the images, int64 B.
            names: names in `asks`.

        Raises:
            ValueError: there is no such name.
        """
        values = values_of(domain, self.sizes)
        for name in names:
            if name not in self.asks:
                raise ValueError(f"It does not translate into {name!r}; it knows {', '.join(self.asks)}.")
            attribute, value = self.asks[name]
            values[:, attribute] = value
        return domain_of(values, self.sizes)

    @torch.no_grad()
    def translate(self, image: Tensor, domain: Tensor) -> Tensor:
        """Translates uint8 B×C×H×W into domains, int64 B; see `asked`."""
        return as_uint8(self.average(as_float(image), domain))

    @torch.no_grad()
    def domains(self, image: Tensor) -> Tensor:
        """Returns the source domains, int64 B, of uint8 B×C×H×W as needed for translation: if domains have several
        attributes, the discriminator's prediction, so that attributes which are not replaced stay."""
        none = torch.zeros(len(image), dtype=torch.long, device=image.device)
        if len(self.sizes) == 1:
            return none
        logits = self.discriminate(self.normalize(image), none)[1]
        assert logits is not None
        return domain_of(torch.stack([part.argmax(1) for part in logits.split(self.sizes, 1)], 1), self.sizes)

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns the ``pictures`` of each image: its translations into each domain or attribute value, by name, as
        ``data:`` URLs of PNG files. If domains have several attributes, also the predicted value of each."""
        image = batch["image"]
        domain = self.domains(image)
        made = {name: tiles(self.translate(image, self.asked(domain, [name]))) for name in self.asks}
        answers: list[Answer] = []
        for k, values in enumerate(values_of(domain, self.sizes).tolist()):
            known = zip(self.attributes.items(), values, strict=True)
            answer = {name: names[value] for (name, names), value in known} if len(self.sizes) > 1 else {}
            answers.append(answer | {"pictures": {name: as_address(each[k]) for name, each in made.items()}})
        return answers


def tiles(image: Tensor) -> NDArray[np.uint8]:
    """Converts uint8 N×C×H×W to uint8 N×H×W×C."""
    return image.permute(0, 2, 3, 1).cpu().contiguous().numpy()
