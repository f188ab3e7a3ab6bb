"""Read a picture back into the words of a scene: the ruler of the tiny family.

The background is modelled from the border: one colour, or a profile down the rows or along the columns. What differs
from it falls into connected components; each has a colour (nearest named one in Lab), a size (half of its box), a
position (centre of its box on the 3 x 3 grid) and a shape (best overlap with templates of the shapes as they are
drawn). The checker never sees the scene. Its own score on drawn pictures is the ceiling of every score it gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from PIL import Image, ImageFilter

from .drawing import COLOURS, RADIUS_LIMIT, SHAPES, Scene, position_name, rgb_to_lab, signed_distance

SIDE = 128
_BORDER = 2
_SAME = 20.0  # Lab distance up to which two colours count as the same; named colours are at least 42 apart
_MIN_AREA = 0.008  # of the picture; the smallest object that is drawn covers .026
_MIN_SHARE = 0.1  # of a component, for a second colour in it to be an object of its own
_GRID = 32
_SOFT = 2  # pixels that a soft outline takes


@dataclass(frozen=True)
class ObjectReading:
    """One object as read. `overlap` is the soft intersection over union with the best template, 0..1."""

    colour: str
    shape: str
    size: str
    position: str
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `second` is the other colour of a striped or graded background, else an empty string."""

    background: str
    pattern: str
    second: str
    objects: tuple[ObjectReading, ...]


def read_picture(picture: np.ndarray) -> Reading:
    """Read a picture [H, W, 3], uint8 in 0..255 or floating point in 0..1. Objects come with the largest first.

    Raises ValueError for any other shape.
    """
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"The checker was given an array of shape {picture.shape}, expected [H, W, 3]: pass one picture."
        )
    if picture.dtype != np.uint8:
        picture = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    small = Image.fromarray(np.ascontiguousarray(picture)).resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float64)
    behind, names = _background(pixels)
    distance = np.linalg.norm(rgb_to_lab(pixels) - rgb_to_lab(behind), axis=-1)
    masks = [part for mask in components(distance > _SAME) for part in _by_colour(mask, pixels)]
    masks = sorted((m for m in masks if m.mean() >= _MIN_AREA), key=lambda m: -m.sum())
    objects = []
    for mask in masks:
        others = np.zeros_like(mask)
        for other in masks:
            if other is not mask:
                others |= other
        objects.append(_read_object(mask, others, pixels, behind, distance))
    return Reading(*names, objects=tuple(objects))


