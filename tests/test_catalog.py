"""What `auto` takes: files are told apart by their content."""

import json
import os
import struct
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from stable_cascade_nodes.cascade_ops import catalog
from stable_cascade_nodes.cascade_ops.catalog import BUNDLED, ModelFile, best, best_checkpoint, part_of, recognise
from stable_cascade_nodes.cascade_ops.models import StageC
from stable_cascade_nodes.nodes import files, runtime


def listed(*paths):
    return [ModelFile(path.name, str(path)) for path in paths]


def header_only(path, manifest, dtype="BF16"):
    """A file with the tensors of a published model: its header is real, its data a hole in the file."""
    size, position, header = {"BF16": 2, "F32": 4, "F8_E4M3": 1}[dtype], 0, {}
    for name, shape in manifest.items():
        count = 1
        for side in shape:
            count *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count * size]}
        position += count * size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files with the names and shapes of the release, under names that say nothing."""
    folder = tmp_path_factory.mktemp("published")
    manifests = os.path.join(os.path.dirname(__file__), "data", "manifests")

    def make(name, manifest, dtype="BF16"):
        with open(os.path.join(manifests, f"{manifest}.json")) as file:
            return header_only(folder / name, json.load(file), dtype)

    return SimpleNamespace(
        full=make("z.safetensors", "stage_c_3.6b"),
        full_fp8=make("a.safetensors", "stage_c_3.6b", "F8_E4M3"),
        lite=make("b.safetensors", "stage_c_1b_lite"),
        stage_b=make("c.safetensors", "stage_b_700m_lite"),
    )


def test_full_size_then_lite_then_other_sizes_then_the_bundled(published, small_family):
    small = small_family.paths["stage_c"]
    order = [published.full, published.full_fp8, published.lite, small]
    others = [published.stage_b, small_family.paths["stage_a"]]
    for index, expected in enumerate(order):
        found = listed(*reversed(order[index:]), *others)
        assert best("stage_c", lambda stage, found=found: found).path == str(expected)
    assert best("stage_c", lambda stage: listed(*others)) == catalog.bundled("stage_c")
    assert best("stage_b", lambda stage: listed(*order, *others)).path == str(published.stage_b)


def test_equal_files_are_taken_in_the_order_of_the_list(tmp_path, small_family):
    copies = [tmp_path / name for name in ("2.safetensors", "1.safetensors")]
    for copy in copies:
        copy.write_bytes(small_family.paths["stage_a"].read_bytes())
    assert best("stage_a", lambda stage: listed(*copies)).name == "2.safetensors"


def test_a_trained_family_of_someones_own_comes_before_the_bundled(tmp_path, small_family):
    save_file(
        load_file(small_family.paths["stage_a"]),
        tmp_path / "own.safetensors",
        {"cascade.stage": "stage_a", "cascade.name": "own"},
    )
    assert best("stage_a", lambda stage: listed(tmp_path / "own.safetensors")).name == "own.safetensors"


def test_broken_and_foreign_files_are_passed_over(tmp_path, small_family):
    whole = small_family.paths["stage_c"].read_bytes()
    broken = {
        "cut.safetensors": whole[: len(whole) // 2],
        "empty.safetensors": b"",
        "page.safetensors": b"<!DOCTYPE html><html>not found</html>",
        "pickle.safetensors": b"\x80\x02}q\x00.",
        "pickle.ckpt": whole,
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        assert part_of(str(tmp_path / name), "stage_c") is None, name
    # Whole, but it does not say how many heads its 48 channels are.
    module = StageC(c_cond=8, c_hidden=(48, 48), nhead=(1, 1), blocks=((1, 1), (1, 1)))
    save_file(module.state_dict(), tmp_path / "unknown.safetensors")
    assert recognise(str(tmp_path / "unknown.safetensors")).unknown == ("nhead",)
    assert part_of(str(tmp_path / "unknown.safetensors"), "stage_c") is None
    (tmp_path / "folder.safetensors").mkdir()
    found = listed(*sorted(tmp_path.iterdir()), tmp_path / "missing.safetensors", small_family.paths["stage_c"])
    assert best("stage_c", lambda stage: found).name == "c.safetensors"


def test_text_encoder_fits_the_stage_c_that_auto_takes(published, small_family):
    paths = small_family.paths

    def files_with(stage_c):
        return lambda stage: listed(stage_c) if stage == "stage_c" else listed(paths["text_encoder"])

    assert best("text_encoder", files_with(paths["stage_c"])).name == "t.safetensors"
    # 64 wide: nothing that the published Stage C, of 1280, could read.
    assert best("text_encoder", files_with(published.lite)).name == BUNDLED


def test_what_was_found_is_remembered_until_the_file_changes(tmp_path, small_family, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(small_family.paths["stage_a"].read_bytes())
    first = recognise(str(path))
    assert first.stage == "stage_a" and not first.recipes
    monkeypatch.setattr(catalog, "_inspect", lambda path: "looked again")
    assert recognise(str(path)) is first
    before = catalog.fingerprint(str(path))
    path.write_bytes(small_family.paths["previewer"].read_bytes())
    assert recognise(str(path)) == "looked again"
    assert catalog.fingerprint(str(path)) != before
    assert str(tmp_path) not in before  # hosts write it into the pictures that they save
    path.unlink()
    assert catalog.fingerprint(str(path)) == "missing"
    catalog._known.pop(str(path))


def test_combined_checkpoint_must_hold_all_parts(combined):
    assert part_of(str(combined["c.safetensors"]), "previewer").stage == "previewer"
    found = listed(*combined.values())
    assert best_checkpoint("stage_c", ("text_encoder", "previewer"), found).name == "c.safetensors"
    assert best_checkpoint("stage_b", ("stage_a",), found).name == "b.safetensors"
    assert best_checkpoint("stage_b", ("previewer",), found) is None


def test_embeddings_are_found_with_and_without_suffix():
    find = catalog.embedding_finder([ModelFile("sub\\red.safetensors", "/1"), ModelFile("red.safetensors", "/2")])
    assert find("red") == "/2" and find("red.safetensors") == "/2"
    assert find("sub/red") == "/1" and find("blue") is None


def test_a_listed_file_that_is_gone_does_not_stop_auto(tmp_path, small_family):
    class Listing(runtime.PlainBackend):
        def model_files(self, folder):
            return ["gone.safetensors", *super().model_files(folder)]

        @staticmethod
        def _roots():
            return [small_family.models]

    with runtime.using(Listing()):
        assert files.find("stage_c", "auto").path == str(small_family.paths["stage_c"])
        with pytest.raises(ValueError, match="gone"):
            files.find("stage_c", "gone.safetensors")
