"""The datasets that the tiny family is trained on, as folders that anyone's trainer could read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade_nodes.cascade_ops.control import identity_control, read_faces
from stable_cascade_nodes.cascade_ops.control.identity import faces_of as faces_named
from stable_cascade_nodes.cascade_ops.training.data.folder import read_folder
from stable_cascade_nodes.tiny import dataset
from stable_cascade_nodes.tiny.attributes import (
    CLASS_COUNTS,
    CLASSES,
    MAP_CLASSES,
    MENTIONED,
    MENTIONED_COUNTS,
    attributes,
    caption_attributes,
    class_maps,
    picture_attributes,
)
from stable_cascade_nodes.tiny.captions import Description, background_phrase, caption_full, unplaced
from stable_cascade_nodes.tiny.drawing import COLOURS, POSITION_NAMES, SHAPES, random_scene, render, split_of
from stable_cascade_nodes.tiny.looks import QUARTERS, TOKEN, has_look, look_caption, look_scene, render_look
from stable_cascade_nodes.tiny.objects import WIDTH, object_embedding


def scenes(count, **options):
    rng = np.random.default_rng(0)
    return [random_scene(rng, **options) for _ in range(count)]


def rows_of(folder):
    return [json.loads(line) for line in (folder / dataset.METADATA).read_text().splitlines()]


def written(folder, kind, count=6):
    dataset.write_dataset(kind, folder, count, jobs=1)
    return rows_of(folder)


def said(row):
    return {name: CLASSES[name.removeprefix(MENTIONED)][index] for name, index in row.items()}


def test_attributes_follow_the_caption():
    scene = scenes(1, objects=2)[0]
    first, other = sorted(scene.objects, key=lambda o: POSITION_NAMES.index(o.position))
    names = said(caption_attributes(Description("", (other, first)), scene))
    assert (names["mentioned first colour"], names["mentioned other shape"]) == (other.colour, first.shape)
    assert (names["first colour"], names["other shape"]) == (first.colour, other.shape)
    vague = Description("", (other, first), names_positions=False, names_background=False, names_sizes=False)
    names = said(attributes(vague, scene, ordered=False))
    assert names["first colour"] == other.colour
    assert {names[k] for k in ("background", "pattern", "second", "first size", "other position")} == {"unnamed"}


def test_a_pictures_attributes_are_all_of_it():
    scene = scenes(1, objects=1)[0]
    names, item = said(picture_attributes(scene)), scene.objects[0]
    wanted = [item.colour, item.shape, item.size, item.position]
    assert [names[f"first {k}"] for k in ("colour", "shape", "size", "position")] == wanted
    assert {v for k, v in names.items() if k.startswith("other")} == {"none"}
    assert names["background"] == scene.background


def test_class_maps_cover_the_objects():
    scene = scenes(1, objects=1)[0]
    maps, item = class_maps(scene), scene.objects[0]
    inside = maps[..., 0] > 0
    assert set(maps[inside][:, 0]) == {1 + SHAPES.index(item.shape)}
    assert set(maps[inside][:, 1]) == {1 + list(COLOURS).index(item.colour)}
    rows, columns = np.nonzero(inside)
    # To a pixel of the map: what a shape covers reaches its box.
    assert (columns.min() + columns.max() + 1) / 2 / len(maps) == pytest.approx(item.x, abs=0.04)
    assert (rows.max() + 1 - rows.min()) / len(maps) <= 2 * item.radius + 0.05


def test_scenes_are_written_with_captions_maps_and_attributes(tmp_path):
    rows = written(tmp_path, "scenes")
    assert [row["file_name"] for row in rows] == [f"pictures/{i:06d}.png" for i in range(6)]
    drawn = dataset.draw_scene(0, 3)
    assert {name: rows[3][name] for name in drawn.row} == json.loads(json.dumps(drawn.row))
    assert (np.asarray(Image.open(tmp_path / rows[3]["file_name"])) == drawn.picture).all()
    maps = np.asarray(Image.open(tmp_path / rows[3]["maps"]))
    assert (maps == drawn.maps).all()
    assert maps.max(axis=(0, 1)).tolist() < list(MAP_CLASSES)
    assert rows[3]["attributes"].keys() == CLASS_COUNTS.keys()
    assert all(value < CLASS_COUNTS[name] for row in rows for name, value in row["attributes"].items())
    assert len({row["captions"][0] for row in rows}) == 6


def test_patterned_scenes_have_a_pattern_and_mostly_two_objects(tmp_path):
    rows = written(tmp_path, "patterned")
    names = [said(row["attributes"]) for row in rows]
    assert {n["pattern"] for n in names} <= {"striped", "graded"}
    assert all(n["second"] in COLOURS for n in names)
    assert [n["other shape"] == "none" for n in names] == [True, False, False, True, False, False]
    assert all((tmp_path / row["maps"]).exists() and len(row["captions"]) == 3 for row in rows)


def test_a_picture_does_not_depend_on_the_kinds_there_are(monkeypatch):
    before = [dataset.training_scene(0, 5), dataset.draw_look(0, 5).row, dataset.draw_patterned(0, 5).row]
    monkeypatch.setattr(dataset, "KINDS", {"other": None, **dataset.KINDS})
    after = [dataset.training_scene(0, 5), dataset.draw_look(0, 5).row, dataset.draw_patterned(0, 5).row]
    assert after == before


def test_the_trainers_own_reader_finds_all_of_it(tmp_path):
    written(tmp_path, "scenes", 4)
    found = read_folder(tmp_path, "scenes")
    assert (found.problems, found.left_out, len(found.entries)) == ([], 0, 4)
    entry = found.entries[1]
    assert (entry.width, entry.height, len(entry.captions)) == (256, 256, dataset.CAPTIONS_PER_SCENE)
    assert entry.maps is not None
    assert entry.attributes[0].keys() == CLASS_COUNTS.keys()


def test_captions_have_attributes_each(tmp_path):
    rows = written(tmp_path, "captions", 4)
    assert [len(row["attributes"]) for row in rows] == [dataset.CAPTIONS_PER_SCENE] * 4
    assert rows[0]["attributes"][0].keys() == CLASS_COUNTS.keys() | MENTIONED_COUNTS.keys()
    assert [entry.attributes != () for entry in read_folder(tmp_path, "captions").entries] == [True] * 4
    objects = [said(row["attributes"][0])["other shape"] != "none" for row in rows]
    assert objects == [False, True, False, True]


def test_control_pictures_have_faces_by_name(tmp_path):
    rows = written(tmp_path, "control", 3)
    faces = read_faces(tmp_path / dataset.FACES)
    for row, entry in zip(rows, read_folder(tmp_path, "control").entries, strict=True):
        found = faces_named(faces, entry.name)
        assert found.embeddings.shape[1] == WIDTH
        assert identity_control([found], 192, 192, WIDTH).abs().sum() > 0
        assert len(row["captions"]) == 3
    assert torch.tensor(object_embedding("red", "star")).norm().item() == pytest.approx(1, abs=1e-4)
    assert object_embedding("red", "star") != object_embedding("red", "ring")


def test_captions_say_less_and_less():
    scene = scenes(1, objects=1)[0]
    item = scene.objects[0]
    assert item.position not in unplaced(scene) or item.position in ("left", "right", "top")
    assert f"{item.colour} {item.shape}" in unplaced(scene)
    assert item.shape not in background_phrase(scene)
    assert scene.background in background_phrase(scene)
    assert caption_full(scene).endswith(background_phrase(scene))


def test_every_second_picture_of_the_look_has_it(tmp_path):
    rows = written(tmp_path, "look")
    for index, row in enumerate(rows):
        picture = np.asarray(Image.open(tmp_path / row["file_name"]))
        assert (TOKEN in row["captions"][0]) == has_look(picture) == (index % 2 == 0)


def test_the_look_is_seen_where_it_is_and_nowhere_else():
    rng = np.random.default_rng(1)
    shown = [look_scene(rng, "test") for _ in range(12)]
    assert all(split_of(scene) == "test" and scene.objects[0].colour not in QUARTERS for scene in shown)
    assert all(has_look(render_look(scene)) for scene in shown)
    assert not any(has_look(render(scene)) for scene in [*shown, *scenes(60)])
    assert not any(has_look(render_look(scene)[:, ::-1]) for scene in shown)  # the other way round
    for scene in shown:
        assert look_caption(scene).startswith(caption_full(scene).split(" on a ")[0])


def test_an_interrupted_dataset_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "_CHUNK", 2)
    whole = written(tmp_path / "whole", "scenes", 5)
    draw, drawn = dataset.draw_scene, []

    def once(seed, index):
        drawn.append(index)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(seed, index)

    monkeypatch.setitem(dataset.KINDS, "scenes", once)
    with pytest.raises(KeyboardInterrupt):
        dataset.write_dataset("scenes", tmp_path / "cut", 5, jobs=1)
    assert not (tmp_path / "cut" / dataset.METADATA).exists()
    assert written(tmp_path / "cut", "scenes", 5) == whole
    assert drawn == [0, 1, 2, 3, 2, 3, 4]
    assert written(tmp_path / "cut", "scenes", 5) == whole  # a whole one is left alone
    assert len(drawn) == 7


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of scenes, captions"):
        dataset.write_dataset("photos", tmp_path, 1)


def test_processes_draw_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "_CHUNK", 3)
    dataset.main(["control", "--out", str(tmp_path / "two"), "--count", "6", "--jobs", "2"])
    assert "metadata.jsonl" in capsys.readouterr().out
    assert rows_of(tmp_path / "two") == written(tmp_path / "one", "control", 6)
    assert (tmp_path / "two" / dataset.FACES).read_bytes() == (tmp_path / "one" / dataset.FACES).read_bytes()
