"""Folders, tars and datasets give their pictures with captions; what cannot be used is reported and skipped."""

import json

import pytest
from training_data_kit import cut_short, encoded, fill_folder, noise, write_metadata, write_tar

from stable_cascade_nodes.cascade_ops.training.data.sources import read_sources
from stable_cascade_nodes.cascade_ops.training.settings import Source


def read(*paths, **options):
    return read_sources([Source(str(path), **options) for path in paths])


def captions(pictures):
    return {entry.name: entry.captions for entry in pictures.entries}


def test_a_folder_is_read_with_its_subfolders_and_captions(tmp_path):
    folder = fill_folder(tmp_path / "dogs", [(40, 30), (20, 20)])
    fill_folder(folder / "young" / "ones", [(30, 40)], "a puppy,\n  asleep\n")
    noise().save(folder / "bare.webp")
    noise().save(folder / "LOUD.JPG")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden").mkdir()
    noise().save(folder / ".hidden" / "x.png")
    pictures = read(folder)
    assert captions(pictures) == {
        "dogs/0.png": ("picture 0",),
        "dogs/1.png": ("picture 1",),
        "dogs/LOUD.JPG": ("",),
        "dogs/bare.webp": ("",),
        "dogs/young/ones/0.png": ("a puppy, asleep",),
    }
    assert (pictures.entries[0].width, pictures.entries[0].height) == (40, 30)
    assert pictures.problems == [] and pictures.sources[0].pictures == 5


def test_metadata_gives_captions_classes_and_sizes(tmp_path):
    folder = fill_folder(tmp_path / "set", [(40, 30)] * 4)
    (folder / "maps").mkdir()
    noise((8, 8)).save(folder / "maps" / "0.png")
    rows = [
        {"file_name": "0.png", "text": "plain", "maps": "maps/0.png", "attributes": {"colour": 3}, "other": "column"},
        {"file_name": "1.png", "captions": ["one", "two"], "attributes": [{"colour": 1}, {"colour": 2}]},
        {"file_name": "2.png", "width": 999, "height": 500},
    ]
    write_metadata(folder, rows)
    pictures = read(folder)
    # A picture without a caption in its row keeps the file beside it; one without a row is left out and counted.
    assert captions(pictures) == {
        "set/0.png": ("plain",),
        "set/1.png": ("one", "two"),
        "set/2.png": ("picture 2",),
    }
    first, second, third = pictures.entries
    assert first.maps.path.endswith("0.png") and "maps" in first.maps.path and second.maps is None
    assert first.attributes == ({"colour": 3},) and second.attributes == ({"colour": 1}, {"colour": 2})
    assert (third.width, third.height) == (999, 500)
    assert pictures.sources[0].left_out == 1


def test_metadata_of_a_subfolder_speaks_for_that_one_alone(tmp_path):
    folder = fill_folder(tmp_path / "set", [(40, 30)])
    write_metadata(fill_folder(folder / "sub", [(40, 30)] * 2), [{"file_name": "1.png", "text": "listed"}])
    assert captions(read(folder)) == {"set/0.png": ("picture 0",), "set/sub/1.png": ("listed",)}


def test_paths_that_windows_wrote_are_understood(tmp_path):
    folder = tmp_path / "set"
    fill_folder(folder / "a" / "b", [(40, 30)])
    content = json.dumps({"file_name": "a\\b\\0.png", "text": "a dog"}) + "\r\n"
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert captions(read(folder)) == {"set/a/b/0.png": ("a dog",)}


