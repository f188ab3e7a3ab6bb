"""The recipe starts, trains, resumes and publishes: every command, on a pool of a few pictures and for two steps."""

import pytest
import torch
from safetensors import safe_open

from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file
from stable_cascade_nodes.cascade_ops.training.loop import read_tensors
from stable_cascade_nodes.tiny import (
    publish,
    train,
    train_clip,
    train_latent_encoder,
    train_stage_a,
    train_stage_b,
    train_stage_c,
)
from stable_cascade_nodes.tiny.evaluate import Family, measured_scenes, text_to_image
from stable_cascade_nodes.tiny.pool import build_pool

PICTURES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training folder in which every part was trained for two steps."""
    out = tmp_path_factory.mktemp("tiny")
    build_pool(out / "pool", PICTURES, jobs=1)
    build_pool(out / "pool", 256, split="test", size=32, jobs=1)
    arguments = ["--out", str(out), "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_stage_c, "EXTRA_SCENES", 4)
        patch.setattr(train_stage_c, "BATCH", 8)
        patch.setattr(train_stage_b, "EXTRA_SCENES", 4)
        patch.setattr(train_stage_b, "PICTURES", PICTURES)
        patch.setattr(train_latent_encoder, "BATCH", 4)
        patch.setattr(train_stage_a, "reconstruction_psnr", lambda model, pictures: 0.0)
        patch.setattr(train_clip, "text_accuracy", lambda *a: {})
        train_clip.main(["text", *arguments, "--device", "cpu"])
        train_clip.main(["image", *arguments, "--pool", str(out / "pool"), "--device", "cpu"])
        train_stage_a.main([*arguments, "--device", "cpu"])
        train_latent_encoder.main([*arguments, "--device", "cpu"])
        train_stage_c.main([*arguments, "--device", "cpu"])
        train_stage_b.main([*arguments, "--device", "cpu"])
    return out


@pytest.mark.parametrize("stage", publish.PARTS)
def test_every_part_is_written_as_what_it_is(folder, stage):
    info = inspect_file(folder / f"{stage}.safetensors")
    assert (info.stage, info.size) == (stage, "tiny")


def test_published_parts_are_a_family_that_makes_pictures(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "WEIGHTS", tmp_path)
    publish.main(["--out", str(folder)])
    assert {path.stem for path in tmp_path.iterdir()} == set(publish.PARTS)
    with safe_open(str(tmp_path / "stage_c.safetensors"), "pt") as file:
        assert file.get_tensor("clf.1.weight").dtype == torch.float16
    family = Family.load(tmp_path)
    assert family.defaults_c["width"] == 256
    assert text_to_image(family, measured_scenes(2, "test", 1), 0).shape == (2, 256, 256, 3)


def test_a_finished_part_is_not_trained_again(folder, capsys):
    before, _ = read_tensors(folder / "stage_a.safetensors")
    train_stage_a.main(["--out", str(folder), "--steps", "2", "--device", "cpu"])
    assert "step " not in capsys.readouterr().out
    after, _ = read_tensors(folder / "stage_a.safetensors")
    assert torch.equal(after["out_block.0.weight"], before["out_block.0.weight"])
    # The scale of the latent is fitted to the trained weights and not on top of an earlier fit.
    assert torch.allclose(after["down_blocks.3.1.weight"], before["down_blocks.3.1.weight"], rtol=1e-3)


def test_stage_b_sees_the_same_place_of_all_its_inputs():
    grid = torch.arange(64.0).view(8, 8)
    latent = grid.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(1, 1, 16, 16)
    parts = train_stage_b.crop([(latent, 2), (grid.expand(1, 1, 8, 8), 1)], 4, torch.Generator().manual_seed(3))
    assert [tuple(part.shape) for part in parts] == [(1, 1, 8, 8), (1, 1, 4, 4)]
    assert torch.equal(parts[0][..., ::2, ::2], parts[1])


def test_conditions_are_noised_and_dropped_as_said():
    clean = torch.ones(4000, 1, 2, 2)
    degraded = train_stage_b.degrade(clean, torch.Generator().manual_seed(0))
    dropped = (degraded.flatten(1) == 0).all(dim=1)
    untouched = (degraded.flatten(1) == 1).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(train_stage_b.DROPPED_SHARE, abs=0.02)
    expected = (1 - train_stage_b.NOISED_SHARE) * (1 - train_stage_b.DROPPED_SHARE)
    assert untouched.float().mean().item() == pytest.approx(expected, abs=0.03)


def test_the_plan_runs_parts_after_what_they_need(tmp_path, monkeypatch):
    order = []

    def run(name, out, device, threads):
        order.append(name)

    monkeypatch.setattr(train, "run_part", run)
    train.train(tmp_path, "cpu", jobs=3, threads=1)
    assert sorted(order) == sorted(train.RECIPE)
    for name, part in train.RECIPE.items():
        assert all(order.index(need) < order.index(name) for need in part.needs)
    # The previewer is trained with the latent encoder.
    assert set(train.RECIPE) >= set(publish.PARTS) - {"previewer"}
    train.train(tmp_path, "cpu", jobs=3, threads=1)
    assert len(order) == len(train.RECIPE)  # all were marked as done


def test_a_failed_part_stops_the_plan_and_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setitem(train.RECIPE, "stage_a", train.Part(("train_stage_a", "--nonsense"), ()))
    with pytest.raises(RuntimeError, match=r"stage_a ended with code 2: read .*stage_a\.log"):
        train.run_part("stage_a", tmp_path, "cpu", threads=1)
    assert "--out" in (tmp_path / "stage_a.log").read_text()
