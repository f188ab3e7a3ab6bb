"""Pictures in a conditioning: what the node writes, who reads it, and what is refused."""

import copy
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from attachment_kit import IMAGE_WIDTH, SETTINGS, noise, samples
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes_kit import load, run, sample_c
from PIL import Image

from stable_cascade_nodes.cascade_ops import stages, wires
from stable_cascade_nodes.cascade_ops.denoisers import Pictures, StageCDenoiser
from stable_cascade_nodes.cascade_ops.image_prompts import ClipVisionOutput, ImagePrompt, add_pictures, embed_prompts
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.vision import CROPS, encode_pictures


@pytest.fixture
def host(fuller_host):
    return fuller_host


def encoded(text="red"):
    return run("CascadeEncodeText", text_encoder=load("CascadeLoadTextEncoder"), text=text)["result"][0]


def prompted(image=None, conditioning=None, **changes):
    """The answer of the node for a picture, as a conditioning by default."""
    inputs = {"conditioning": encoded() if conditioning is None else conditioning, "weight": 1.0, "crop": "center"}
    if image is not None:
        inputs |= {"image": image, "image_encoder": load("CascadeLoadImageEncoder")}
    return run("CascadeImagePrompt", **inputs | changes)


def with_picture(*given, **changes):
    return prompted(*given, **changes)["result"][0]


def embedded(image, crop="center"):
    """Embeddings ``[k, E]`` of an `IMAGE`."""
    return encode_pictures(load("CascadeLoadImageEncoder"), image.movedim(-1, 1), crop)[:, 0]


def read(conditioning):
    return wires.read_pictures(conditioning, "positive")


def entry(embeds, strength):
    """As ComfyUI's unCLIPConditioning writes it."""
    output = SimpleNamespace(image_embeds=embeds)
    return {"clip_vision_output": output, "strength": strength, "noise_augmentation": 0.0}


def with_entries(conditioning, *entries):
    ((hidden, options),) = conditioning
    return [[hidden, options | {"unclip_conditioning": list(entries)}]]


def assert_pictures(found, embeddings, weights):
    """embeddings: ``[k, E]``."""
    assert torch.equal(found.embeddings, embeddings[None]) and torch.equal(found.weights, torch.tensor(weights))


def by_core(conditioning):
    """The embeddings as ComfyUI's Stage C puts them together."""
    entries = conditioning[0][1]["unclip_conditioning"]
    return torch.cat([each["clip_vision_output"].image_embeds.unsqueeze(0) * each["strength"] for each in entries], 1)


# What is written -----------------------------------------------------------------------------------------------


def test_a_picture_is_written_as_core_writes_it(host):
    image, before = noise(1, 60, 100, 3), encoded()
    untouched = copy.deepcopy(before)
    answer = prompted(image, before, weight=0.5)
    assert answer["ui"]["text"] == ["1 picture at 0.5"] and host.placings[-1][0] == ["image_encoder"]
    ((hidden, options),) = answer["result"][0]
    assert hidden is before[0][0] and options["pooled_output"] is before[0][1]["pooled_output"]
    (entry,) = options["unclip_conditioning"]
    assert entry.keys() == {"clip_vision_output", "strength", "noise_augmentation", "cascade_weight"}
    assert (entry["strength"], entry["noise_augmentation"], entry["cascade_weight"]) == (0.5, 0.0, 0.5)
    embeds = entry["clip_vision_output"].image_embeds
    assert embeds.shape == (1, IMAGE_WIDTH) and (embeds.dtype, embeds.device.type) == (torch.float32, "cpu")
    assert torch.equal(embeds, embedded(image)) and torch.equal(entry["clip_vision_output"]["image_embeds"], embeds)
    # What came in is as it was.
    assert torch.equal(before[0][0], untouched[0][0]) and before[0][1].keys() == {"pooled_output"}


