"""Sliding-window inference for images of any size, in bounded memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

OVERLAP = 0.5  # of neighbouring windows, as a fraction of their side
WINDOWS = 4  # windows per forward pass


def window_starts(length: int, window: int, overlap: float = OVERLAP) -> list[int]:
    """Returns start positions of evenly spread windows that cover a length with at least the given overlap.

    Args:
        length: length in pixels.
        window: side of a window; if it is longer than the length, a single window starts at 0.
        overlap: minimum fraction of a window that the next one covers too, in [0, 1).
    """
    room = max(0, length - window)
    count = -(-room // max(1, int(window * (1 - overlap)))) + 1
    return [round(i * room / max(1, count - 1)) for i in range(count)]


def blending(height: int, width: int, device: torch.device) -> Tensor:
    """Returns the weight of each pixel of a window, float H×W: largest in the middle, small at the edge (Hann
    window)."""
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
    """Computes class probabilities of an image, strip by strip from the top.

    Windows overlap, and the probabilities in the overlap are blended to avoid seams. At most one strip of a window's
    height is kept in memory.

    Args:
        network: computes logits, float B×K×h×w, from uint8 B×C×h×w.
        image: uint8 C×H×W of any size; if it fits into a window, it is processed as a whole.
        window: height and width of a window, in pixels.
        device: device of the network.
        overlap: fraction of a window that the next one covers too, in [0, 1).

    Yields:
        Probabilities, float K×h×W; the heights sum up to H.
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
