"""Training the CLIP towers: what captions say becomes readable, pictures find their captions."""

import math
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from stable_cascade_nodes.cascade_ops.checkpoints import load
from stable_cascade_nodes.cascade_ops.text import TextEncoder
from stable_cascade_nodes.cascade_ops.tokenizer import default_tokenizer, pad_tokens
from stable_cascade_nodes.cascade_ops.training.clip import (
    AttributeHeads,
    caption_tokens,
    collate,
    contrastive_loss,
    mean_state,
    retrieval_at_1,
    scale_penalty,
)
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import Encoders, Models, Optimizer, Settings
from stable_cascade_nodes.cascade_ops.training.targets import image_encoder, text_encoder
from stable_cascade_nodes.cascade_ops.training.trainer import Trainer

TEXT = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "gelu"}
IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "projection_dim": 16}
IMAGE |= {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_act": "gelu"}
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0)}
CLASSES = {"top": 4, "bottom": 4}
PAIRS = [(a, b) for a in COLOURS for b in COLOURS]


class Flags:
    """Pictures of two colours, their captions, and both colours by place and in the order of mention."""

    def __init__(self, text: TextEncoder | None = None):
        self.text = text

    def batches(self, first_step, last_step, global_batch, positions):
        for step in range(first_step, last_step):
            draws = Draws(5, step, positions)
            numbers, swapped = draws.integers(len(PAIRS)).tolist(), draws.chosen(0.5).tolist()
            chosen = [PAIRS[number] for number in numbers]
            top, bottom = (torch.tensor([list(COLOURS).index(pair[i]) for pair in chosen]) for i in (0, 1))
            swap = torch.tensor(swapped)
            captions = [f"{b} below {a}" if s else f"{a} above {b}" for (a, b), s in zip(chosen, swapped, strict=True)]
            image = torch.tensor([[COLOURS[a], COLOURS[b]] for a, b in chosen]).permute(0, 2, 1)[..., None]
            batch = {
                "caption": captions,
                "image": image.repeat_interleave(20, dim=2).expand(-1, -1, -1, 48),
                "attributes": {
                    "top": top,
                    "bottom": bottom,
                    "said top": torch.where(swap, bottom, top),
                    "said bottom": torch.where(swap, top, bottom),
                },
            }
            if self.text:
                batch["text_pooled"] = torch.stack([self.text.encode(caption).pooled for caption in captions])
            yield batch


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
    found = {name: value.item() for name, value in heads.accuracy(features, targets).items()}
    assert found == {"colour": 0.5, "shape": 1.0, "all": 0.5}
    colour = (math.log(1 + math.exp(-5)) + math.log(1 + math.exp(5))) / 2
    shape = math.log(1 + 2 * math.exp(-7))
    assert heads.loss(features, targets).item() == pytest.approx((colour + shape) / 2, rel=1e-5)


def test_mean_state_and_scale_penalty():
    states = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert mean_state(states, torch.tensor([[1, 1, 0]])).item() == 2
    unit = torch.tensor([[1.0], [-1.0]]) / math.sqrt(2)
    assert scale_penalty(unit).item() == pytest.approx(0, abs=1e-6)
    assert scale_penalty(unit + 2).item() == pytest.approx(4, rel=1e-5)


def test_caption_tokens_are_clips_own():
    ids, mask = pad_tokens(default_tokenizer().encode("a red circle, on the left"))
    assert list(caption_tokens("a red circle, on the left")) == ids[: sum(mask)]
    long = caption_tokens("red " * 200)
    assert (len(long), long[0], long[-1]) == (77, 49406, 49407)


def test_collate_pads_with_the_end_and_one_far_position():
    far = Counter()
    for step in range(200):
        ids, mask, positions = collate([[8, 1, 9], [8, 1, 2, 3, 9]], Draws(0, step, [0, 1]))
        assert ids.tolist() == [[8, 1, 9, 49407, 49407, 49407], [8, 1, 2, 3, 9, 49407]]
        assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
        assert positions[:, :-1].tolist() == [[0, 1, 2, 3, 4]] * 2
        assert positions[0, -1] >= 3
        assert positions[1, -1] >= 5
        far.update(positions[:, -1].tolist())
    assert max(far) == 76
    assert len(far) > 60
    full = collate([[8] * 77], Draws(0, 0, [0]))[2]
    assert full.shape == (1, 78)
    assert full.max() == 76


