"""Tiny ONNX files: a detector that sees blue light, recognisers that average pixels."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

# The detector reads 64 x 64 pixels, on grids of 8, 16 and 32, with two anchors per cell, of which the second counts.
SIDE = 64
STRIDES = (8, 16, 32)
# Only the middle grid says a score above a half.
TRUST = (0.4, 1.0, 0.3)
# What it says of every cell, in cells: the distances to the sides of the box, and the five points.
DISTANCES = (1.0, 0.5, 2.0, 1.5)
POINTS = ((0.1, 0.2), (0.6, 0.1), (0.4, 0.5), (0.25, 0.8), (0.75, 0.7))


def saved(path, nodes, inputs, outputs, constants):
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def detector(path, points=True, batched=False, levels=3, reverse=False):
    """A detector of the kind SCRFD: a cell's score is how blue it is, times what its grid is trusted."""
    blue = np.array([0, 0, 1], np.float32).reshape(1, 3, 1, 1)
    nodes = [helper.make_node("Conv", ["picture", "blue"], ["light"])]
    constants = {"blue": blue, "low": np.float32(0), "high": np.float32(1)}
    outputs = {"scores": [], "boxes": [], "points": []}
    for stride, trust in list(zip(STRIDES, TRUST, strict=True))[:levels]:
        cells = (SIDE // stride) ** 2
        name = f"_{stride}"
        constants |= {
            f"column{name}": np.array([cells, 1]),
            f"all{name}": np.array([1, 2 * cells, 1] if batched else [2 * cells, 1]),
            f"trust{name}": np.array([[0.0, trust]], np.float32),
        }
        nodes += [
            helper.make_node(
                "AveragePool", ["light"], [f"mean{name}"], kernel_shape=[stride] * 2, strides=[stride] * 2
            ),
            helper.make_node("Clip", [f"mean{name}", "low", "high"], [f"clear{name}"]),
            helper.make_node("Reshape", [f"clear{name}", f"column{name}"], [f"one{name}"]),
            helper.make_node("Mul", [f"one{name}", f"trust{name}"], [f"two{name}"]),
            helper.make_node("Reshape", [f"two{name}", f"all{name}"], [f"scores{name}"]),
        ]
        said = {"boxes": DISTANCES} | ({"points": np.ravel(POINTS)} if points else {})
        for kind, values in said.items():
            repeated = np.tile(np.asarray(values, np.float32), (2 * cells, 1))
            constants[f"{kind}{name}_said"] = repeated[None] if batched else repeated
            nodes.append(helper.make_node("Identity", [f"{kind}{name}_said"], [f"{kind}{name}"]))
        for kind, width in (("scores", 1), ("boxes", 4), ("points", 10)):
            if kind == "scores" or kind in said:
                outputs[kind].append((f"{kind}{name}", [1, 2 * cells, width] if batched else [2 * cells, width]))
    listed = [entry for kind in outputs.values() for entry in kind]
    shapes = dict(reversed(listed) if reverse else listed)
    return saved(path, nodes, {"picture": [1, 3, SIDE, SIDE]}, shapes, constants)


def recogniser(path, side=112):
    """A recogniser of the kind ArcFace: the mean of each quarter of the picture, for each channel."""
    half = side // 2
    nodes = [
        helper.make_node("AveragePool", ["face"], ["quarters"], kernel_shape=[half] * 2, strides=[half] * 2),
        helper.make_node("Flatten", ["quarters"], ["embedding"]),
    ]
    return saved(path, nodes, {"face": [1, 3, side, side]}, {"embedding": [1, 12]}, {})


def ramp(height, width):
    """A picture whose red and green say where a pixel is: x / width and y / height. No blue."""
    picture = torch.zeros(3, height, width)
    picture[0] = (torch.arange(width) / width)[None]
    picture[1] = (torch.arange(height) / height)[:, None]
    return picture


def umeyama(points, targets):
    """The least-squares similarity by the singular value decomposition of the paper, for one set of points."""
    points, targets = np.asarray(points, np.float64), np.asarray(targets, np.float64)
    middle, target_middle = points.mean(0), targets.mean(0)
    covariance = (targets - target_middle).T @ (points - middle) / len(points)
    left, values, right = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    rotation = left @ np.diag(signs) @ right
    scale = (values * signs).sum() / points.var(axis=0).sum()
    return np.concatenate([scale * rotation, (target_middle - scale * rotation @ middle)[:, None]], axis=1)
