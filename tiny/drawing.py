"""The pictures that the tiny family learns from: one or two flat shapes on a coloured background.

A `Scene` says everything about one picture; `random_scene` draws a scene from a seeded generator, `render` turns it
into pixels with analytic anti-aliasing. All lengths are fractions of the side of the picture, x to the right and y
down, so that a scene can be rendered at any size.

Three disjoint splits keep the measurements honest. `held_out` scenes show a colour-shape pair that training never
shows; `test` scenes show known pairs in a combination of attributes that training never shows; `train` is the rest.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (250, 140, 26),
    "yellow": (250, 226, 60),
    "green": (32, 150, 62),
    "cyan": (70, 210, 224),
    "blue": (28, 84, 206),
    "purple": (150, 38, 142),
    "white": (248, 248, 248),
    "black": (20, 20, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
POSITION_NAMES = tuple(name for row in POSITIONS for name in row)
PATTERNS = ("plain", "striped", "graded")
SPLITS = ("train", "test", "held_out")

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "cross"),
        ("yellow", "triangle"),
        ("green", "ring"),
        ("blue", "square"),
        ("purple", "circle"),
    }
)
TEST_PERCENT = 8

GRID_LIMITS = (0.4, 0.6)  # a centre below the first is left or top, above the second right or bottom
RADIUS_LIMIT = 0.22  # between the largest small object and the smallest large one
_RADII = {"small": (0.15, 0.17), "large": (0.27, 0.30)}
_ANCHORS = {"small": (0.23, 0.5, 0.77), "large": (0.32, 0.5, 0.68)}
_JITTER = {"small": 0.02, "large": 0.01}
_MARGIN = 0.015
_TINT = 5
_STRIPES = 6
_LAB_SEPARATION = 34.0


@dataclass(frozen=True)
class SceneObject:
    """One shape. The names are what a caption says; `x`, `y`, `radius` (fractions) and `rgb` are what is drawn."""

    shape: str
    colour: str
    size: str
    position: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom; every shape touches this box and stays inside it."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Scene:
    """One picture. `second` is the other colour of a striped or graded background, else an empty string;
    `horizontal` says that stripes lie flat, or that a graded background changes from top to bottom."""

    background: str
    rgb: tuple[int, int, int]
    objects: tuple[SceneObject, ...]
    pattern: str = "plain"
    second: str = ""
    horizontal: bool = True

    @property
    def key(self) -> str:
        """The named attributes in a fixed order: what decides the split, whatever the jitter and the wording."""
        objects = sorted(f"{o.colour} {o.shape} {o.size} {o.position}" for o in self.objects)
        return "|".join([f"{self.pattern} {self.background} {self.second}", *objects])


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to, from its named attributes alone."""
    if any((o.colour, o.shape) in HELD_OUT_PAIRS for o in scene.objects):
        return "held_out"
    return "test" if zlib.crc32(scene.key.encode()) % 100 < TEST_PERCENT else "train"


def position_name(x: float, y: float) -> str:
    """The cell of the 3 x 3 grid that the centre (x, y), in fractions of the side, lies in."""
    column, row = (int(v > GRID_LIMITS[0]) + int(v > GRID_LIMITS[1]) for v in (x, y))
    return POSITIONS[row][column]


