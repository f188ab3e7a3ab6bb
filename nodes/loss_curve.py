"""How a training goes, as a picture: what every step gave, and a smoothed line that shows where it leads.

The loss of a diffusion model tells little: it is large at some noise levels and small at others, and every step draws
new ones. So what is drawn is the error of each step against what the run had on average at the same noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 400)
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 20, 38, 44
_PAPER, _INK, _GRID = (255, 255, 255), (60, 60, 60), (226, 226, 226)
_EACH, _SMOOTH = (186, 205, 232), (24, 84, 168)
# Share of the losses that the axis leaves out at the top: jumps of the first steps, and single outliers.
_OUTLIERS = 0.02
# Of the polynomial that says what error to expect at a noise level.
_DEGREE = 3


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of about a tenth of the losses around each step, fewer at both ends, without single outliers."""
    reach, most = len(losses) // 20 + 1, _top(losses)
    sums = [0.0, *accumulate(min(loss, most) for loss in losses)]
    spans = [(max(0, step - reach), min(len(losses), step + reach + 1)) for step in range(len(losses))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _top(losses: Sequence[float]) -> float:
    """The largest loss but for outliers."""
    ordered = sorted(losses)
    return ordered[max(0, math.ceil(len(ordered) * (1 - _OUTLIERS)) - 1)]


def relative_errors(errors: Sequence[np.ndarray], log_snr: Sequence[np.ndarray]) -> list[float]:
    """Each step's error divided by what the run had on average at the same noise levels: above 1 at its start, below 1
    at its end where it learns.

    errors, log_snr: of the samples of each step, ``[B]``. The average is a polynomial of the log-SNR, fitted to the
    logarithm of the error.
    """
    import numpy as np

    levels = np.concatenate(log_snr).astype(np.float64)
    logarithms = np.log(np.maximum(np.concatenate(errors).astype(np.float64), 1e-12))
    degree = min(_DEGREE, len(np.unique(levels)) // 8)
    rest = logarithms - np.polyval(np.polyfit(levels, logarithms, degree), levels)
    ends = np.cumsum([len(step) for step in errors])[:-1]
    return [float(np.exp(step.mean())) for step in np.split(rest, ends)]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def loss_curve(losses: Sequence[float], steps: int | None = None, title: str = "Loss", first: int = 1) -> Image.Image:
    """The picture for the losses of the steps from `first` on; `steps`: of the whole run, where it is not over yet.

    Raises:
        ValueError: there is no loss.
    """
    from PIL import Image, ImageDraw

    if not losses:
        raise ValueError("There are no losses to draw, expected those of one step at least: train for a step first.")
    picture = Image.new("RGB", SIZE, _PAPER)
    draw, font, line = ImageDraw.Draw(picture), _font(13), smoothed(losses)
    low, high = _range(losses)
    done = first + len(losses) - 1
    last = max(steps or done, first + 1)
    width, height = SIZE[0] - _LEFT - _RIGHT, SIZE[1] - _TOP - _BOTTOM

    def place(step: float, loss: float) -> tuple[float, float]:
        share = min(max((loss - low) / (high - low), 0.0), 1.0)
        return _LEFT + width * (step - first) / (last - first), _TOP + height * (1 - share)

    _axes(draw, font, place, (low, high), (first, last))
    for values, colour, thickness in ((losses, _EACH, 1), (line, _SMOOTH, 3)):
        points = [place(step, value) for step, value in enumerate(values, start=first)]
        if len(points) == 1:
            (x, y) = points[0]
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        draw.line(points, fill=colour, width=thickness, joint="curve")
    how_far = f"{done}" if not steps or steps == done else f"{done} of {steps}"
    heading = f"{title}: {line[-1]:.3g} after {how_far} {'step' if how_far == '1' else 'steps'}"
    draw.text((_LEFT, 10), heading, fill=_INK, font=_font(16))
    return picture


def _range(losses: Sequence[float]) -> tuple[float, float]:
    """What the axis of losses spans: all of them but outliers, and zero where that is not far."""
    low, top = min(losses), _top(losses)
    if 0 < low < top / 2:
        low = 0.0
    if top - low <= abs(top) * 1e-6:  # all the same
        margin = abs(top) * 0.05 or 1.0
        return low - margin, top + margin
    return low, top + (top - low) * 0.04


def _axes(
    draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, place, span: tuple[float, float], run: tuple[int, int]
) -> None:
    left, bottom = place(run[0], span[0])
    right, top = place(run[1], span[1])
    for loss in ticks(*span):
        y = place(run[0], loss)[1]
        draw.line((left, y, right, y), fill=_GRID)
        text = f"{loss:.6g}"
        box = draw.textbbox((0, 0), text, font=font)
        draw.text((left - 8 - box[2], y - (box[1] + box[3]) / 2), text, fill=_INK, font=font)
    for step in sorted({run[0], *(round(tick) for tick in ticks(*run) if round(tick) >= run[0])}):
        x = place(step, span[0])[0]
        draw.line((x, bottom, x, bottom + 5), fill=_INK)
        text = str(step)
        box = draw.textbbox((0, 0), text, font=font)
        draw.text((x - box[2] / 2, bottom + 7), text, fill=_INK, font=font)
    box = draw.textbbox((0, 0), "step", font=font)
    draw.text(((left + right - box[2]) / 2, bottom + 23), "step", fill=_INK, font=font)
    draw.line((left, top, left, bottom, right, bottom), fill=_INK)


def _font(size: int) -> ImageFont.ImageFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):  # an older Pillow, or one without FreeType: small letters
        return ImageFont.load_default()
