"""Classification of sequences: video clips and series of numbers."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from typing_extensions import override

from modules.callbacks.means import Losses
from modules.classification import ClassificationModule
from modules.networks import BackboneError
from modules.optimization import Optimization
from modules.pictures.sheets import written
from modules.ranges import NonNegative, PositiveInt, ShareBelowOne
from modules.spec import Backbone, DataSpec

Cell = Literal["rnn", "lstm", "gru"]
CELLS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
PAGE = 112  # side of a drawn series, in pixels


class SequenceModule(ClassificationModule):
    """Sequence classification: a backbone applied to each frame, a recurrent network over its layer-normalised features
    (Ba et al. 2016, arXiv:1607.06450), and a linear classifier of the last state, trained with cross-entropy. A series
    of numbers is a clip of frames of one pixel.

    Metrics and images are those of `ClassificationModule`; four frames of a clip are shown.

    Args:
        data: description of the data.
        backbone: the network that is applied to each frame.
        optimization: optimiser, schedule and regularisation.
        cell: ``rnn``, the plain recurrent network with tanh (Elman 1990, doi:10.1207/s15516709cog1402_1); ``lstm``
            (Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of Gers et al. 2000);
            or ``gru`` (Cho et al. 2014, arXiv:1406.1078).
        hidden_size: size of the recurrent state.
        num_layers: number of stacked recurrent layers.
        label_smoothing: see `ClassificationModule`.
        focal_gamma: see `ClassificationModule`.

    Raises:
        BackboneError: the transfer strategy is only available for images.
    """

    any_bands = False
    any_tabular = False
    needs = ("label", "length")
    mirrors = False
    solve_head = None  # type: ignore[assignment]  # the head's features are not the backbone's

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("lenet5"),
        optimization: Optimization | None = None,
        cell: Cell = "lstm",
        hidden_size: PositiveInt = 128,
        num_layers: PositiveInt = 1,
        label_smoothing: ShareBelowOne = 0.0,
        focal_gamma: NonNegative = 0.0,
    ) -> None:
        if backbone.transfer == "auto":
            raise BackboneError(
                "--model.backbone.transfer auto measures pictures, and this task has sequences of them: choose scratch, "
                "features, finetune or freeze_unfreeze."
            )
        super().__init__(data, backbone, optimization, label_smoothing, focal_gamma=focal_gamma)
        self.cell, self.hidden_size, self.num_layers = cell, hidden_size, num_layers
        self.norm = nn.LayerNorm(self.head.in_features)  # large features would saturate the gates
        self.recurrent = CELLS[cell](self.head.in_features, hidden_size, num_layers, batch_first=True)
        if cell != "rnn":  # biases keep the gates of the state open at first (Jozefowicz et al. 2015)
            with torch.no_grad():
                for bias in (value for name, value in self.recurrent.named_parameters() if name.startswith("bias_hh")):
                    bias[hidden_size : 2 * hidden_size] = 1  # f of the LSTM, z of the GRU
        self.head = nn.Linear(hidden_size, data.num_classes)

    @override
    def parts(self) -> dict[str, Any]:
        return {"cell": self.cell, "hidden_size": self.hidden_size, "num_layers": self.num_layers}

    @override
    def forward(self, clip: Tensor, length: Tensor | None = None) -> Tensor:
        """Computes logits of clips. Frames after the end of a clip are skipped by the backbone and the recurrent
        network.

        Args:
            clip: uint8 B×T×C×H×W; an image, B×C×H×W, is a clip of one frame.
            length: number of valid frames of each clip, int64 B; None for T.

        Returns:
            Logits, float B×K.
        """
        clip = clip[:, None] if clip.ndim == 4 else clip
        lengths = torch.full((len(clip),), clip.shape[1]) if length is None else length
        own = torch.arange(clip.shape[1], device=clip.device) < lengths.to(clip.device)[:, None]
        frames = clip[own].contiguous(memory_format=torch.channels_last)
        features = self.norm(self.backbone(self.normalize(frames)))
        padded = features.new_zeros(*own.shape, features.shape[1])
        padded[own] = features
        packed = pack_padded_sequence(padded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        state = self.recurrent(packed)[1]
        last = state[0] if self.cell == "lstm" else state  # of all layers, float L×B×H
        return self.head(last[-1])

    @override
    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self(batch["image"], batch["length"])

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        logits, label = self.logits(batch), batch["label"]
        return Losses({"loss": self._loss(logits, label)}, {"accuracy": (logits.argmax(1) == label).float().mean()})

    @override
    def shown(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """See `ClassificationModule.shown`: four frames of a clip, in two rows; or the numbers of a series."""
        clip = batch["image"][index, : batch["length"][index]].cpu()
        if self.image_size == 1:
            numbers = [str(number) for number in clip.flatten().tolist()]
            rows = [" ".join(numbers[k : k + 4]) for k in range(0, len(numbers), 4)]
            page = written("\n".join(rows), width=PAGE)[:PAGE]
            page = np.pad(page, ((0, PAGE - len(page)), (0, 0), (0, 0)), constant_values=255)
            return torch.from_numpy(page).permute(2, 0, 1)
        four = clip[torch.linspace(0, len(clip) - 1, 4).long()]
        return torch.cat([torch.cat([*four[:2]], 2), torch.cat([*four[2:]], 2)], 1)
