"""What batches hold, and that they are the same however they are made."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from training_data_kit import (
    EVERYTHING,
    LATENTS,
    TEXTS,
    cut_short,
    encoded,
    fill_folder,
    noise,
    same_batches,
    settings_for,
    small_models,
    write_metadata,
    write_tar,
)

from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet
from stable_cascade_nodes.cascade_ops.training.data import TrainingData
from stable_cascade_nodes.cascade_ops.training.data.pictures import as_tensor
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import Source

IMAGE = frozenset({"image"})


@pytest.fixture(scope="module")
def models(small_family, tmp_path_factory):
    return small_models(small_family, tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def folder(tmp_path):
    return fill_folder(tmp_path / "set", [(128, 128)] * 3 + [(200, 100)] * 3)


def test_a_batch_holds_what_was_asked_for(folder, tmp_path, models):
    settings = settings_for(folder, tmp_path / "run", models=models, buckets=(1.0, 2.0))
    data = TrainingData.open(settings, EVERYTHING, Parts(models))
    assert len(data) == 6
    shapes = set()
    for batch in data.batches(0, 4, 3, [0, 1, 2]):
        height, width = batch["image"].shape[-2:]
        assert batch["image"].shape == (3, 3, height, width) and 0 <= batch["image"].min() < batch["image"].max() <= 1
        cells = -(-height * 3 // 128), -(-width * 3 // 128)
        assert batch["stage_c_latent"].shape == (3, 16, *cells)
        assert batch["stage_a_latent"].shape == (3, 4, height // 4, width // 4)
        assert batch["text"].shape == (3, 77, 64) and batch["text_pooled"].shape == (3, 1, 32)
        assert batch["image_embedding"].shape == (3, 1, 24)
        assert batch["caption"] == [f"picture {name[4]}" for name in batch["name"]]
        assert batch["loss_weight"].tolist() == [1, 1, 1]
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in tensors)
        assert not any(value.requires_grad or value.is_inference() for value in tensors)
        shapes.add((width, height))
    assert shapes == {(128, 128), (168, 80)}


def test_latents_are_those_of_the_picture_at_three_quarters(tmp_path, models):
    folder = fill_folder(tmp_path / "set", [(128, 128)])
    data = TrainingData.open(settings_for(folder, tmp_path / "run", models=models), LATENTS, Parts(models))
    (batch,) = data.batches(0, 1, 1, [0])
    picture = as_tensor(Image.open(folder / "0.png"))[None]
    small = F.interpolate(picture, size=(96, 96), mode="bilinear", antialias=True)
    with torch.no_grad():
        latent = load_stage(models.latent_encoder, "latent_encoder").module(normalize_imagenet(small))
        pixels = load_stage(models.stage_a, "stage_a").module.encode(picture)[0]
    torch.testing.assert_close(batch["stage_c_latent"], latent, rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(batch["stage_a_latent"], pixels, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_captions_are_plain_text_cut_to_one_sequence(tmp_path, models, cached):
    folder = fill_folder(tmp_path / "set", [(128, 128)], "(a:1.5) [dog] " + "very " * 100 + "large")
    settings = settings_for(folder, tmp_path / "run", models=models, cache=cached)
    (batch,) = TrainingData.open(settings, TEXTS, Parts(models)).batches(0, 1, 1, [0])
    encoder = load_stage(models.text_encoder, "text_encoder").module
    ids = encoder.tokenizer.encode(batch["caption"][0])
    assert len(ids) > 75
    hidden, pooled = encoder.encode_tokens(torch.tensor([[49406, *ids[:75], 49407]]), torch.ones(1, 77).long())
    torch.testing.assert_close(batch["text"], hidden, rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(batch["text_pooled"][0], pooled, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_worker_processes_give_the_same_batches(folder, tmp_path, models, cached):
    # A tar and a damaged picture too, so that all that a worker needs has gone through pickle.
    cut_short(folder / "4.png")
    tar = write_tar(tmp_path / "more.tar", [(f"{n}.png", encoded(noise((128, 128), 50 + n))) for n in range(3)])
    sources = (Source(str(folder)), Source(str(tar), "webdataset", loss_weight=0.5))
    settings = settings_for(folder, tmp_path / "run", models=models, sources=sources, cache=cached, crop="random")
    alone = TrainingData.open(settings, EVERYTHING, Parts(models))
    spread = replace(settings, output=str(tmp_path / "spread"), data=replace(settings.data, workers=2))
    several = TrainingData.open(spread, EVERYTHING, Parts(models))
    assert same_batches(alone.batches(3, 10, 2, [0, 1]), several.batches(3, 10, 2, [0, 1]))
    assert alone.problems == several.problems and len(alone.problems) == 1


def test_processes_read_only_their_part_and_agree_on_the_whole(folder, tmp_path):
    data = TrainingData.open(settings_for(folder, tmp_path / "run"), IMAGE, None)
    whole = list(data.batches(0, 9, 4, [0, 1, 2, 3]))
    parts = [list(data.batches(0, 9, 4, positions)) for positions in ([0, 1], [2, 3])]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert first["name"] + second["name"] == batch["name"]
        assert torch.equal(torch.cat([first["image"], second["image"]]), batch["image"])
    assert same_batches(whole[5:7], data.batches(5, 7, 4, [0, 1, 2, 3]))


@pytest.mark.parametrize("positions", [[], [4], [-1, 0]])
def test_positions_outside_of_the_batch_are_refused(folder, tmp_path, positions):
    data = TrainingData.open(settings_for(folder, tmp_path / "run"), IMAGE, None)
    with pytest.raises(ValueError, match="positions"):
        next(data.batches(0, 1, 4, positions))


def test_random_crops_differ_from_step_to_step_and_latents_follow_them(tmp_path, models):
    folder = fill_folder(tmp_path / "set", [(400, 128)])
    settings = settings_for(folder, tmp_path / "run", models=models, buckets=(1.0,), crop="random")
    needs = IMAGE | {"stage_c_latent", "text"}
    first, second = TrainingData.open(settings, needs, Parts(models)).batches(0, 2, 1, [0])
    assert not torch.equal(first["image"], second["image"])
    encoder = load_stage(models.latent_encoder, "latent_encoder").module
    for batch in (first, second):
        small = F.interpolate(batch["image"], size=(96, 96), mode="bilinear", antialias=True)
        with torch.no_grad():
            torch.testing.assert_close(batch["stage_c_latent"], encoder(normalize_imagenet(small)))
    # Captions are still cached, pictures are not.
    assert {path.parent.name.partition("-")[0] for path in (tmp_path / "run").rglob("*.safetensors")} == {"text"}
    middle = replace(settings, data=replace(settings.data, crop="centre"))
    first, second = TrainingData.open(middle, IMAGE, None).batches(0, 2, 1, [0])
    assert torch.equal(first["image"], second["image"])


def test_weights_repeats_and_captions_of_sources_are_kept(folder, tmp_path):
    other = fill_folder(tmp_path / "other", [(128, 128)])
    sources = (Source(str(folder)), Source(str(other), repeats=4, loss_weight=0.25, caption="a [cat]"))
    settings = settings_for(folder, tmp_path / "run", sources=sources, buckets=(1.0,))
    data = TrainingData.open(settings, frozenset(), None)
    batches = list(data.batches(0, 5, 2, [0, 1]))
    seen = [sample for batch in batches for sample in _rows(batch)]
    ours = [(caption, weight) for name, caption, weight in seen if name.startswith("other")]
    assert len(data) == len(seen) == 10 and ours == [("a [cat]", 0.25)] * 4
    assert {weight.item() for name, _, weight in seen if not name.startswith("other")} == {1.0}


def _rows(batch):
    return zip(batch["name"], batch["caption"], batch["loss_weight"], strict=True)


def test_one_of_several_captions_is_drawn_with_its_attributes(tmp_path):
    folder = fill_folder(tmp_path / "set", [(128, 128)])
    maps = np.random.default_rng(0).integers(0, 5, (12, 12), dtype=np.uint8)
    Image.fromarray(maps).save(folder / "classes.png")
    words = ["red", "green", "blue"]
    attributes = [{"colour": number, "count": 1} for number in range(3)]
    row = {"file_name": "0.png", "captions": words, "attributes": attributes, "maps": "classes.png"}
    write_metadata(folder, [row])
    data = TrainingData.open(settings_for(folder, tmp_path / "run"), frozenset({"maps", "attributes"}), None)
    batches = list(data.batches(0, 40, 2, [0, 1]))
    for batch in batches:
        assert batch["attributes"]["colour"].tolist() == [words.index(caption) for caption in batch["caption"]]
        assert batch["attributes"]["count"].tolist() == [1, 1]
        assert torch.equal(batch["maps"], torch.from_numpy(maps).long()[None, None].expand(2, 1, 12, 12))
    assert {caption for batch in batches for caption in batch["caption"]} == set(words)


def test_where_a_whole_shape_is_lost_the_next_one_stands_in(folder, tmp_path, models):
    for name in ("3.png", "4.png", "5.png"):
        cut_short(folder / name)
    settings = settings_for(folder, tmp_path / "run", models=models, buckets=(1.0, 2.0))
    for needs, parts in ((IMAGE, None), (LATENTS, Parts(models))):
        data = TrainingData.open(settings, needs, parts)
        names = {name for batch in data.batches(0, 8, 2, [0, 1]) for name in batch["name"]}
        assert names <= {"set/0.png", "set/1.png", "set/2.png"} and len(data.problems) == 3
    for name in ("0.png", "1.png", "2.png"):
        cut_short(folder / name)
    with pytest.raises(ValueError, match="None of the pictures can be read"):
        list(TrainingData.open(settings, IMAGE, None).batches(0, 1, 2, [0, 1]))


@pytest.mark.parametrize("name", ["maps", "attributes"])
def test_what_the_data_does_not_have_is_missed_at_once(folder, tmp_path, name):
    with pytest.raises(ValueError, match=r"metadata\.jsonl"):
        TrainingData.open(settings_for(folder, tmp_path / "run"), frozenset({name}), None)


def test_unknown_needs_and_missing_models_are_refused(folder, tmp_path):
    settings = settings_for(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="asked for depth"):
        TrainingData.open(settings, frozenset({"depth"}), None)
    with pytest.raises(ValueError, match="text are encoded and no models"):
        TrainingData.open(settings, frozenset({"text"}), None)
