"""Generative adversarial networks: image generation from noise."""

from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.adversarial.base import WATCHED, AdversarialModule, AdversarialOptimization, as_float, as_uint8
from modules.adversarial.health import Health
from modules.adversarial.objectives import NonSaturating, Objective, Regularizer, Verdict
from modules.adversarial.players import Encoder, Energy, Generator, Score, at_rest, normalize_spectrum
from modules.answers import Answer, HeadedAnswers
from modules.base import Stage
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.extractors import CHUNK, extractor_name
from modules.measures.images import gaussian_kl, psnr
from modules.measures.judge import Judge
from modules.measures.sets import compare_sets, frechet_distance
from modules.networks import BackboneError
from modules.networks.decoders import Decoder, Progressive, UpsampledConvolutions
from modules.networks.parts import Draws, describe, within
from modules.pictures.sheets import sheet
from modules.ranges import NonNegativeInt, PositiveInt
from modules.spec import Backbone, DataSpec
from modules.training_data import given_data, training_data
from modules.warm_start import ClassRows

PICTURED = 64


class GANModule(AdversarialModule):
    """GAN: a generator that creates images from noise, and a discriminator, a backbone with a score, that distinguishes
    them from real ones (Goodfellow et al. 2014, arXiv:1406.2661). The choice of parts determines the variant.

    | kind | parts |
    |---|---|
    | original | ``backbone: mlp``, ``generator: Dense``, ``objective: NonSaturating`` |
    | DCGAN | ``backbone: dcgan`` and ``TransposedConvolutions``, both with batch normalisation |
    | conditional | ``conditional: true`` |
    | WGAN-GP | ``Wasserstein`` with ``GradientPenalty``, three steps of the discriminator |
    | spectral normalisation | ``Hinge`` with ``spectral_norm: true`` |
    | R1 (the default) | ``NonSaturating`` with ``R1`` |
    | EBGAN-PT | ``EnergyBased`` |
    | BEGAN | ``BoundaryEquilibrium`` |
    | Progressive GAN | ``backbone: progressive`` and ``generator: Progressive``, with ``growth`` |
    | VAE-GAN | ``encoder: Encoder`` |

    Each batch of real images is one step of the discriminator, or a part of one if gradients are accumulated; after
    every ``discriminator_steps`` of them the generator makes a step, which ``global_step`` and ``max_steps`` count.
    Noise depends on the seed, the epoch and the batch, so that two processes draw the same noise as one with a batch of
    twice the size.

    The generator's moving average is evaluated with a feature extractor, whose name is part of the metrics' names,
    since metrics of different extractors are not comparable: ``fd`` (Fréchet distance, which is the FID if the
    extractor is Inception), ``kd`` (kernel distance), ``precision``, ``recall``, ``density``, ``coverage``, ``classes``
    (effective number), ``classifier_score``, ``novelty`` (distance to the nearest training image, relative to that of
    unseen real images; far below 1 for copies), and ``fd_floor``, the distance between real training images and the
    real images of the split. `Health` monitors the training and reports failures.

    Args:
        data: description of the data; ``label_names`` only if images have labels.
        backbone: the discriminator, such as ``dcgan``, ``mlp`` or any timm name; ``compile`` compiles both players.
        generator: decoder of the generator; by default convolutions with upsampling.
        objective: losses of both players; by default the non-saturating loss.
        regularizer: gradient penalty of the discriminator.
        discriminator_decoder: decoder of the discriminator, for objectives whose score is the error of an autoencoder.
        encoder: for a VAE-GAN, encodes an image as noise.
        latent_size: dimensions of the noise.
        conditional: generate images of a requested class.
        spectral_norm: divide the discriminator's weights by their largest singular value.
        growth: for a progressive pair, the generator's steps at each resolution; fading in the next one takes equally
            many.
        extractor: network of the metrics' features: a registered classifier (``models:/name@alias``) or a timm name
            with published weights. By default LeNet-5, trained for seconds on the labelled training images, or
            principal components without labels.
        num_samples: number of images that are generated for the metrics, and compared with as many real ones, evenly
            spread over the split.
        health_every: steps of the generator between two health checks.
        stop_on_failure: stop the training when it fails; the best checkpoint is kept.
        optimization: optimisers and schedules of both players.

    Raises:
        BackboneError: the backbone cannot be created, or parts are incompatible.
    """

    takes = ("label_names", "in_chans", "image_size")
    series: ClassVar[tuple[str, ...]] = ("val/samples",)

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("dcgan"),
        optimization: AdversarialOptimization | None = None,
        generator: Decoder | None = None,
        objective: Objective | None = None,
        regularizer: Regularizer | None = None,
        discriminator_decoder: Decoder | None = None,
        encoder: Encoder | None = None,
        latent_size: PositiveInt = 64,
        conditional: bool = False,
        spectral_norm: bool = False,
        growth: NonNegativeInt = 0,
        extractor: str | None = None,
        num_samples: PositiveInt = 1000,
        health_every: PositiveInt = 100,
        stop_on_failure: bool = False,
    ) -> None:
        super().__init__(data, backbone, optimization)
        self.answers = HeadedAnswers("realness {realness:.2f}")
        in_chans, image_size = data.in_chans, data.image_size
        self.latent_size, self.conditional, self.spectral_norm = latent_size, conditional, spectral_norm
        self.growth = growth
        self.extractor, self.num_samples, self.stop_on_failure = extractor, num_samples, stop_on_failure
        within("latent_size", latent_size, 1)
        within("num_samples", num_samples, 16)
        within("health_every", health_every, 1)
        self.num_classes = len(self.label_names) if len(self.label_names) > 1 else 0
        if conditional and not self.num_classes:
            raise BackboneError(
                "--model.conditional true needs images with classes: choose other data, or --model.conditional false."
            )
        classes = self.num_classes if conditional else 0
        self.objective = objective or NonSaturating()
        self.regularizer = regularizer
        features = getattr(self.backbone, "head_hidden_size", self.backbone.num_features)
        if conditional and encoder is not None:
            raise BackboneError(
                "--model.encoder encodes the whole image, including its class: give --model.conditional false, or no encoder."
            )
        if self.objective.energy:
            if conditional:
                raise BackboneError(
                    f"--model.objective {type(self.objective).__name__} scores images by the error of an autoencoder, which does not "
                    "depend on their class: choose another --model.objective, or --model.conditional false."
                )
            inner = discriminator_decoder or UpsampledConvolutions()
            self.head: nn.Module = Energy(inner, features, in_chans, image_size, latent_size, self.objective.energy)
        else:
            self.head = Score(features, classes)
        norms = [layer for layer in self.backbone.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        if norms and regularizer is not None:
            raise BackboneError(
                f"--model.regularizer {type(regularizer).__name__} needs a discriminator without batch normalisation, so that the score "
                "of an image does not depend on the others: take --model.backbone dcgan, or give --model.spectral_norm true."
            )
        if spectral_norm:
            normalize_spectrum(self.backbone)
            normalize_spectrum(self.head)
        layers = generator or UpsampledConvolutions(norm="batch")
        self.play(Generator(layers, latent_size, classes, in_chans, image_size, encoder))
        growing = [part for part in (self.backbone, self.generator.decoder) if hasattr(part, "phase")]
        if growing and (len(growing) < 2 or growth < 1):
            raise BackboneError(
                "Only both networks together can grow: give --model.backbone progressive, --model.generator Progressive, and with "
                "--model.growth the generator's steps at each resolution."
            )
        self._grown: tuple[Any, ...] = tuple([*growing, self.average.decoder] if growing else [])
        self.health: Health = Health(health_every)
        self.monitor = f"val/fd_{extractor_name(extractor, self.num_classes)}"
        self.judge: Judge = Judge(self, self._questions, extractor)
        self._right_share, self._real_mean = torch.zeros(()), torch.zeros(())
        self._fake_means: list[Tensor] = []
        self._images: list[Tensor] = []
        self._image_labels: list[Tensor] = []
        self._evaluated = 0

    @property
    @override
    def class_layers(self) -> dict[str, ClassRows]:
        names = ("generator.embedding", "average.embedding", "head.embedding") if self.conditional else ()
        return {name: ClassRows() for name in names}

    @override
    def parts(self) -> dict[str, Any]:
        return {
            "generator": describe(cast(Generator, self.generator).decoder),
            "objective": describe(self.objective),
            "discriminator_decoder": describe(self.head.decoder) if isinstance(self.head, Energy) else None,
            "encoder": describe(cast(Generator, self.generator).encoder),
            "latent_size": self.latent_size,
            "conditional": self.conditional,
            "spectral_norm": self.spectral_norm,
            "growth": self.growth,
        }

    # The players

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        """Generates images with the generator's moving average, float B×C×H×W in [-1, 1]; see `Generator`."""
        return self.average(noise, label)

    def discriminate(self, image: Tensor, label: Tensor | None) -> Verdict:
        """Applies the discriminator to normalised images, float B×C×H×W, with labels int64 B if it is conditional."""
        return cast(Verdict, self.head(self.backbone(image), image, label))

    def normalize(self, image: Tensor) -> Tensor:
        """See `VisionModule`; for growing networks, real images are reduced to the detail of generated ones."""
        return self._coarsened(super().normalize(image))

    def _coarsened(self, image: Tensor) -> Tensor:
        """Reduces float B×C×H×W to the detail of the generator's current resolution."""
        return cast(Progressive, self._grown[1]).coarsened(image) if self._grown else image

    def on_fit_start(self) -> None:
        """Checks that images have labels if needed: data sets of boxes or masks have class names, too.

        Raises:
            BackboneError: they have none.
        """
        super().on_fit_start()
        data, asked = given_data(self.trainer), self.conditional or self.extractor is None
        if self.num_classes and asked and data is not None and "label" not in data.samples("train", 1):
            raise BackboneError(
                f"The images of {data.title} do not have one class each, from which a classifier could learn to judge the samples. Name a "
                "network that judges them, --model.extractor models:/NAME@ALIAS or one of timm's, and give --model.conditional false."
            )

    def _questions(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, list[int]]:
        """Returns the targets of an extractor that is trained on the data: the class, if there are classes."""
        return (batch["label"], [self.num_classes]) if self.num_classes else (None, [])

    def _noise(self, count: int, *key: int) -> Tensor:
        """Draws noise for a batch, float32 count×latent_size."""
        return self.draw(lambda n, generator: torch.randn(n, self.latent_size, generator=generator), count, *key)

    @property
    def _encoder(self) -> Encoder | None:
        return cast(Generator, self.generator).encoder

    def _code(self, image: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Samples the encoder's distribution for images, uint8 B×C×H×W: float B×latent_size, and the KL divergence,
        float B."""
        assert self._encoder is not None
        mean, log_variance = self._encoder(image)
        code = mean + (0.5 * log_variance).exp() * self._noise(len(image), *key, 2)
        return code, gaussian_kl(mean, log_variance).sum(1)

    def reconstruct(self, image: Tensor) -> Tensor:
        """Reconstructs images, uint8 B×C×H×W, with the moving average of a VAE-GAN, float B×C×H×W in [-1, 1]."""
        encoder = cast(Generator, self.average).encoder
        assert encoder is not None
        return self.average(encoder(image)[0])

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Updates the resolution of a progressive pair."""
        super().on_train_batch_start(batch, batch_idx)
        for part in self._grown:
            part.phase.fill_(min(grown(self.global_step, self.growth), part.levels - 1))

    @override
    def discriminator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        label, size = batch["label"] if self.conditional else None, len(batch["image"])
        real = self.normalize(batch["image"])
        with torch.no_grad():
            noise = self._noise(size, *key)
            if self._encoder is not None:
                noise = torch.cat([noise, self._code(batch["image"], *key)[0]])
            fake = self.as_input(self.generator(noise, label))
        verdicts = self.discriminate(real, label), self.discriminate(fake, label)
        self._right_share, self._real_mean = self.accuracy(*verdicts), verdicts[0].score.detach().mean()
        losses = {"loss": self.objective.discriminator(*verdicts)}
        if self.regularizer is not None and self.discriminator_steps % self.regularizer.every == 0:
            # Bypasses `torch.compile`, which does not support double backward.
            score = lambda x: self.head(self.backbone.forward(x), x, label).score  # noqa: E731
            losses["penalty"] = self.regularizer(score, real, fake[:size])
        return losses

    @override
    def generator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        label, size = batch["label"] if self.conditional else None, len(batch["image"])
        noise, losses = self._noise(size, *key), dict[str, Tensor]()
        if self._encoder is None:
            verdict = self.discriminate(self.as_input(self.generator(noise, label)), label)
        else:
            code, kl = self._code(batch["image"], *key)
            # Divided by the weight in the backward pass: the encoder's gradient is that of the unweighted likeness.
            weight = self._encoder.weight
            unweighted = code.detach() + (code - code.detach()) / weight
            made = self.generator(torch.cat([unweighted, code.detach(), noise]))
            score, features = self.discriminate(self.as_input(made), None)
            with torch.no_grad():
                wanted = self.discriminate(self.normalize(batch["image"]), None).features
            variance = (wanted - wanted.mean(0)).float().square().mean().clamp_min(1e-6)
            likeness = 0.5 * (features[:size] - wanted).float().square().flatten(1).sum(1).mean() / variance
            losses = {"likeness": weight * likeness, "kl": kl.mean()}
            verdict = Verdict(score[size:], features[size:])
        self._fake_means.append(verdict.score.detach().mean())
        return {"generator_loss": self.objective.generator(verdict)} | losses

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Updates the objective with the players' scores, and checks the health of the training at intervals."""
        means = torch.stack([self._right_share, self._real_mean, torch.stack(self._fake_means).mean()])
        self._fake_means = []
        if self.trainer.world_size > 1:
            means = cast(Tensor, self.trainer.strategy.reduce(means, reduce_op="mean"))
        figures = self.objective.after_step(means[1], means[2])
        self.health.note(step + 1, means[0], self.gradient_norm)
        if (step + 1) % self.health.every == 0:
            self.check_health(step + 1)
        return figures

    # Evaluation

    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        """Computes the discriminator's loss for real images and as many generated ones; keeps the real images for the
        metrics."""
        image, label = batch["image"], batch["label"] if self.conditional else None
        noise = Draws(image, False).normal(self.latent_size).to(self.device)
        fake = self.discriminate(self.as_input(self.generator(noise, label)), label)
        figures = {}
        if self._encoder is not None:
            made = (self.reconstruct(image).float() + 1) / 2
            figures["psnr"] = psnr(made, image.float() / 255).mean()
        chosen = self._compared(stage, len(image))
        self._images.append(image[chosen])
        self._image_labels.append(batch.get("label", torch.zeros(len(image), device=self.device))[chosen].long())
        loss = self.objective.discriminator(self.discriminate(self.normalize(image), label), fake)
        return Losses({"loss": loss}, figures)

    def _compared(self, stage: Stage, size: int) -> Tensor:
        """Chooses the images of a batch of this size that are compared with generated ones, bool N: spread evenly over
        the split, which may be sorted by class."""
        trainer, world = self.trainer, self.trainer.world_size
        batches = (trainer.num_test_batches if stage == "test" else trainer.num_val_batches)[0]
        loader: Any = trainer.test_dataloaders if stage == "test" else trainer.val_dataloaders
        total = int(len(training_data(trainer).sources[stage]) * batches / len(loader))
        place = torch.arange(self._evaluated, self._evaluated + size, device=self.device) * world + trainer.global_rank
        self._evaluated += size
        count = min(self.num_samples, total)
        return (place + 1) * count // total > place * count // total

    def _fixed_samples(self, count: int, labels: Tensor | None) -> Tensor:
        """Generates images with the moving average from fixed noise, uint8 count×C×H×W; processes share the work."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        chunks = -(-count // CHUNK)
        mine = []
        for chunk in range(rank, -(-chunks // world) * world, world):
            label = None
            if self.conditional:
                assert labels is not None
                label = labels[torch.arange(chunk * CHUNK, (chunk + 1) * CHUNK, device=labels.device) % len(labels)]
            mine.append(as_uint8(self.average(_noise_of(chunk, self.latent_size).to(self.device), label)))
        return self.gathered(torch.stack(mine)).flatten(0, 1)[:count]

    @torch.no_grad()
    @override
    def report(self, stage: Stage) -> Report:
        images, labels = torch.cat(self._images), torch.cat(self._image_labels)
        self._images, self._image_labels, self._evaluated = [], [], 0
        if self.trainer.sanity_checking:
            return Report()
        images, labels = self.gathered(images)[: self.num_samples], self.gathered(labels)[: self.num_samples]
        extractor, real = self.judge.extractor, self.judge.seen(stage, images)
        fakes = self._fixed_samples(self.num_samples, labels)
        fake = extractor(fakes)
        figures = compare_sets(real.features, fake.features, real.probabilities, fake.probabilities)
        training = self.judge.training["image"].to(self.device)
        known = self.judge.seen("training", training)
        even = torch.linspace(0, len(training) - 1, min(self.num_samples, len(training))).long()
        figures["fd_floor"] = frechet_distance(real.features, known.features[even.to(self.device)])
        reach = [nearest_distances(seen.features, known.features).median() for seen in (fake, real)]
        figures["novelty"] = float(reach[0] / reach[1].clamp_min(1e-12))
        report = Report({f"{name}_{extractor.name}": value for name, value in figures.items()})
        counted = f"{len(fakes)} of the generator's average, {len(images)} real ({stage})"
        self.publisher.tags(self.trainer, {"samples": counted})

        def some(count: int) -> Tensor:  # of a split that is sorted by class, from all of it
            return torch.linspace(0, count - 1, min(8, count), device=self.device).long()

        def neighbours() -> NDArray[np.uint8]:
            shown = some(len(fakes))
            order = torch.cdist(fake.features[shown], known.features).topk(min(7, len(training)), largest=False).indices
            rows = torch.cat([fakes[shown, None], training[order]], 1).flatten(0, 1)
            return sheet(rows, len(rows) // 8, heading="sample, and nearest in training")

        report.pictures = {
            "samples": lambda: sheet(as_uint8(self._by_class()) if self.conditional else fakes[:PICTURED]),
            "interpolation": lambda: sheet(as_uint8(self._interpolation()), 9),
            "neighbours": neighbours,
        }
        if self._encoder is not None:
            seen = images[some(len(images))]
            report.pictures["reconstructions"] = lambda: sheet(torch.cat([seen, as_uint8(self.reconstruct(seen))]))
        return report

    def _by_class(self, columns: int = 8) -> Tensor:
        """Generates a row of images for each class, up to 32, with the same noise in each column."""
        rows = min(self.num_classes, 32)
        noise = _noise_of(0, self.latent_size)[:columns].repeat(rows, 1).to(self.device)
        return self.average(noise, torch.arange(rows, device=self.device).repeat_interleave(columns))

    def _interpolation(self, rows: int = 6, steps: int = 9) -> Tensor:
        """Generates rows of interpolations between two noise vectors, on the sphere."""
        ends = _noise_of(1, self.latent_size)[: 2 * rows].view(rows, 2, -1)
        between = torch.cat([slerp(one, other, steps) for one, other in ends]).to(self.device)
        label = None
        if self.conditional:
            label = torch.arange(rows, device=self.device).repeat_interleave(steps) % self.num_classes
        return self.average(between, label)

    # Health

    @torch.no_grad()
    def check_health(self, step: int) -> None:
        """Checks the health of the training on images from fixed noise, compared with training images."""
        training = self.judge.training
        even = torch.linspace(0, len(training["image"]) - 1, WATCHED).long().unique()
        images = as_uint8(self._coarsened(as_float(training["image"][even].to(self.device))))
        label = training["label"][even].to(self.device) if self.conditional else None
        noise = torch.cat([_noise_of(chunk, self.latent_size) for chunk in range(-(-len(images) // CHUNK))])
        with at_rest(self.generator):
            made = self.generator(noise[: len(images)].to(self.device), label)
        self.tell_health(step, images, made, lambda seen: seen.probabilities)

    # Inference

    @torch.inference_mode()
    def sample(self, count: int, seed: int = 0, label: int | None = None) -> Tensor:
        """Generates images.

        Args:
            count: number of images.
            seed: random seed; equal seeds give equal images.
            label: class, if the generator is conditional; by default all classes in turn.

        Returns:
            uint8 count×C×H×W.

        Raises:
            ValueError: there is no such class.
        """
        if label is not None and not (self.conditional and 0 <= label < self.num_classes):
            known = f"it knows {self.num_classes}, from 0 on" if self.conditional else "it is not conditional"
            raise ValueError(f"The generator cannot be asked for class {label}: {known}.")
        noise = torch.randn(count, self.latent_size, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(count) % max(1, self.num_classes) if label is None else torch.full((count,), label)
        made = []
        for part, of in zip(noise.split(CHUNK), labels.split(CHUNK), strict=True):
            asked = of.to(self.device) if self.conditional else None
            made.append(as_uint8(self.average(part.to(self.device), asked)))
        return torch.cat(made)

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns ``realness`` for each image, the discriminator's score: higher is more real, on an arbitrary scale.

        For a conditional discriminator, it is the score of the best-matching class.
        """
        image = self.normalize(batch["image"])
        features = self.backbone(image)
        if self.conditional:
            labels = torch.arange(self.num_classes, device=self.device)
            scores = torch.stack([self.head(features, image, k.expand(len(image))).score for k in labels])
            score = scores.max(0).values
        else:
            score = self.head(features, image, None).score
        score = -score if self.objective.energy else score
        return [{"realness": round(value, 5)} for value in score.tolist()]


def grown(step: int, growth: int) -> float:
    """Returns the phase of growing networks: 0 for only the first resolution, 0.5 if the second one is half faded in.

    Args:
        step: step of the generator.
        growth: steps at each resolution, and to fade in the next one.
    """
    level, rest = divmod(step, 2 * growth)
    return level + max(0.0, rest / growth - 1)


def _noise_of(chunk: int, size: int) -> Tensor:
    """Returns fixed noise, float32 CHUNK×size."""
    return torch.randn(CHUNK, size, generator=torch.Generator().manual_seed(10_000 + chunk))


def slerp(one: Tensor, other: Tensor, steps: int) -> Tensor:
    """Interpolates spherically between two vectors (White 2016, arXiv:1609.04468), float steps×F."""
    angle = torch.arccos((torch.dot(one, other) / (one.norm() * other.norm())).clamp(-1 + 1e-6, 1 - 1e-6))
    share = torch.linspace(0, 1, steps)[:, None]
    return (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)


def nearest_distances(features: Tensor, known: Tensor) -> Tensor:
    """Computes the distance of each row of float N×F to the nearest row of float M×F, float64 N."""
    known = known.double()
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(p.double(), known, compute_mode=exact).min(1).values for p in features.split(256)])
