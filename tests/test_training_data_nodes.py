"""Pictures on a wire, prior preservation, and what a check of a data set says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_data_kit import (
    LATENTS,
    TEXTS,
    cut_short,
    fill_folder,
    noise,
    same_batches,
    settings_for,
    small_models,
    write_metadata,
)

from stable_cascade_nodes.cascade_ops.denoisers import TextCondition
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings, encode_text, sample_stage_c
from stable_cascade_nodes.cascade_ops.training.data import TrainingData, prior, training_data
from stable_cascade_nodes.cascade_ops.training.data.pictures import as_tensor
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import Prior
from stable_cascade_nodes.cascade_ops.wires import Latent

STAGE_C = TEXTS | {"stage_c_latent", "image_embedding"}
DOG = Prior("a dog", pictures=5, loss_weight=0.5, share=0.5)


@pytest.fixture(scope="module")
def models(small_family, tmp_path_factory):
    return small_models(small_family, tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def folder(tmp_path):
    return fill_folder(tmp_path / "set", [(128, 128)] * 3 + [(200, 100)] * 3)


def test_pictures_on_a_wire_are_those_of_a_folder(tmp_path, models):
    folder = fill_folder(tmp_path / "set", [(100, 140)] * 3)
    settings = settings_for(folder, tmp_path / "run", models=models, cache=False)
    needs = STAGE_C | LATENTS | {"image"}
    files = list(TrainingData.open(settings, needs, Parts(models)).batches(0, 4, 2, [0, 1]))
    images = torch.stack([as_tensor(noise((100, 140), n)).permute(1, 2, 0) for n in range(3)])
    captions = [f"picture {n}" for n in range(3)]
    for cached in (True, False):
        kept = replace(settings, output=str(tmp_path / "none"), data=replace(settings.data, cache=cached))
        data = TrainingData.from_pictures(images, captions, kept, needs, Parts(models))
        wire = list(data.batches(0, 4, 2, [0, 1]))
        for batch, other in zip(wire, files, strict=True):
            batch["name"] = other["name"]
        assert same_batches(wire, files, 1e-5)
    assert not (tmp_path / "none").exists()


def test_pictures_of_different_sizes_go_to_their_own_shapes(tmp_path):
    images = [torch.rand(64, 64, 3), torch.rand(50, 100, 3), torch.rand(64, 64, 3)]
    settings = settings_for(tmp_path, tmp_path / "run", buckets=(1.0, 2.0))
    data = TrainingData.from_pictures(images, ["a", "b", "c"], settings, frozenset({"image"}), None)
    shapes = {tuple(batch["image"].shape): set(batch["name"]) for batch in data.batches(0, 2, 2, [0, 1])}
    assert shapes == {(2, 3, 128, 128): {"picture 1", "picture 3"}, (2, 3, 80, 168): {"picture 2"}}


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (torch.rand(2, 8, 8, 3), ["one"], "1 captions were given for 2 pictures"),
        (torch.rand(1, 3, 8, 8), ["one"], "expected one or more"),
        ([], [], "expected one or more"),
    ],
)
def test_wires_that_do_not_fit_are_refused(tmp_path, images, captions, message):
    with pytest.raises(ValueError, match=message):
        TrainingData.from_pictures(images, captions, settings_for("", tmp_path), frozenset(), None)


def prior_settings(folder, output, models, **changes):
    return settings_for(folder, output, models=models, buckets=(1.0, 2.0), prior=replace(DOG, **changes), target="lora")


@pytest.mark.parametrize("cached", [True, False])
def test_the_class_is_mixed_into_every_batch(folder, tmp_path, models, cached):
    settings = prior_settings(folder, tmp_path / "run", models)
    settings = replace(settings, data=replace(settings.data, cache=cached))
    data = TrainingData.open(settings, STAGE_C, Parts(models))
    latents = set()
    for batch in data.batches(0, 12, 4, [0, 1, 2, 3]):
        ours = [name.startswith("prior") for name in batch["name"]]
        assert sum(ours) == 2
        for row, is_prior in enumerate(ours):
            assert batch["caption"][row] == ("a dog" if is_prior else f"picture {batch['name'][row][4]}")
            assert batch["loss_weight"][row] == (0.5 if is_prior else 1)
            # A latent without a picture has the embedding that a dropped one has.
            assert bool(batch["image_embedding"][row].any()) != is_prior
            if is_prior:
                latents.add(batch["stage_c_latent"][row].numpy().tobytes())
        rows = [row for row, is_prior in enumerate(ours) if is_prior]
        assert torch.equal(batch["text"][rows[0]], batch["text"][rows[1]])
    # Five pictures over two shapes with as many samples each, rounded.
    assert len(latents) == 4


def test_the_class_is_what_stage_c_makes_of_it(folder, tmp_path, models):
    settings = replace(prior_settings(folder, tmp_path / "run", models, pictures=2), seed=11)
    data = TrainingData.open(settings, frozenset({"stage_c_latent"}), Parts(models))
    batches = data.batches(0, 6, 2, [0, 1])
    pairs = [pair for batch in batches for pair in zip(batch["name"], batch["stage_c_latent"], strict=True)]
    latent = dict(pairs)["prior 0 of 128x128"]
    stage_c, text = load_stage(models.stage_c, "stage_c"), load_stage(models.text_encoder, "text_encoder")
    conditions: list[TextCondition] = [encode_text(text, caption) for caption in ("a dog", "")]
    start = Latent(torch.zeros(1, 16, 3, 3), 128, 128)
    made = sample_stage_c(stage_c, *conditions, start, seed=11, settings=SamplingSettings(steps=20)).samples[0]
    torch.testing.assert_close(latent, made, rtol=2**-10, atol=1e-5)
    assert made.abs().max() > 0.1


def test_the_class_is_made_once(folder, tmp_path, models, monkeypatch):
    made = []
    sample = prior.sample_stage_c
    monkeypatch.setattr(prior, "sample_stage_c", lambda *a, **k: made.append(1) or sample(*a, **k))
    settings = prior_settings(folder, tmp_path / "run", models)
    first = TrainingData.open(settings, STAGE_C, Parts(models))
    assert len(made) == 2
    again = TrainingData.open(settings, STAGE_C, Parts(models))
    assert len(made) == 2 and same_batches(first.batches(0, 5, 2, [0, 1]), again.batches(0, 5, 2, [0, 1]))
    stage_c = Parts(models).load("stage_c", trained=True)
    with torch.no_grad():
        next(stage_c.network.parameters()).view(-1)[0].add_(0.5)
    TrainingData.open(settings, STAGE_C, Parts(models, {"stage_c": stage_c}))
    TrainingData.open(replace(settings, prior=replace(DOG, caption="a cat")), STAGE_C, Parts(models))
    assert len(made) == 6


def test_other_targets_refuse_prior_preservation(folder, tmp_path, models):
    settings = prior_settings(folder, tmp_path / "run", models)
    for refused, needs in ((replace(settings, target="stage_b"), STAGE_C), (settings, STAGE_C | {"image"})):
        with pytest.raises(ValueError, match=r"prior\.caption is 'a dog'.*leave 'prior' out"):
            TrainingData.open(refused, needs, Parts(models))
    with pytest.raises(ValueError, match=r"prior\.share is 1"):
        TrainingData.open(replace(settings, prior=replace(DOG, share=1.0)), STAGE_C, Parts(models))


def test_a_check_says_what_would_be_trained_on(folder, tmp_path):
    fill_folder(folder / "small", [(64, 64)], "word " * 90)
    (folder / "copy.png").write_bytes((folder / "2.png").read_bytes())
    noise((128, 128), 77).save(folder / "mute.jpg")
    cut_short(folder / "4.png")
    (folder / "broken.webp").write_bytes(b"nothing")
    data = TrainingData.open(
        settings_for(folder, tmp_path / "run", buckets=(1.0, 2.0), batch_size=4), frozenset(), None
    )
    report = data.check()
    assert (report.pictures, report.captions) == (8, 6)
    counts = {(b.bucket.width, b.bucket.height): (b.pictures, b.samples) for b in report.buckets}
    assert counts == {(168, 80): (2, 3), (128, 128): (6, 6)}
    assert (report.samples, report.steps) == (9, 3)
    assert {problem.name for problem in report.problems} == {"set/4.png", "set/broken.webp"}
    assert set(report.without_caption) == {"set/copy.png", "set/mute.jpg"}
    assert report.long_captions == (("set/small/0.png", 90),)
    assert [set(group) for group in report.duplicates] == [{"set/2.png", "set/copy.png"}]
    assert report.enlarged == (("set/small/0.png", 64, 64, 2.0),)
    text = str(report)
    for line in (
        "8 pictures with 6 different captions, 9 samples in a pass of 3 batches of 4",
        "168x80       4x2             2         3   fewer than a batch of 4: repeated",
        "  set/4.png: image file is truncated",
        "  set/small/0.png: 90 tokens",
        "  set/small/0.png: 64x64, 2.00 times",
        "  set/2.png = set/copy.png",
    ):
        assert line in text
    assert not (tmp_path / "run").exists()


def test_a_check_counts_what_metadata_leaves_out(folder, tmp_path):
    write_metadata(folder, [{"file_name": f"{n}.png", "text": "x"} for n in range(2)])
    data = TrainingData.open(settings_for(folder, tmp_path / "run"), frozenset(), None)
    assert f"{folder} (folder): 2 pictures, 4 not listed in its metadata are left out" in str(data.check())


def test_where_the_cache_lies(tmp_path):
    settings = settings_for(tmp_path, tmp_path / "run")
    assert training_data._cache_folder(settings) == tmp_path / "run" / "cache"
    elsewhere = replace(settings, data=replace(settings.data, cache_folder="~/x"))
    assert training_data._cache_folder(elsewhere) == Path.home() / "x"