def random_scene(rng: np.random.Generator, split: str = "train", objects: int | None = None) -> Scene:
    """A scene of the split. `objects` fixes the number of objects to 1 or 2; None gives 70 % one, 30 % two.

    Of the backgrounds, 80 % are plain, 10 % striped and 10 % graded; `held_out` scenes are plain with one object.
    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}: choose one of these.")
    while True:
        # Test and held-out scenes are rare: rejection costs microseconds and leaves the distribution as it is.
        scene = _candidate(rng, split == "held_out", objects)
        if scene is not None and split_of(scene) == split:
            return scene


def _candidate(rng: np.random.Generator, held_out: bool, count: int | None) -> Scene | None:
    names = list(COLOURS)
    count = 1 if held_out else count or (1 if rng.random() < 0.7 else 2)
    pattern = "plain" if held_out else str(rng.choice(PATTERNS, p=(0.8, 0.1, 0.1)))
    colours = [str(name) for name in rng.choice(names, size=4, replace=False)]
    if pattern == "plain":
        colours[1] = ""
    background, second, *object_colours = colours
    horizontal = bool(rng.random() < 0.5)
    if second and not _colours_are_clear(pattern, background, second, object_colours[:count]):
        return None
    objects = _random_objects(rng, object_colours[:count])
    return Scene(background, _tinted(rng, background), objects, pattern, second, horizontal)


def _random_objects(rng: np.random.Generator, colours: list[str]) -> tuple[SceneObject, ...]:
    sizes = [str(name) for name in rng.choice(SIZES, size=len(colours))]
    if sizes == ["large", "large"]:  # two large objects do not fit side by side
        sizes[int(rng.integers(2))] = "small"
    while True:
        objects = tuple(_random_object(rng, colour, size) for colour, size in zip(colours, sizes, strict=True))
        if len(objects) == 1 or not _boxes_touch(objects[0].box, objects[1].box):
            return objects


def _random_object(rng: np.random.Generator, colour: str, size: str) -> SceneObject:
    column, row = (int(v) for v in rng.integers(0, 3, size=2))
    radius = float(rng.uniform(*_RADII[size]))
    centre = np.array([_ANCHORS[size][column], _ANCHORS[size][row]]) + rng.uniform(-1, 1, size=2) * _JITTER[size]
    x, y = (float(v) for v in centre.clip(radius + _MARGIN, 1 - radius - _MARGIN))
    return SceneObject(
        shape=str(rng.choice(SHAPES)),
        colour=colour,
        size=size,
        position=POSITIONS[row][column],
        x=round(x, 4),
        y=round(y, 4),
        radius=round(radius, 4),
        rgb=_tinted(rng, colour),
    )


def _tinted(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    values = np.asarray(COLOURS[colour]) + rng.integers(-_TINT, _TINT + 1, size=3)
    return tuple(int(v) for v in values.clip(0, 255))


def _colours_are_clear(pattern: str, background: str, second: str, objects: list[str]) -> bool:
    first, last = (np.asarray(COLOURS[name], dtype=np.float64) for name in (background, second))
    mixes = np.linspace(0, 1, 9 if pattern == "graded" else 2)[:, None]
    behind = rgb_to_lab(first * (1 - mixes) + last * mixes)
    front = rgb_to_lab(np.asarray([COLOURS[name] for name in objects], dtype=np.float64))
    return float(np.linalg.norm(behind[:, None] - front[None], axis=-1).min()) > _LAB_SEPARATION


def _boxes_touch(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    gap = _MARGIN
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65, 2 degrees) of sRGB values in 0..255, [..., 3] -> float64 [..., 3] (CIE 15, IEC 61966-2-1)."""
    values = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def render(scene: Scene, size: int = 256) -> np.ndarray:
    """The picture of a scene: uint8 [size, size, 3], sRGB, edges anti-aliased over one pixel."""
    picture = _background(scene, size)
    for item in scene.objects:
        left, top = (max(int(v * size) - 1, 0) for v in item.box[:2])
        right, bottom = (min(int(v * size) + 3, size) for v in item.box[2:])
        x = ((np.arange(left, right) + 0.5) / size - item.x)[None, :] / item.radius
        y = ((np.arange(top, bottom) + 0.5) / size - item.y)[:, None] / item.radius
        pixel = 1 / (size * item.radius)
        alpha = (0.5 - signed_distance(item.shape, x, y) / pixel).clip(0, 1)[..., None].astype(np.float32)
        patch = picture[top:bottom, left:right]
        patch += (np.asarray(item.rgb, dtype=np.float32) - patch) * alpha
    return np.rint(picture).astype(np.uint8)


def _background(scene: Scene, size: int) -> np.ndarray:
    first = np.asarray(scene.rgb, dtype=np.float32)
    picture = np.empty((size, size, 3), dtype=np.float32)
    if scene.pattern == "plain":
        picture[:] = first
        return picture
    along = (np.arange(size, dtype=np.float32) + 0.5) / size
    if scene.pattern == "striped":
        # Distance to the nearest edge between two stripes, in pixels, gives the coverage of the second colour.
        phase = along * _STRIPES % 2
        mix = ((0.5 - np.abs(phase - 1.5)) * size / _STRIPES + 0.5).clip(0, 1)
    else:
        mix = along
    line = first + (np.asarray(COLOURS[scene.second], dtype=np.float32) - first) * mix[:, None]
    picture[:] = line[:, None] if scene.horizontal else line[None]
    return picture


def _regular_star(points: int, inner: float) -> np.ndarray:
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)


def _into_unit_box(vertices: np.ndarray) -> np.ndarray:
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return (vertices - (low + high) / 2) / ((high - low).max() / 2)


_ARM = 0.3
_POLYGONS = {
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.88,
    "triangle": _into_unit_box(np.array([[0, -1], [1, 0.85], [-1, 0.85]])),
    "star": _into_unit_box(_regular_star(5, 0.4)),
    "cross": np.array(
        [
            [-_ARM, -1], [_ARM, -1], [_ARM, -_ARM], [1, -_ARM], [1, _ARM], [_ARM, _ARM],
            [_ARM, 1], [-_ARM, 1], [-_ARM, _ARM], [-1, _ARM], [-1, -_ARM], [-_ARM, -_ARM],
        ]
    ),
}  # fmt: skip
_RING = (0.76, 0.24)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius 1 around the origin, negative inside; x and y broadcast.

    Polygons follow the exact distance of Quilez, "2D distance functions": the nearest edge, signed by the crossings.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        middle, half = _RING
        return np.abs(np.hypot(x, y) - middle) - half
    vertices = _POLYGONS[shape]
    nearest = np.full(np.broadcast(x, y).shape, np.inf)
    inside = np.zeros(nearest.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        t = ((px * ex + py * ey) / (ex * ex + ey * ey)).clip(0, 1)
        nearest = np.minimum(nearest, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (px < py * (ex / ey))
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)