@pytest.mark.parametrize("name", ["../1.png", "..\\1.png", "/etc/1.png", "C:\\1.png", "\\\\host\\share\\1.png"])
def test_paths_that_lead_out_of_the_folder_are_not_followed(tmp_path, name):
    fill_folder(tmp_path, [(40, 30)] * 2)
    folder = fill_folder(tmp_path / "set", [(40, 30)])
    write_metadata(folder, [{"file_name": "0.png"}, {"file_name": name}])
    pictures = read(folder)
    assert [entry.name for entry in pictures.entries] == ["set/0.png"]
    assert [problem.why for problem in pictures.problems] == ["a path that leads out of its folder"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ('{"text": "x"}', "line 2 has no file_name"),
        ('{"file_name": "0.png", "attributes": {"a": 1.5}}', "line 2 has the attributes"),
        ('{"file_name": "0.png", "captions": ["a", "b"], "attributes": [{"a": 1}]}', "line 2 has the attributes"),
        ('{"file_name": "0.png", "maps": "../x.png"}', "line 2 names the maps"),
    ],
)
def test_metadata_that_cannot_be_understood_names_its_line(tmp_path, line, message):
    folder = fill_folder(tmp_path / "set", [(40, 30)])
    (folder / "metadata.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_missing_and_damaged_files_are_named_and_skipped(tmp_path):
    folder = fill_folder(tmp_path / "set", [(40, 30)] * 2)
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = [{"file_name": name} for name in ("0.png", "1.png", "gone.png", "0.png")]
    write_metadata(folder, rows)
    pictures = read(folder)
    assert [entry.name for entry in pictures.entries] == ["set/0.png"]
    assert {problem.name: problem.why for problem in pictures.problems} == {
        "set/1.png": "not a picture that Pillow knows",
        "set/gone.png": "No such file or directory",
        "set/0.png": "listed again in line 4",
    }


def test_tars_are_read_by_sample(tmp_path):
    picture = encoded(noise((50, 40)))
    write_tar(
        tmp_path / "first.tar",
        [
            ("./a/one.png", picture),
            ("./a/one.txt", b"caption\n one"),
            ("two.json", b'{"caption": "from json"}'),
            ("two.jpg", encoded(noise((30, 30)), "JPEG")),
            ("three.text.txt", b"no picture"),
            ("bad.png", b"no picture"),
            ("odd.png", picture),
            ("odd.json", b"[1"),
        ],
    )
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "second.tar", [("x.PNG", picture), ("x.json", b'{"text": "upper"}')])
    pictures = read(tmp_path, kind="webdataset")
    label = tmp_path.name
    assert captions(pictures) == {
        f"{label}/first.tar/a/one.png": ("caption one",),
        f"{label}/first.tar/two.jpg": ("from json",),
        f"{label}/more/second.tar/x.png": ("upper",),
    }
    assert [problem.name.rsplit("/", 1)[1] for problem in pictures.problems] == ["bad.png", "odd.png"]
    entry = pictures.entries[0]
    with entry.place.open() as file:
        assert file.read() == picture
    assert (entry.width, entry.height) == (50, 40)


def test_a_tar_that_was_cut_short_gives_what_it_still_has(tmp_path):
    members = [(f"{n}.png", encoded(noise((64, 64), n))) for n in range(4)]
    path = write_tar(tmp_path / "cut.tar", members)
    cut_short(path)
    pictures = read(path, kind="webdataset")
    assert [entry.name for entry in pictures.entries] == ["cut.tar/0.png", "cut.tar/1.png"]
    assert any(problem.name == "cut.tar" and "to its end" in problem.why for problem in pictures.problems)


def test_a_dataset_on_disk_is_read_by_row(tmp_path):
    import datasets

    contents = [encoded(noise((50, 40))), b"no picture", encoded(noise((20, 60)), "JPEG")]
    columns = {"image": [{"bytes": content, "path": None} for content in contents], "caption": ["a", "b", "c"]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "rows"))
    pictures = read(tmp_path / "rows", kind="huggingface")
    assert captions(pictures) == {"rows/0": ("a",), "rows/2": ("c",)}
    assert [problem.name for problem in pictures.problems] == ["rows/1"]
    with pictures.entries[1].place.open() as file:
        assert file.read() == contents[2]
    assert pictures.entries[0].stamp != pictures.entries[1].stamp

    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="splits train"):
        read(tmp_path / "splits", kind="huggingface")
    table.rename_column("image", "photo").save_to_disk(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="expected a column 'image'"):
        read(tmp_path / "other", kind="huggingface")
    with pytest.raises(ValueError, match="no Hugging Face dataset"):
        read(tmp_path, kind="huggingface")


def test_without_the_package_a_dataset_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read(tmp_path / "elsewhere", kind="huggingface")


def test_sources_keep_their_own_settings_and_names(tmp_path):
    first, second = fill_folder(tmp_path / "a" / "x", [(40, 30)]), fill_folder(tmp_path / "b" / "x", [(40, 30)])
    sources = [Source(str(first), repeats=3, caption="a [dog]"), Source(str(second), loss_weight=0.5)]
    one, other = read_sources(sources).entries
    assert (one.repeats, one.loss_weight, one.captions) == (3, 1.0, ("a [dog]",))
    assert (other.repeats, other.loss_weight, other.captions) == (1, 0.5, ("picture 0",))
    assert one.name != other.name


@pytest.mark.parametrize(
    ("kind", "repeats", "message"),
    [
        ("folder", 1, "No picture was found"),
        ("folder", 0, "repeats 0"),
        ("webdataset", 1, "no folder with .tar files"),
        ("zip", 1, "kind 'zip'"),
    ],
)
def test_sources_without_use_are_refused(tmp_path, kind, repeats, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, kind=kind, repeats=repeats)
    with pytest.raises(ValueError, match="no folder"):
        read(tmp_path / "gone")
    with pytest.raises(ValueError, match="no data"):
        read()