def test_several_pictures_follow_each_other_with_their_own_weights(host):
    first, second = noise(1, 60, 100, 3), noise(2, 60, 100, 3, seed=1)
    one = with_picture(first, weight=0.5)
    answer = prompted(second, one, weight=2.0)
    assert answer["ui"]["text"] == ["2 pictures at 2"]
    both, (ours, theirs) = answer["result"][0], (embedded(first), embedded(second))
    assert_pictures(read(both), torch.cat([ours, theirs]), [0.5, 2.0, 2.0])
    # ComfyUI's samplers read the weight as a strength.
    assert torch.equal(by_core(both), torch.cat([ours * 0.5, theirs * 2])[None])
    # The shorter chain is still what it was.
    assert_pictures(read(one), ours, [0.5])


def test_pictures_of_core_and_ours_are_mixed_in_any_order(host):
    image, of_core = noise(1, 60, 100, 3), SimpleNamespace(image_embeds=noise(1, IMAGE_WIDTH, seed=5))
    of_cores_node = entry(of_core.image_embeds, 0.3)
    before = with_entries(encoded(), of_cores_node)
    ours, theirs = embedded(image), of_core.image_embeds
    # ComfyUI's strength scales the embedding; our weight does not, of whichever node the embedding is.
    assert_pictures(read(with_picture(image, before, weight=0.6)), torch.cat([theirs * 0.3, ours]), [1.0, 0.6])
    after = with_picture(None, with_picture(image), clip_vision_output=of_core, weight=0.3)
    assert_pictures(read(after), torch.cat([ours, theirs]), [1.0, 0.3])
    assert before[0][1]["unclip_conditioning"] == [of_cores_node]


def test_what_has_no_strength_is_left_out():
    plain = [[noise(1, 3, 4), {"pooled_output": noise(1, 4)}]]
    first, off, last = entry(noise(1, 5), 0.5), entry(noise(2, 5, seed=1), 0.0), entry(noise(1, 5, seed=2), 1.0)
    assert read(with_entries(plain, off)) is None and read(plain) is None
    kept = torch.cat([first["clip_vision_output"].image_embeds * 0.5, last["clip_vision_output"].image_embeds])
    assert_pictures(read(with_entries(plain, off, first, off, last)), kept, [1.0, 1.0])


def test_the_crop_decides_what_is_seen(host):
    image = noise(1, 40, 120, 3)
    found = {crop: with_picture(image, crop=crop)[0][1]["unclip_conditioning"][0] for crop in CROPS}
    for crop, entry in found.items():
        assert torch.equal(entry["clip_vision_output"].image_embeds, embedded(image, crop))
    assert len({float(entry["clip_vision_output"].image_embeds.sum()) for entry in found.values()}) == len(CROPS)


def test_combined_prompts_all_get_the_picture():
    conditioning = [[noise(1, 3, 4), {"pooled_output": noise(1, 4)}], [noise(1, 3, 4), {"pooled_output": noise(1, 4)}]]
    added = add_pictures(conditioning, ClipVisionOutput(noise(1, 5)), 1.0)
    assert [len(options["unclip_conditioning"]) for _, options in added] == [1, 1]


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4), weight=st.floats(0.05, 10))
def test_a_batch_is_the_same_as_one_after_another(cuts, weight):
    embeds = noise(sum(cuts), 5)
    plain = [[noise(1, 3, 4), {"pooled_output": noise(1, 4)}]]
    together, chained = add_pictures(plain, ClipVisionOutput(embeds), weight), plain
    for part in embeds.split(cuts):
        chained = add_pictures(chained, ClipVisionOutput(part), weight)
    assert_pictures(read(together), embeds, [weight] * len(embeds))
    assert all(torch.equal(*parts) for parts in zip(read(together), read(chained), strict=True))


# What it does --------------------------------------------------------------------------------------------------


