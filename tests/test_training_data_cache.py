"""Encoded pictures and captions are found again as long as nothing they depend on has changed, and only then."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_data_kit import LATENTS, TEXTS, cut_short, fill_folder, noise, same_batches, settings_for, small_models

from stable_cascade_nodes.cascade_ops.training.data import TrainingData, cache, encoding
from stable_cascade_nodes.cascade_ops.training.data.cache import DiskStore, ShardWriter, key_of
from stable_cascade_nodes.cascade_ops.training.data.encoders import Encoders
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import Source

NEEDS = LATENTS | TEXTS | {"image_embedding"}


@pytest.fixture(scope="module")
def models(small_family, tmp_path_factory):
    return small_models(small_family, tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def encoded(monkeypatch):
    """How many pictures and captions each encoder has encoded so far."""
    counts = dict.fromkeys(("stage_c_latent", "stage_a_latent", "image_embedding", "text"), 0)

    def counting(kind):
        original = getattr(Encoders, kind)

        def encode(self, items):
            counts[kind] += len(items)
            return original(self, items)

        return encode

    for kind in counts:
        monkeypatch.setattr(Encoders, kind, counting(kind))
    return counts


@pytest.fixture
def folder(tmp_path):
    return fill_folder(tmp_path / "set", [(128, 128)] * 3 + [(200, 100)] * 2)


def opened(settings, needs=NEEDS):
    return TrainingData.open(settings, needs, Parts(settings.models))


def files(settings):
    return sorted(path for path in Path(settings.output).rglob("*.safetensors"))


def test_a_second_run_encodes_nothing_and_sees_the_same(folder, tmp_path, models, encoded):
    settings = settings_for(folder, tmp_path / "run", models=models)
    first = list(opened(settings).batches(0, 6, 2, [0, 1]))
    assert encoded == {"stage_c_latent": 5, "stage_a_latent": 5, "image_embedding": 5, "text": 5}
    # A file per shape, not per picture: two shapes of both latents, one of embeddings and of texts.
    assert len(files(settings)) == 2 * 2 + 1 + 1
    assert same_batches(first, opened(settings).batches(0, 6, 2, [0, 1]))
    assert encoded["stage_c_latent"] == 5 and encoded["text"] == 5


def test_cached_values_are_the_encoders_within_float16(folder, tmp_path, models):
    settings = settings_for(folder, tmp_path / "run", models=models)
    plain = replace(settings, output=str(tmp_path / "other"), data=replace(settings.data, cache=False))
    kept, fresh = (list(opened(s).batches(0, 4, 2, [0, 1])) for s in (settings, plain))
    assert same_batches(kept, fresh, tolerance=2**-10)
    assert files(settings) and not files(plain) and not Path(plain.output).exists()


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("picture", {"stage_c_latent": 1, "stage_a_latent": 1, "image_embedding": 1, "text": 0}),
        ("touched", {"stage_c_latent": 1, "stage_a_latent": 1, "image_embedding": 1, "text": 0}),
        ("caption", {"stage_c_latent": 0, "stage_a_latent": 0, "image_embedding": 0, "text": 1}),
        ("resolution", {"stage_c_latent": 5, "stage_a_latent": 5, "image_embedding": 5, "text": 0}),
        ("added", {"stage_c_latent": 1, "stage_a_latent": 1, "image_embedding": 1, "text": 1}),
        ("latent_encoder", {"stage_c_latent": 5, "stage_a_latent": 0, "image_embedding": 0, "text": 0}),
        ("image_encoder", {"stage_c_latent": 0, "stage_a_latent": 0, "image_embedding": 5, "text": 0}),
        ("text_encoder", {"stage_c_latent": 0, "stage_a_latent": 0, "image_embedding": 0, "text": 5}),
        ("nothing", {"stage_c_latent": 0, "stage_a_latent": 0, "image_embedding": 0, "text": 0}),
    ],
)
def test_what_is_encoded_again_is_what_has_changed(folder, tmp_path, models, encoded, change, again):
    settings = settings_for(folder, tmp_path / "run", models=models)
    opened(settings)
    before, parts = dict(encoded), Parts(models)
    if change == "picture":
        noise((128, 128), 99).save(folder / "1.png")
    elif change == "touched":
        os.utime(folder / "1.png", ns=(1, 1))
    elif change == "caption":
        (folder / "1.txt").write_text("another")
    elif change == "resolution":
        settings = replace(settings, data=replace(settings.data, resolution=256))
    elif change == "added":
        fill_folder(folder / "more", [(128, 128)], "something new")
    elif change.endswith("encoder"):
        handle = Parts(models).load(change, trained=True)
        with torch.no_grad():
            next(handle.network.parameters()).view(-1)[0].add_(0.5)
        parts = Parts(models, {change: handle})
    else:
        settings = replace(settings, seed=7, batch_size=3, steps=5)
    TrainingData.open(settings, NEEDS, parts)
    assert {kind: encoded[kind] - before[kind] for kind in encoded} == again


def latents_by_name(settings):
    batches = opened(settings, LATENTS).batches(0, 3, 2, [0, 1])
    pairs = [zip(batch["name"], batch["stage_c_latent"], strict=True) for batch in batches]
    return {name: latent for pair in pairs for name, latent in pair}


def test_a_changed_picture_gives_its_new_latent(folder, tmp_path, models):
    settings = settings_for(folder, tmp_path / "run", models=models, buckets=(1.0,))
    old = latents_by_name(settings)
    noise((128, 128), 99).save(folder / "1.png")
    new = latents_by_name(settings)
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == set(old) - {"set/1.png"} and "set/1.png" in old


class Killed(BaseException):
    """The process is gone."""


def test_a_run_that_was_killed_while_caching_goes_on(folder, tmp_path, models, encoded, monkeypatch):
    settings = settings_for(folder, tmp_path / "run", models=models, buckets=(1.0,))
    monkeypatch.setattr(cache, "_SHARD_ROWS", 2)
    monkeypatch.setattr(encoding, "_PICTURES", 1)
    write, written = cache.write_tensors, []

    def killed_while_writing(path, tensors, metadata):
        if len(written) == 1:
            # What a kill leaves: a part of the file under the name that it has until it is complete.
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"\x10\0\0\0\0\0\0\0{half")
            raise Killed
        written.append(write(path, tensors, metadata))

    monkeypatch.setattr(cache, "write_tensors", killed_while_writing)
    with pytest.raises(Killed):
        opened(settings, frozenset({"stage_c_latent"}))
    assert len(files(settings)) == 1 and encoded["stage_c_latent"] == 4
    monkeypatch.setattr(cache, "write_tensors", write)
    batches = list(opened(settings, frozenset({"stage_c_latent"})).batches(0, 5, 2, [0, 1]))
    assert encoded["stage_c_latent"] == 4 + 3  # two of the four were on disk
    fresh = replace(settings, data=replace(settings.data, cache=False))
    assert same_batches(batches, opened(fresh, frozenset({"stage_c_latent"})).batches(0, 5, 2, [0, 1]), 2**-10)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_cache_files_count_as_none(folder, tmp_path, models, encoded, damage):
    settings = settings_for(folder, tmp_path / "run", models=models, buckets=(1.0,))
    before = list(opened(settings, LATENTS).batches(0, 3, 2, [0, 1]))
    for path in files(settings):
        if damage == "cut":
            cut_short(path, 0.9)
        else:
            path.write_bytes(b"" if damage == "empty" else b"<html>" * 99)
    assert same_batches(before, opened(settings, LATENTS).batches(0, 3, 2, [0, 1]))
    assert encoded["stage_c_latent"] == 10


def test_a_corrupt_picture_is_reported_and_another_takes_its_place(folder, tmp_path, models):
    cut_short(folder / "1.png")
    said = []
    settings = settings_for(folder, tmp_path / "run", models=models)
    data = TrainingData.open(settings, NEEDS, Parts(models), said.append)
    assert sum("Skipped set/1.png: image file is truncated" in line for line in said) == 1
    assert [problem.name for problem in data.problems] == ["set/1.png"]
    kept = list(data.batches(0, 8, 2, [0, 1]))
    assert "set/1.png" not in {name for batch in kept for name in batch["name"]}
    # Without a cache the damage is found while training, and the same pictures stand in.
    plain = replace(settings, data=replace(settings.data, cache=False))
    fresh = TrainingData.open(plain, NEEDS, Parts(models), said.append)
    assert same_batches(kept, fresh.batches(0, 8, 2, [0, 1]), 2**-10)
    assert [problem.name for problem in fresh.problems] == ["set/1.png"]


def test_rows_keep_eleven_bits_and_large_ones_all(tmp_path):
    store, writer = DiskStore(tmp_path / "s"), None
    generator = torch.Generator().manual_seed(0)
    usual = [{"value": torch.randn(3, 5, generator=generator) * 10.0**n} for n in range(-3, 4)]
    writer = ShardWriter(store)
    for number, row in enumerate(usual):
        writer.add(key_of(number), row)
    writer.flush()
    large = {"value": torch.tensor([1e6, 1.00001])}
    store.add([key_of("large")], [large])
    again = DiskStore(tmp_path / "s")
    assert len(again) == len(usual) + 1 and key_of("other") not in again
    for number, row in enumerate(usual):
        error = (again.read(key_of(number))["value"] - row["value"]).abs()
        assert (error <= row["value"].abs() / 2048 + 2**-25).all() and error.max() > 0
    assert torch.equal(again.read(key_of("large"))["value"], large["value"])


def test_few_files_whatever_the_number_of_rows(tmp_path):
    writer = ShardWriter(store := DiskStore(tmp_path / "s"))
    for number in range(600):
        writer.add(key_of(number), {"value": torch.full((2,), float(number))})
    writer.flush()
    assert len(list((tmp_path / "s").iterdir())) == 3
    assert all(store.read(key_of(number))["value"][0] == number for number in (0, 255, 256, 599))


def test_the_cache_may_lie_elsewhere_and_serve_several_runs(folder, tmp_path, models, encoded):
    shared = tmp_path / "shared"
    for run in ("one", "two"):
        settings = settings_for(folder, tmp_path / run, models=models, cache_folder=str(shared))
        opened(replace(settings, data=replace(settings.data, sources=(Source(str(folder), repeats=2),))))
    assert encoded["stage_c_latent"] == 5 and not (tmp_path / "two").exists()
    assert len({path.parent for path in shared.rglob("*.safetensors")}) == 4