def score(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Which of background, count, colour, shape, size and position are right, and `all`.

    `background` asks for the pattern and both of its colours; `background colour` only that no colour is read in the
    background that the scene does not have there, whatever the pattern. `all` asks for the former.
    An attribute of the objects is right where every object of the scene has it, objects matched so that most agrees.
    """
    kind = scene.pattern == reading.pattern
    background = kind and {scene.background, scene.second} == {reading.background, reading.second}
    named = {scene.background, scene.second} - {""}
    read = {reading.background, reading.second} - {""}
    result = {
        "background": background,
        "background colour": read <= named,
        "count": len(reading.objects) == len(scene.objects),
    }
    fields = ("colour", "shape", "size", "position")
    best = dict.fromkeys(fields, False)
    missing: list[ObjectReading | None] = [None] * max(len(scene.objects) - len(reading.objects), 0)
    # A picture that falls apart into many pieces is wrong anyway: its largest ones are enough to match.
    seen = [*reading.objects[:4], *missing]
    most = -1
    for order in permutations(seen, len(scene.objects)):
        pairs = list(zip(scene.objects, order, strict=True))
        right = {name: [r is not None and getattr(o, name) == getattr(r, name) for o, r in pairs] for name in fields}
        agreeing = sum(map(sum, right.values()))
        if agreeing > most:
            most, best = agreeing, {name: all(values) for name, values in right.items()}
    result |= best
    result["all"] = all(result.values())
    return result


@lru_cache(maxsize=1)
def _palette() -> tuple[list[str], np.ndarray]:
    return list(COLOURS), rgb_to_lab(np.asarray(list(COLOURS.values()), dtype=np.float64))


def _nearest(lab: np.ndarray) -> np.ndarray:
    return np.linalg.norm(lab[..., None, :] - _palette()[1], axis=-1).argmin(-1)


def colour_name(rgb: np.ndarray) -> str:
    """The named colour nearest in Lab to an sRGB colour [3] in 0..255."""
    return _palette()[0][int(_nearest(rgb_to_lab(rgb)))]


def _background(pixels: np.ndarray) -> tuple[np.ndarray, tuple[str, str, str]]:
    """The picture without its objects [SIDE, SIDE, 3], and (background, pattern, second)."""
    edge = np.zeros((SIDE, SIDE), dtype=bool)
    edge[:_BORDER] = edge[-_BORDER:] = edge[:, :_BORDER] = edge[:, -_BORDER:] = True
    border = rgb_to_lab(pixels[edge])
    rows = np.concatenate([pixels[:, :_BORDER], pixels[:, -_BORDER:]], axis=1).mean(axis=1)
    columns = np.concatenate([pixels[:_BORDER], pixels[-_BORDER:]], axis=0).mean(axis=0)
    plain = np.median(pixels[edge], axis=0)
    models = [np.broadcast_to(m, pixels.shape) for m in (plain, rows[:, None], columns[None])]
    explained = [(np.linalg.norm(rgb_to_lab(m[edge]) - border, axis=-1) < _SAME).mean() for m in models]
    if explained[0] >= 0.85 or explained[0] >= max(explained):
        return models[0], (colour_name(plain), "plain", "")
    best = 1 if explained[1] >= explained[2] else 2
    line = rows if best == 1 else columns
    lab = rgb_to_lab(line)
    start = np.median(lab[:4], axis=0)
    from_start = np.linalg.norm(lab - start, axis=-1)
    end = np.median(lab[from_start >= np.quantile(from_start, 0.95)], axis=0)
    # Stripes stay near their two colours, a gradient spends half of its way more than a quarter away from both.
    reach = 0.25 * np.linalg.norm(end - start)
    at_ends = np.minimum(from_start, np.linalg.norm(lab - end, axis=-1)) < reach
    first, second = (_palette()[0][int(_nearest(v))] for v in (start, end))
    if first == second:
        return models[0], (colour_name(plain), "plain", "")
    return models[best], (first, "striped" if at_ends.mean() > 0.7 else "graded", second)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts (8 neighbours) of a boolean mask [H, W], as masks: runs of each row joined by union-find."""
    runs: list[tuple[int, int, int]] = []
    parent: list[int] = []

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    above: list[int] = []
    for y, row in enumerate(mask):
        steps = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
        current = []
        for start, stop in zip(steps[::2].tolist(), steps[1::2].tolist(), strict=True):
            index = len(runs)
            runs.append((y, start, stop))
            parent.append(index)
            current.append(index)
            for other in above:
                if runs[other][1] <= stop and start <= runs[other][2]:
                    parent[root(other)] = root(index)
        above = current
    parts: dict[int, np.ndarray] = {}
    for index, (y, start, stop) in enumerate(runs):
        parts.setdefault(root(index), np.zeros_like(mask))[y, start:stop] = True
    return list(parts.values())


def _by_colour(mask: np.ndarray, pixels: np.ndarray) -> list[np.ndarray]:
    """A component, or its parts where it holds two objects of different colours that touch."""
    # On a soft outline the object mixes with the background into colours that mean nothing: look at the inside.
    core = ~_grown(~mask, _SOFT)
    if not core.any():
        return [mask]
    lab = rgb_to_lab(pixels[core])
    counts = np.bincount(_nearest(lab), minlength=len(COLOURS))
    main = [int(name) for name in np.argsort(-counts) if counts[name] >= _MIN_SHARE * counts.sum()]
    while len(main) > 1:
        owner = np.full(mask.shape, -1)
        owner[core] = np.linalg.norm(lab[:, None] - _palette()[1][main], axis=-1).argmin(-1)
        seeds = [max(components(owner == index), key=np.sum) for index in range(len(main))]
        # A halo of mixed colour lies around or inside its object, two objects lie side by side.
        halos = [
            index
            for index, seed in enumerate(seeds)
            if seed.mean() < _MIN_AREA / 2
            or any(_box_inside(*pair) for s in seeds[:index] for pair in ((s, seed), (seed, s)))
        ]
        if not halos:
            taken = [_grown(seed, _SOFT) for seed in seeds]
            return [
                _grown(seed, _SOFT + 1) & mask & ~np.logical_or.reduce(taken[:index] + seeds[index + 1 :])
                for index, seed in enumerate(seeds)
            ]
        del main[halos[-1]]
    return [mask]


def _box_inside(inner: np.ndarray, outer: np.ndarray) -> bool:
    def inside(axis: int) -> bool:
        a, b = (np.flatnonzero(m.any(axis=axis)) for m in (inner, outer))
        return bool(b[0] <= a[0] and a[-1] <= b[-1])

    return inside(0) and inside(1)


def _read_object(
    mask: np.ndarray, others: np.ndarray, pixels: np.ndarray, behind: np.ndarray, distance: np.ndarray
) -> ObjectReading:
    core = mask & (distance >= np.median(distance[mask]))
    colour = np.median(pixels[core], axis=0)
    # How much of each pixel the object covers: pictures are blended in sRGB, so this inverts the anti-aliasing.
    line = colour - behind
    alpha = ((pixels - behind) * line).sum(-1) / np.maximum((line * line).sum(-1), 1)
    alpha = np.where(_grown(mask) & ~others, alpha, 0).clip(0, 1)
    left, right = _extent(alpha.max(axis=0))
    top, bottom = _extent(alpha.max(axis=1))
    radius = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    # A frame wider than the object, so that the templates can be tried a little larger and a little shifted.
    reach = radius * 1.2
    frame = Image.fromarray(np.pad(alpha, SIDE).astype(np.float32)).resize(
        (_GRID, _GRID),
        Image.Resampling.BOX if 2 * reach > _GRID else Image.Resampling.BILINEAR,
        box=tuple(v + SIDE for v in (x - reach, y - reach, x + reach, y + reach)),
    )
    templates, shapes, extents = _templates()
    flat = np.asarray(frame, dtype=np.float64).ravel()
    overlap = np.minimum(templates, flat).sum(1) / np.maximum(templates, flat).sum(1)
    best = int(overlap.argmax())
    return ObjectReading(
        colour=colour_name(colour),
        shape=shapes[best],
        size="small" if radius / extents[best] / SIDE < RADIUS_LIMIT else "large",
        position=position_name(x / SIDE, y / SIDE),
        overlap=float(overlap[best]),
    )


def _grown(mask: np.ndarray, times: int = 1) -> np.ndarray:
    for _ in range(times):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Where a profile of coverage rises above one half for the first and the last time, between pixels."""
    inside = np.flatnonzero(profile >= 0.5)
    if not len(inside):
        inside = np.array([int(profile.argmax())])
    first, last = int(inside[0]), int(inside[-1])
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first - float(before), last + 1 + float(after)


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, list[str], list[float]]:
    """Coverage of every shape, sharp and soft, scaled and shifted a little [N, GRID * GRID]; its name; its half box."""
    fine = 4
    axis = ((np.arange(_GRID * fine) + 0.5) / (_GRID * fine) * 2 - 1) * 1.2
    rows, names, extents = [], [], []
    for shape in SHAPES:
        probe = np.linspace(-1.05, 1.05, 421)
        inside = signed_distance(shape, probe[None], probe[:, None]) <= 0
        extent = float(np.abs(probe[inside.any(axis=0)]).max())
        # A soft picture has lost the tips by which its size was taken, so that soft templates go to larger scales.
        for blur, scale in ((0.0, 0.92), (0.0, 1.0), (0.0, 1.08), (1.5, 0.95), (1.5, 1.08), (1.5, 1.2)):
            for dx, dy in product((-0.06, 0.0, 0.06), repeat=2):
                x, y = (axis - dx)[None] * extent / scale, (axis - dy)[:, None] * extent / scale
                cover = Image.fromarray(np.where(signed_distance(shape, x, y) <= 0, 255, 0).astype(np.uint8))
                cover = cover.filter(ImageFilter.GaussianBlur(blur * fine)).reduce(fine)
                rows.append(np.asarray(cover, dtype=np.float64).ravel() / 255)
                names.append(shape)
                extents.append(extent)
    return np.stack(rows), names, extents
