"""The CLIP objectives and the training loop, and the tiny family's recipe that uses them."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from stable_cascade_nodes.cascade_ops.tokenizer import default_tokenizer, pad_tokens
from stable_cascade_nodes.cascade_ops.training.clip import (
    AttributeHeads,
    contrastive_loss,
    mean_state,
    retrieval_at_1,
    scale_penalty,
)
from stable_cascade_nodes.cascade_ops.training.loop import LoopConfig, Trainer
from stable_cascade_nodes.tiny import train_clip
from stable_cascade_nodes.tiny.captions import Description, caption_full, describe
from stable_cascade_nodes.tiny.drawing import POSITION_NAMES, random_scene
from stable_cascade_nodes.tiny.pool import build_pool
from stable_cascade_nodes.tiny.retrieval import distinct_scenes, retrieval


def test_contrastive_loss_by_hand():
    # Two pairs at right angles: each row has logits (s, 0) with the right one first.
    image = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    text = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    scale = torch.tensor(2.0)
    expected = math.log(1 + math.exp(-2.0))
    assert contrastive_loss(image, text, scale.log()).item() == pytest.approx(expected, rel=1e-5)
    assert contrastive_loss(image, text.flip(0), scale.log()).item() == pytest.approx(expected + 2, rel=1e-5)
    capped = contrastive_loss(image, text.flip(0), torch.tensor(50.0))
    assert capped.item() == pytest.approx(100, rel=1e-4)


def test_retrieval_counts_within_groups_only():
    embeds = torch.eye(4).repeat(2, 1)
    assert retrieval_at_1(embeds, embeds, group=4) == 1.0
    wrong = embeds.clone()
    wrong[[0, 1]] = wrong[[1, 0]]
    assert retrieval_at_1(embeds, wrong, group=4) == 0.75
    assert retrieval_at_1(embeds[:6], embeds[:6], group=4) == 1.0
    with pytest.raises(ValueError, match="3 pairs, expected at least 4"):
        retrieval_at_1(embeds[:3], embeds[:3], group=4)


def test_attribute_heads_read_their_own_classes():
    heads = AttributeHeads(3, {"colour": 2, "shape": 3})
    with torch.no_grad():
        heads.linear.weight.zero_()
        heads.linear.bias.copy_(torch.tensor([0.0, 5.0, 7.0, 0.0, 0.0]))
    features = torch.randn(2, 3)
    targets = {"colour": torch.tensor([1, 0]), "shape": torch.tensor([0, 0])}
    assert heads.accuracy(features, targets) == {"colour": 0.5, "shape": 1.0, "all": 0.5}
    colour = (math.log(1 + math.exp(-5)) + math.log(1 + math.exp(5))) / 2
    shape = math.log(1 + 2 * math.exp(-7))
    assert heads.loss(features, targets).item() == pytest.approx((colour + shape) / 2, rel=1e-5)


def test_mean_state_and_scale_penalty():
    states = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert mean_state(states, torch.tensor([[1, 1, 0]])).item() == 2
    unit = torch.tensor([[1.0], [-1.0]]) / math.sqrt(2)
    assert scale_penalty(unit).item() == pytest.approx(0, abs=1e-6)
    assert scale_penalty(unit + 2).item() == pytest.approx(4, rel=1e-5)


def some_scenes(count, **options):
    rng = np.random.default_rng(0)
    return [random_scene(rng, **options) for _ in range(count)]


def decoded(row):
    return {name: train_clip._CLASSES[name][index] for name, index in row.items()}


def test_attributes_follow_the_caption():
    scene = some_scenes(1, objects=2)[0]
    first, other = sorted(scene.objects, key=lambda o: POSITION_NAMES.index(o.position))
    mentioned = Description("", (other, first))
    in_order = decoded(train_clip.attributes(mentioned, scene, ordered=True))
    free = decoded(train_clip.attributes(mentioned, scene, ordered=False))
    assert (in_order["first colour"], in_order["other shape"]) == (other.colour, first.shape)
    assert (free["first colour"], free["other shape"]) == (first.colour, other.shape)
    unplaced = replace(mentioned, names_positions=False, names_background=False, names_sizes=False)
    vague = decoded(train_clip.attributes(unplaced, scene, ordered=False))
    assert vague["first colour"] == other.colour
    assert {vague[k] for k in ("background", "pattern", "second", "first size", "other position")} == {"unnamed"}


def test_attributes_of_one_object():
    scene = some_scenes(1, objects=1)[0]
    names = decoded(train_clip.attributes(train_clip.full_description(scene), scene, ordered=False))
    item = scene.objects[0]
    assert [names[f"first {k}"] for k in ("colour", "shape", "size", "position")] == [
        item.colour,
        item.shape,
        item.size,
        item.position,
    ]
    assert {v for k, v in names.items() if k.startswith("other")} == {"none"}
    assert names["background"] == scene.background


@pytest.fixture(scope="module")
def vocabulary():
    return train_clip.CompactVocabulary.of_captions()


def test_the_vocabulary_covers_every_caption_with_clips_own_ids(vocabulary):
    rng = np.random.default_rng(8)
    for split in ("train", "test", "held_out"):
        for _ in range(100):
            scene = random_scene(rng, split)
            for text in (describe(scene, rng).text, caption_full(scene)):
                rows = vocabulary.rows(text)
                expected, mask = pad_tokens(default_tokenizer().encode(text))
                assert [vocabulary.ids[row] for row in rows] == expected[: sum(mask)]
    assert vocabulary.ids == sorted(vocabulary.ids)
    assert vocabulary.ids[-2:] == [49406, 49407]


def test_collate_pads_with_the_end_and_one_far_position():
    rng = np.random.default_rng(0)
    far = Counter()
    for _ in range(200):
        ids, mask, positions = train_clip.collate([[8, 1, 9], [8, 1, 2, 3, 9]], 9, rng)
        assert ids.tolist() == [[8, 1, 9, 9, 9, 9], [8, 1, 2, 3, 9, 9]]
        assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
        assert positions[:, :-1].tolist() == [[0, 1, 2, 3, 4]] * 2
        assert positions[0, -1] >= 3
        assert positions[1, -1] >= 5
        far.update(positions[:, -1].tolist())
    assert max(far) == 76
    assert len(far) > 60


def test_a_saved_text_encoder_gives_the_same_states_at_full_length(tmp_path, vocabulary):
    objective = train_clip.text_objective(vocabulary).eval()
    path = tmp_path / "text_encoder.safetensors"
    train_clip.save_text(path, objective, vocabulary)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["cascade.stage"] == "text_encoder"
        assert '"vocab_size": 49408' in file.metadata()["cascade.config"]
        rows = file.get_tensor("token_rows")
        table = file.get_slice("text_model.embeddings.token_embedding.weight").get_shape()
    assert table == [len(rows), 128]
    loaded, loaded_vocabulary = train_clip.load_text(path)
    texts = [caption_full(scene) for scene in some_scenes(3)]
    short = train_clip.embed_texts(objective, vocabulary, texts)
    row_of = {token: row for row, token in enumerate(loaded_vocabulary.ids)}
    padded = [pad_tokens(default_tokenizer().encode(text)) for text in texts]
    ids = torch.tensor([[row_of[token] for token in tokens] for tokens, _ in padded])
    with torch.no_grad():
        pooled, states = loaded.read(ids, torch.tensor([mask for _, mask in padded]))
    assert states.shape == (3, 77, 128)
    assert torch.allclose(pooled, short, atol=1e-5)


def test_the_text_objective_makes_attributes_readable(vocabulary, tmp_path):
    objective = train_clip.text_objective(vocabulary)
    rng = np.random.default_rng(0)
    batch = train_clip._text_batch(vocabulary, some_scenes(8), rng, full=0.5)
    ids, mask, positions, order_free, in_order = batch
    config = LoopConfig(40, lr=3e-3, warmup=5, ema_decay=0.0)
    Trainer(objective, lambda *step: (objective.loss(*batch), {}), config, tmp_path / "run.safetensors").run()
    with torch.no_grad():
        pooled, states = objective.read(ids, mask, positions)
    assert objective.pooled_heads.accuracy(pooled, order_free)["all"] == 1
    assert objective.mean_heads.accuracy(mean_state(states, mask), in_order)["all"] == 1
    assert objective.end_heads.accuracy(states[:, -1], in_order)["all"] == 1


def test_text_training_writes_the_encoder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_clip, "text_accuracy", lambda *a: {"summary": a[2:]})
    train_clip.main(["text", "--out", str(tmp_path), "--steps", "1"])
    out = capsys.readouterr().out
    assert "step 1/1" in out
    assert "held_out" in out
    objective, vocabulary = train_clip.load_text(tmp_path / "text_encoder.safetensors")
    fresh = train_clip.text_objective(vocabulary)
    assert not torch.equal(objective.model.text_projection.weight, fresh.model.text_projection.weight)


def test_image_training_runs_from_a_pool(tmp_path, vocabulary, capsys):
    build_pool(tmp_path / "pool", 16, size=32, jobs=1)
    out = tmp_path / "out"
    out.mkdir()
    train_clip.save_text(out / "text_encoder.safetensors", train_clip.text_objective(vocabulary), vocabulary)
    train_clip.train_image(out, tmp_path / "pool", steps=2)
    assert "step 2/2" in capsys.readouterr().out
    with safe_open(out / "image_encoder.safetensors", framework="pt") as file:
        assert file.metadata()["cascade.stage"] == "image_encoder"
        assert file.get_slice("text_to_image_projection.weight").get_shape() == [96, 128]
        assert file.get_slice("visual_projection.weight").get_shape() == [96, 128]
    assert retrieval(out, groups=1) < 0.2  # two steps teach nothing: what is found is found by chance


def test_retrieval_is_asked_with_captions_that_tell_pictures_apart():
    captions = [caption_full(scene) for scene in distinct_scenes(64)]
    assert len(set(captions)) == 64


def test_pixels_are_normalised_as_clip_does():
    picture = np.full((1, 2, 2, 3), 255, dtype=np.uint8)
    picture[0, 0, 0] = 0
    pixels = train_clip.normalise_pixels(picture)
    assert pixels.shape == (1, 3, 2, 2)
    assert pixels[0, :, 1, 1].tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-3)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([-1.7923, -1.7521, -1.4802], abs=1e-3)