def test_pictures_act_on_stage_c_by_weight_from_either_side(host):
    plain, inputs = sample_c(host)
    image = noise(1, 60, 100, 3)

    def sampled(**changes):
        return run("CascadeSampleStageC", **inputs | changes)["result"][0]["samples"]

    results = [
        samples(plain),
        sampled(positive=with_picture(image)),
        sampled(positive=with_picture(image, weight=0.2)),
        sampled(positive=with_picture(image, with_picture(noise(1, 60, 100, 3, seed=1)))),
        sampled(negative=with_picture(image, inputs["negative"])),
    ]
    for number, first in enumerate(results):
        for second in results[number + 1 :]:
            assert (first - second).abs().max() > 1e-4
    hidden = with_picture(image)
    assert torch.equal(sampled(positive=hidden), results[1])


def test_weight_0_is_no_picture_to_the_last_bit(host):
    plain, inputs = sample_c(host)
    image, of_core = noise(3, 60, 100, 3), SimpleNamespace(image_embeds=noise(2, IMAGE_WIDTH))
    placings = len(host.placings)
    answer = prompted(image, inputs["positive"], weight=0.0)
    assert answer["ui"]["text"] == ["no picture: the weight is 0"] and len(host.placings) == placings
    off = with_picture(None, answer["result"][0], clip_vision_output=of_core, weight=0.0)
    assert torch.equal(samples(run("CascadeSampleStageC", **inputs | {"positive": off})), samples(plain))
    # Beside another picture too, whose tokens would share the attention with theirs.
    one = with_picture(image[:1], inputs["positive"])
    both = with_picture(image, one, weight=0.0)
    first, second = (samples(run("CascadeSampleStageC", **inputs | {"positive": wire})) for wire in (one, both))
    assert torch.equal(first, second) and not torch.equal(first, samples(plain))
    assert "unclip_conditioning" not in add_pictures(inputs["positive"], of_core, 0.0)[0][1]


def test_a_run_that_was_stopped_encodes_nothing(host, monkeypatch):
    stop = threading.Event()
    stop.set()

    def stopped():
        if stop.is_set():
            raise InterruptedError

    host.check_interrupted = stopped
    placings = len(host.placings)
    with pytest.raises(InterruptedError):
        prompted(noise(1, 60, 100, 3), [[noise(1, 3, 4), {"pooled_output": noise(1, 4)}]])
    assert "image_encoder" not in [stage for names, _ in host.placings[placings:] for stage in names]


# Batches -------------------------------------------------------------------------------------------------------


def sampled_batch(handles, prompts, pictures, batch):
    latent = stages.empty_latent(handles["stage_c"], 128, 96, batch)
    return stages.sample_stage_c(
        handles["stage_c"], *prompts, latent, seed=3, settings=SETTINGS, pictures=pictures
    ).samples