def text_settings(output, steps=120, **changes) -> Settings:
    encoders = Encoders(attributes=CLASSES, token_attributes={f"said {name}": 4 for name in CLASSES})
    optimizer = Optimizer(learning_rate=5e-3, warmup=5, schedule="cosine")
    return Settings(
        "text_encoder", str(output), steps=steps, batch_size=32, network=TEXT, encoders=encoders,
        optimizer=optimizer, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A trained text tower: the objective and its file."""
    folder = tmp_path_factory.mktemp("text")
    settings = text_settings(folder)
    objective = text_encoder.build(settings, None)
    Trainer(objective, Flags(), settings, SingleProcess("cpu")).run()
    return objective.eval(), objective.export(folder, "text")[0]


@torch.no_grad()
def test_the_text_tower_makes_readable_what_captions_say(text_run):
    objective, _ = text_run
    batch = next(iter(Flags().batches(1000, 1001, 64, range(64))))
    figures = objective(batch, Draws(0, 0, range(64))).figures
    assert figures["pooled"] > 0.9
    assert figures["tokens"] > 0.9


@torch.no_grad()
def test_the_text_tower_is_written_with_the_rows_that_captions_use(text_run):
    objective, path = text_run
    with safe_open(path, framework="pt") as file:
        rows = file.get_tensor("token_rows").tolist()
        table = file.get_slice("text_model.embeddings.token_embedding.weight").get_shape()
    words = {token for pair in PAIRS for token in caption_tokens(f"{pair[0]} above {pair[1]}")}
    assert set(rows) == words | set(caption_tokens("below"))
    assert table == [len(rows), 32]
    encoder, info = load(path, expect="text_encoder")
    assert info.config["hidden_size"] == 32
    ids, mask, positions = collate([caption_tokens("red above blue")], Draws(0, 0, [0]))
    pooled, states = objective.read(ids, mask, positions)
    given = encoder.encode("red above blue")
    assert torch.allclose(given.pooled, pooled, atol=1e-5)
    assert torch.allclose(given.hidden[:, :5], states[:, :5], atol=1e-5)


def test_the_text_tower_goes_on_from_its_file(text_run, tmp_path):
    settings = text_settings(tmp_path, steps=1)
    settings = Settings(**{**vars(settings), "network": {}, "models": Models(init=str(text_run[1]))})
    objective = text_encoder.build(settings, None)
    before = objective.module.text_projection.weight.detach().clone()
    assert torch.equal(before, text_run[0].module.text_projection.weight)
    Trainer(objective, Flags(), settings, SingleProcess("cpu")).run()
    assert not torch.equal(before, objective.module.text_projection.weight)
    with safe_open(objective.export(tmp_path, "more")[0], framework="pt") as file:
        assert len(file.get_tensor("token_rows")) == text_run[0].used.sum()


def test_a_text_tower_needs_something_to_tell(tmp_path):
    with pytest.raises(ValueError, match=r"encoders\.attributes"):
        text_encoder.build(Settings("text_encoder", str(tmp_path), network=TEXT), None)


@pytest.mark.parametrize("attributes", [{}, CLASSES], ids=["captions alone", "attributes"])
def test_the_image_tower_finds_its_captions(text_run, tmp_path, attributes):
    models = Models(text_encoder=str(text_run[1]))
    settings = Settings(
        "image_encoder", str(tmp_path), steps=120, batch_size=32, network=IMAGE, models=models,
        encoders=Encoders(attributes=attributes), optimizer=Optimizer(learning_rate=5e-3, warmup=5, schedule="cosine"),
    )  # fmt: skip
    parts = Parts(models)
    objective = image_encoder.build(settings, parts)
    assert objective.needs == {"image", "text_pooled"} | ({"attributes"} if attributes else set())
    Trainer(objective, Flags(parts.load("text_encoder").module), settings, SingleProcess("cpu")).run()
    (path,) = objective.export(tmp_path, "image")
    with safe_open(path, framework="pt") as file:
        projection = file.get_tensor("text_to_image_projection.weight")
    module, info = load(path, expect="image_encoder")
    assert (info.config["projection_dim"], list(projection.shape)) == (16, [16, 24])
    texts = torch.cat([parts.load("text_encoder").module.encode(f"{a} above {b}").pooled for a, b in PAIRS])
    colours = torch.tensor([[COLOURS[a], COLOURS[b]] for a, b in PAIRS]).permute(0, 2, 1)[..., None]
    pixels = image_encoder.clip_pixels(colours.repeat_interleave(20, 2).expand(-1, -1, -1, 48), 32)
    with torch.no_grad():
        found = retrieval_at_1(module(pixels).image_embeds, texts @ projection.T, group=len(PAIRS))
    assert found > 0.7


def test_pixels_are_normalised_as_clip_does():
    picture = torch.ones(1, 3, 2, 4)
    picture[..., 0, 1] = 0
    pixels = image_encoder.clip_pixels(picture, 2)
    assert pixels.shape == (1, 3, 2, 2)  # the outer columns are cut off
    assert pixels[0, :, 1, 1].tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-3)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([-1.7923, -1.7521, -1.4802], abs=1e-3)
