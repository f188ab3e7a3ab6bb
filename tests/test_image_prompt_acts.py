"""Words and pictures together, on the tiny family: what each of them decides, and what the weight does."""

import numpy as np
import pytest
import torch

from stable_cascade_nodes.cascade_ops.denoisers import Pictures
from stable_cascade_nodes.cascade_ops.image_prompts import ImagePrompt, embed_prompts
from stable_cascade_nodes.tiny.captions import object_phrase
from stable_cascade_nodes.tiny.checker import read_picture, score
from stable_cascade_nodes.tiny.drawing import render
from stable_cascade_nodes.tiny.evaluate import Family, as_pictures, measured_scenes

COUNT = 48  # of 8, one picture is more than what a bound leaves


@pytest.fixture(scope="module")
def family():
    return Family.load()


@pytest.fixture(scope="module")
def pairs():
    """Scenes to say and scenes to show, on plain backgrounds, with nothing of their looks in common."""
    scenes = iter(scene for scene in measured_scenes(40 * COUNT, "test", 1) if scene.pattern == "plain")
    found = []
    while len(found) < COUNT:
        said, shown = next(scenes), next(scenes)
        ours, theirs = said.objects[0], shown.objects[0]
        if len({ours.colour, theirs.colour, shown.background}) == 3 and ours.shape != theirs.shape:
            found.append((said, shown))
    return [list(scenes) for scenes in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def embeddings(family, pairs):
    return family.embed(np.stack([render(scene, 256) for scene in pairs[1]]))


@torch.no_grad()
def made(family, prompts, image=None):
    """Small pictures of Stage C alone, with an embedding or a weighted picture for each."""
    latents = family.sample_c(prompts, 0, {} if image is None else {"image": image})
    return as_pictures(family.previewer(latents))


def share(scenes, pictures, name):
    return np.mean([score(scene, read_picture(picture))[name] for scene, picture in zip(scenes, pictures, strict=True)])


def test_words_keep_what_they_say_and_the_picture_adds_the_rest(family, pairs, embeddings):
    said, shown = pairs
    prompts = [object_phrase(scene.objects[0]) for scene in said]
    without, with_it = made(family, prompts), made(family, prompts, embeddings)
    assert share(shown, without, "background colour") <= 0.3
    assert share(shown, with_it, "background colour") >= 0.8
    for name in ("colour", "position"):
        assert share(said, with_it, name) >= 0.75
        assert share(shown, with_it, name) <= 0.4


def test_without_words_the_picture_decides(family, pairs, embeddings):
    _, shown = pairs
    pictures, plain = made(family, [""] * COUNT, embeddings), made(family, [""] * COUNT)
    for name in ("background colour", "colour"):
        assert share(shown, pictures, name) >= 0.8
        assert share(shown, plain, name) <= 0.3


@torch.no_grad()
def test_what_is_read_grows_evenly_with_the_weight(family, embeddings):
    """Unlike with a scaled embedding: a layer norm follows it, and from a half on next to nothing changes."""
    text = family.text.encode("")

    def tokens(scale=1.0, weight=1.0):
        given = [each.expand(COUNT, *each.shape[1:]) for each in (text.hidden, text.pooled.reshape(1, 1, -1))]
        weights = torch.full((COUNT, 1), weight)
        return family.stage_c.condition_tokens(*given, embeddings * scale, weights)[:, -4:]

    off = tokens(scale=0.0)
    whole = (tokens() - off).norm()
    for weight in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5):
        assert float((tokens(weight=weight) - off).norm() / whole) == pytest.approx(weight, abs=1e-4)
    assert (tokens(scale=0.1) - off).norm() / whole > 0.45 and (tokens(scale=0.5) - off).norm() / whole > 0.85


def test_the_weight_is_a_dial(family, pairs, embeddings):
    said, shown = pairs
    prompts = [object_phrase(scene.objects[0]) for scene in said]
    low, high = (made(family, prompts, Pictures(embeddings, torch.tensor([weight]))) for weight in (0.2, 0.75))
    assert share(shown, low, "background colour") <= 0.4
    assert share(shown, high, "background colour") >= 0.8
    for pictures in (low, high):
        for name in ("colour", "position", "shape"):
            assert share(said, pictures, name) >= 0.75
    over = made(family, prompts, Pictures(embeddings, torch.tensor([2.0])))
    assert share(shown, over, "colour") >= 0.7 and share(said, over, "colour") <= 0.2


def test_a_picture_in_python_is_the_picture_of_the_family(family, pairs, embeddings):
    from stable_cascade_nodes.cascade_ops.catalog import bundled
    from stable_cascade_nodes.cascade_ops.handles import load_stage

    encoder = load_stage(bundled("image_encoder").path, "image_encoder")
    drawn = torch.from_numpy(render(pairs[1][0], 256)).permute(2, 0, 1)[None].float() / 255
    pictures = embed_prompts(encoder, [ImagePrompt(drawn, 0.5)])
    torch.testing.assert_close(pictures.embeddings, embeddings[:1])
    assert pictures.weights.tolist() == [0.5]
