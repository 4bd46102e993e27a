"""Masked autoencoders of vision transformers."""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import Answer
from modules.autoencoding.pictures import rows_of
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.images import psnr
from modules.networks import BackboneError
from modules.networks.parts import Draws
from modules.optimization import Optimization
from modules.pictures.sheets import to_uint8
from modules.ranges import PositiveInt, Share
from modules.spec import Backbone, DataSpec
from modules.training_data import share

PICTURED = 12  # number of images drawn


class _Visible(nn.Module):
    """Replaces the patch dropout of timm's transformers, and keeps selected patches; None keeps all.

    Args:
        prefix: number of tokens before the patches.
    """

    kept: Tensor | None = None

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """Selects float B×(prefix + kept)×D from float B×(prefix + N)×D."""
        if self.kept is None:
            return tokens
        index = self.kept[:, :, None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix :].gather(1, index)], 1)


class MaskedAutoencodingModule(VisionModule):
    """Masked autoencoder: a vision transformer encodes the visible patches of an image, and a small one reconstructs
    the masked ones (He et al. 2022, arXiv:2111.06377). It pretrains the backbone for other tasks; it is not for
    compression.

    The loss is the mean squared error over the masked patches. Metrics are MSE and PSNR over them, for values in [0,
    1]; in evaluation, the mask of an image depends on its content only.

    Args:
        data: description of the data.
        backbone: a plain vision transformer of timm; options are ``patch_size``, ``embed_dim``, ``depth`` and others.
        share: fraction of the patches that is masked, in (0, 1).
        decoder_dim: width of the decoder.
        decoder_depth: number of blocks of the decoder.
        decoder_heads: number of attention heads of each block.
        normalize_patches: predict patches normalised by their own mean and standard deviation, which improved features
            in the paper. Images and MSE use the true mean and standard deviation.
        optimization: optimiser, schedule and regularisation.
    """

    monitor = "val/loss"
    square = True
    compiles_features = True

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("vit_tiny_patch16_224", channels_last=False),
        optimization: Optimization | None = None,
        share: Share = 0.75,
        decoder_dim: PositiveInt = 128,
        decoder_depth: PositiveInt = 2,
        decoder_heads: PositiveInt = 4,
        normalize_patches: bool = True,
    ) -> None:
        super().__init__(data, backbone, optimization)
        self.reads_parts = True  # of the backbone: not its pooling
        if not isinstance(self.backbone, VisionTransformer):
            raise BackboneError(
                f"{backbone.name} is not a plain vision transformer, which a masked autoencoder needs: choose one, "
                "such as vit_tiny_patch16_224, or train python -m pipelines.autoencoding with --model.noise Masking."
            )
        self.share = share
        self.normalize_patches = normalize_patches
        self.decoder_options = {"dim": decoder_dim, "depth": decoder_depth, "heads": decoder_heads}
        self.patch = cast(int, self.backbone.patch_embed.patch_size[0])
        patches = cast(int, self.backbone.patch_embed.num_patches)
        self.masked = round(share * patches)
        if not 0 < self.masked < patches:
            raise BackboneError(f"--model.share {share} masks {self.masked} of {patches} patches: some must be left.")
        self.visible = _Visible(self.backbone.num_prefix_tokens)
        self.backbone.patch_drop = self.visible  # type: ignore[assignment]
        self.embed = nn.Linear(self.backbone.num_features, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.positions = nn.Parameter(torch.randn(1, patches, decoder_dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)))
        self.norm = nn.LayerNorm(decoder_dim)
        self.to_pixels = nn.Linear(decoder_dim, self.patch**2 * data.in_chans)
        self.register_load_state_dict_pre_hook(_renamed)
        self._evaluated = 0  # batches of the evaluation so far
        self._pictured: list[dict[str, Tensor]] = []

    @override
    def parts(self) -> dict[str, Any]:
        options = {f"decoder_{name}": value for name, value in self.decoder_options.items()}
        return {"share": self.share, "normalize_patches": self.normalize_patches, **options}

    def patchify(self, image: Tensor) -> Tensor:
        """Splits float B×C×S×S into patches, float B×N×(p²·C), row by row."""
        p = self.patch
        return image.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Joins patches, float B×N×(p²·C), to float B×C×S×S."""
        p, side = self.patch, self.image_size // self.patch
        return patches.view(-1, side, side, p, p, self.in_chans).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def reconstruct(self, image: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Masks patches at random and reconstructs them.

        Args:
            image: uint8 B×C×S×S.
            draws: random numbers.

        Returns:
            The reconstructed patches, float B×N×(p²·C), and the mask, bool B×N.
        """
        patches = self.positions.shape[1]
        order = draws.uniform(patches).argsort(1)
        self.visible.kept = kept = order[:, self.masked :]
        tokens = self.embed(self.last_features(self.normalize(image))[:, self.visible.prefix :])
        self.visible.kept = None
        index = kept[:, :, None].expand(-1, -1, tokens.shape[2])
        full = self.mask_token.to(tokens.dtype).repeat(len(image), patches, 1).scatter(1, index, tokens)
        masked = torch.ones_like(order, dtype=torch.bool).scatter(1, kept, False)
        return self.to_pixels(self.norm(self.blocks(full + self.positions))).float(), masked

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        return Losses({"loss": self._filled(batch["image"], True)[0]})

    @override
    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        loss, drawn, target, masked = self._filled(batch["image"], False)
        ours, true = (patches[masked].view(len(masked), -1) for patches in (drawn, target))
        with self.publisher.optional(f"{stage}/reconstructions"):
            done, self._evaluated = self._evaluated, self._evaluated + 1
            chosen = share(self.trainer, stage, done, PICTURED, len(target)).to(target.device)
            shown, hidden = target[chosen], masked[chosen, :, None]
            output = drawn[chosen].where(hidden, shown)
            self._pictured.append({"image": shown, "input": shown.masked_fill(hidden, 0.5), "output": output})
        return Losses({"loss": loss}, {"mse": F.mse_loss(ours, true), "psnr": psnr(ours, true).mean()})

    def _filled(self, image: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the loss; the reconstructed and the true patches, float B×N×(p²·C) in [0, 1]; and the mask, bool
        B×N."""
        output, masked = self.reconstruct(image, Draws(image, training))
        target = self.patchify(image.float() / 255)
        mean, spread = target.mean(2, keepdim=True), (target.var(2, keepdim=True) + 1e-6).sqrt()
        wanted = (target - mean) / spread if self.normalize_patches else target
        drawn = (output * spread + mean if self.normalize_patches else output).clamp(0, 1)
        return (output - wanted).square().mean(2)[masked].mean(), drawn, target, masked

    @override
    def report(self, stage: Stage) -> Report:
        pictured, self._pictured, self._evaluated = self._pictured, [], 0

        def reconstructions() -> NDArray[np.uint8]:
            rows = {name: torch.cat([part[name] for part in pictured]) for name in ("image", "input", "output")}
            return rows_of({name: to_uint8(self.unpatchify(row)) for name, row in rows.items()})

        return Report(pictures={"reconstructions": reconstructions})

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns the ``code`` of each image: the mean of the tokens of all patches, without masking."""
        tokens = self.last_features(self.normalize(batch["image"]))[:, self.visible.prefix :]
        return [{"code": code} for code in tokens.mean(1).double().mul(1e5).round().div(1e5).tolist()]


def _renamed(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Renames weights of earlier versions."""
    for key in [key for key in state if key.startswith(f"{prefix}predict.")]:
        state[f"{prefix}to_pixels.{key.removeprefix(f'{prefix}predict.')}"] = state.pop(key)
