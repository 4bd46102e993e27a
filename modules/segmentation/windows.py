"""A picture of any size through a network that sees a part at a time, in bounded memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

OVERLAP = 0.5  # of neighbouring windows
WINDOWS = 4  # that go through the network together


def window_starts(length: int, window: int, overlap: float = OVERLAP) -> list[int]:
    """Where windows begin so that they cover a length, evenly spread, with at least this overlap.

    Args:
        length: in pixels.
        window: side of a window; one that is longer than the length begins at 0.
        overlap: least share of a window that the next one sees too, in [0, 1).
    """
    room = max(0, length - window)
    count = -(-room // max(1, int(window * (1 - overlap)))) + 1
    return [round(i * room / max(1, count - 1)) for i in range(count)]


def blending(height: int, width: int, device: torch.device) -> Tensor:
    """How much each pixel of a window counts, float H×W: most in the middle, a little at the edge (Hann's window)."""
    y, x = (torch.hann_window(side + 2, False, device=device)[1:-1].clamp(min=1e-3) for side in (height, width))
    return y[:, None] * x


@torch.no_grad()
def strips(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    window: tuple[int, int],
    device: torch.device,
    overlap: float = OVERLAP,
) -> Iterator[Tensor]:
    """Class probabilities of a picture, strip by strip from the top.

    Windows overlap, and where they do their probabilities are blended, so that no seam shows. Never more is held than a
    strip of a window's height.

    Args:
        network: uint8 B×C×h×w to logits, float B×K×h×w.
        image: uint8 C×H×W, of any size; what fits into a window goes through as a whole.
        window: height and width of a window, in pixels.
        device: where the network is.
        overlap: share of a window that the next one sees too, in [0, 1).

    Yields:
        float K×h×W; the heights sum up to H.
    """
    _, height, width = image.shape
    rows, columns = (window_starts(*sides, overlap) for sides in zip((height, width), window, strict=True))
    tall, wide = min(window[0], height), min(window[1], width)
    share = blending(tall, wide, device)
    total = weight = torch.zeros(0)
    for row, next_row in zip(rows, [*rows[1:], height], strict=True):
        pieces = [image[:, row : row + tall, x : x + wide] for x in columns]
        for first in range(0, len(columns), WINDOWS):
            likely = network(torch.stack(pieces[first : first + WINDOWS]).to(device)).float().softmax(1) * share
            if not len(total):
                total = likely.new_zeros(likely.shape[1], tall, width)
                weight = likely.new_zeros(tall, width)
            for x, part in zip(columns[first:], likely, strict=False):
                total[:, :, x : x + wide] += part
                weight[:, x : x + wide] += share
        done = next_row - row
        yield total[:, :done] / weight[:done]
        rest = tall - done
        total[:, :rest], weight[:rest] = total[:, done:].clone(), weight[done:].clone()
        total[:, rest:], weight[rest:] = 0, 0