def test_pictures_are_for_all_or_one_for_each(handles, prompts):
    pictures = noise(2, 1, IMAGE_WIDTH) * 5
    alone = [sampled_batch(handles, prompts, pictures[number : number + 1], 1) for number in (0, 1)]
    for_all = sampled_batch(handles, prompts, pictures[:1], 2)
    torch.testing.assert_close(for_all[:1], alone[0], rtol=1e-4, atol=1e-4)
    each = sampled_batch(handles, prompts, pictures, 2)
    torch.testing.assert_close(each[:1], alone[0], rtol=1e-4, atol=1e-4)
    assert (each[1] - for_all[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"image embedding has the shape \(2, 1, 24\), .* batch of 1 or 3"):
        sampled_batch(handles, prompts, pictures, 3)


# Weights -------------------------------------------------------------------------------------------------------


def test_a_weight_of_1_is_the_picture_as_before_to_the_last_bit(handles, prompts):
    pictures = noise(1, 2, IMAGE_WIDTH) * 5
    plain = sampled_batch(handles, prompts, pictures, 2)
    assert torch.equal(sampled_batch(handles, prompts, Pictures(pictures, torch.ones(2)), 2), plain)
    for weights in ([1.0, 0.5], [0.5, 1.0], [1.0, 2.0]):
        other = sampled_batch(handles, prompts, Pictures(pictures, torch.tensor(weights)), 2)
        assert (other - plain).abs().max() > 1e-3


def test_a_weight_of_0_is_no_picture_to_the_last_bit(handles, prompts):
    nothing, picture = sampled_batch(handles, prompts, None, 2), noise(1, 1, IMAGE_WIDTH) * 5
    assert torch.equal(sampled_batch(handles, prompts, Pictures(picture, torch.zeros(1)), 2), nothing)


def test_each_half_has_its_own_weights(handles, prompts):
    """A guided run is the mix of what each half predicts alone, whether both are one pass or two."""
    model, x = handles["stage_c"].module, noise(2, 16, 4, 4)
    one, two = (noise(1, count, IMAGE_WIDTH, seed=count) * 5 for count in (1, 2))
    given = [None, one, Pictures(one, torch.tensor([0.3])), Pictures(two, torch.tensor([0.3, 1.7]))]

    def predicted(*images, guided=True):
        texts = prompts if guided else prompts[:1]
        denoiser = StageCDenoiser(model, *texts, image=images[0], uncond_image=images[1] if guided else None)
        return denoiser.prepare(torch.tensor([0.5]), x.shape, guided)(x, 0, guided)

    def alone(text, image):
        return StageCDenoiser(model, text, image=image).prepare(torch.tensor([0.5]), x.shape, False)(x, 0, False)[0]

    zeros = torch.zeros(1, 1, IMAGE_WIDTH)
    with torch.no_grad():
        for ours, theirs in itertools.product(given, [zeros, *given[1:]]):
            for half, text, image in zip(predicted(ours, theirs), prompts, (ours, theirs), strict=True):
                torch.testing.assert_close(half, alone(text, image), rtol=1e-4, atol=1e-4)
        # Without pictures of its own, the other half reads as many of none.
        half = predicted(given[3], None)[1]
        torch.testing.assert_close(half, alone(prompts[1], torch.zeros_like(two)), rtol=1e-4, atol=1e-4)


def test_the_order_of_pictures_does_not_matter_as_long_as_each_keeps_its_weight(handles, prompts):
    pictures, weights = noise(1, 3, IMAGE_WIDTH) * 5, torch.tensor([0.2, 0.7, 1.0])
    usual = sampled_batch(handles, prompts, Pictures(pictures, weights), 1)
    for order in ([2, 1, 0], [1, 0, 2]):
        turned = sampled_batch(handles, prompts, Pictures(pictures[:, order], weights[order]), 1)
        torch.testing.assert_close(turned, usual, rtol=1e-3, atol=1e-3)
        swapped = sampled_batch(handles, prompts, Pictures(pictures[:, order], weights), 1)
        assert (swapped - usual).abs().max() > 1e-2


def test_weights_that_do_not_fit_the_pictures_are_refused(handles, prompts):
    pictures = Pictures(noise(1, 2, IMAGE_WIDTH), torch.ones(3))
    with pytest.raises(ValueError, match=r"2 pictures for the prompt came with weights of shape \[3\], expected \[2\]"):
        sampled_batch(handles, prompts, pictures, 1)
    with pytest.raises(ValueError, match=r"picture was encoded 23 wide and Stage C custom .* reads 24"):
        sampled_batch(handles, prompts, Pictures(noise(1, 2, 23), torch.ones(2)), 1)


# Refusals ------------------------------------------------------------------------------------------------------


def test_the_picture_comes_in_exactly_one_way(host):
    image, encoder, output = noise(1, 8, 8, 3), load("CascadeLoadImageEncoder"), ClipVisionOutput(noise(1, 24))
    conditioning = encoded()
    for inputs, words in (
        ({}, "without image_encoder and image, expected"),
        ({"image": image}, "without image_encoder, expected"),
        ({"image_encoder": encoder}, "without image, expected"),
        ({"image_encoder": encoder, "weight": 0.0}, "without image, expected"),
        ({"image": image, "clip_vision_output": output}, "two ways, as clip_vision_output and as image,"),
        ({"image": image, "image_encoder": encoder, "clip_vision_output": output}, "as image_encoder and image,"),
        ({"clip_vision_output": output, "crop": "pad"}, "crop is 'pad' .* set crop to center"),
        ({"image": image, "image_encoder": load("CascadeLoadPreviewer")}, "image encoder is read: connect the loader"),
        ({"image": image[0], "image_encoder": encoder}, r"values of shape \[8, 8, 3\], expected pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            run("CascadeImagePrompt", **{"conditioning": conditioning, "weight": 1.0, "crop": "center"} | inputs)


def test_an_encoder_of_another_width_is_refused(host):
    _, inputs = sample_c(host)
    wide = SimpleNamespace(image_embeds=torch.zeros(1, 768))
    with pytest.raises(ValueError, match="encoded 768 wide and the conditioning has one that is 24 wide"):
        with_picture(None, with_picture(noise(1, 8, 8, 3)), clip_vision_output=wide)
    mixed = with_entries(inputs["positive"], entry(torch.zeros(1, 768), 1.0), entry(torch.zeros(1, 24), 1.0))
    with pytest.raises(ValueError, match="conditioning of 'positive' were encoded 24 and 768 wide, expected one"):
        run("CascadeSampleStageC", **inputs | {"positive": mixed})
    positive = with_picture(None, inputs["positive"], clip_vision_output=wide)
    with pytest.raises(ValueError, match=r"picture was encoded 768 wide and Stage C custom .* reads 24"):
        run("CascadeSampleStageC", **inputs | {"positive": positive})


def test_a_clip_vision_model_without_a_projection_is_refused(host):
    for embeds, found in ((None, "has none where"), (torch.zeros(257), r"has one of shape \[257\]")):
        with pytest.raises(ValueError, match=found):
            with_picture(clip_vision_output=SimpleNamespace(image_embeds=embeds))


# Without a graph -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(more_models):
    return CascadePipeline.load(more_models, device="cpu", image_encoder=True)


def generated(pipeline, **changes):
    return pipeline.generate("red", **{"width": 100, "height": 60, "seed": 1, "steps_c": 2, "steps_b": 1} | changes)[0]


def test_python_makes_the_picture_of_the_graph(host, pipeline, tmp_path):
    Image.fromarray(noise(60, 100, 3).mul(255).byte().numpy()).save(tmp_path / "p.png")
    prompts = [ImagePrompt.read(tmp_path / "p.png", 0.5, "pad"), ImagePrompt(noise(2, 3, 30, 40), 2.0)]
    image = prompts[0].images.movedim(1, -1)
    wire = with_picture(prompts[1].images.movedim(1, -1), with_picture(image, weight=0.5, crop="pad"), weight=2.0)
    assert_pictures(
        embed_prompts(pipeline.image_encoder, prompts), read(wire).embeddings[0], read(wire).weights.tolist()
    )
    assert read(wire).weights.tolist() == [0.5, 2.0, 2.0]
    encoded_by_hand = [embedded(p.images.movedim(1, -1), p.crop) for p in prompts]
    assert torch.equal(read(wire).embeddings[0], torch.cat(encoded_by_hand))
    plain = generated(pipeline)
    assert generated(pipeline, images=prompts).tobytes() != plain.tobytes()
    assert generated(pipeline, images=[ImagePrompt(prompts[1].images, 0.0)]).tobytes() == plain.tobytes()
    assert embed_prompts(pipeline.image_encoder, []) is None


def test_a_pipeline_without_an_encoder_says_so(more_models):
    pipeline = CascadePipeline.load(more_models, device="cpu")
    assert pipeline.image_encoder is None
    with pytest.raises(ValueError, match=r"no image encoder .* load it with .*image_encoder=True"):
        generated(pipeline, images=[ImagePrompt(noise(1, 3, 8, 8))])
    files = {"image_encoder": more_models / "clip_vision/v.safetensors"}
    named = CascadePipeline.load({**files, "stage_c": more_models / "diffusion_models/c.safetensors"}, device="cpu")
    assert named.image_encoder.name == "v.safetensors"
