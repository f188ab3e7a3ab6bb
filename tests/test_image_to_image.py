"""From a picture: the start of image to image, and parts made anew while the rest is held."""

from dataclasses import replace

import pytest
import torch
from golden import read_golden
from nodes_kit import run, sample_b, sample_c
from test_encoding import example, psnr

from stable_cascade_nodes.cascade_ops import encoding, masks, stages
from stable_cascade_nodes.cascade_ops.attachments import apply_control
from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.control_inputs import inpainting_input
from stable_cascade_nodes.cascade_ops.diffusion import image_generators
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.cascade_ops.wires import Latent
from stable_cascade_nodes.tiny.checker import read_picture

FEATHER = 16


@pytest.fixture(scope="module")
def tiny():
    stages_needed = ("text_encoder", "stage_c", "stage_b", "stage_a", "latent_encoder")
    return {stage: load_stage(bundled(stage).path, stage) for stage in stages_needed}


@pytest.fixture(scope="module")
def tiny_prompt(tiny):
    return lambda text: [stages.encode_text(tiny["text_encoder"], each) for each in (text, "")]


# The noise that a start below 1 begins from --------------------------------------------------------------------


def first_seen(handles, prompts, monkeypatch, **settings):
    """What Stage C is shown and told in the first step, from a latent of ones."""
    seen = []
    real = stages.sample

    def sample(denoiser, x, **arguments):
        seen.append((x, arguments))
        return real(denoiser, x, **arguments)

    monkeypatch.setattr(stages, "sample", sample)
    latent = Latent(torch.ones(1, 16, 3, 3), 128, 128)
    stages.sample_stage_c(handles["stage_c"], *prompts, latent, seed=4, settings=SamplingSettings(steps=3, **settings))
    return seen[0]


def noised(t, shift):
    """The reference's diffusion of a latent of ones with the noise of seed 4, by its own table of log-SNRs."""
    noise = torch.randn(16, 3, 3, generator=image_generators(4, 1)[0])[None]
    values, _ = read_golden("schedule")
    signal = torch.sigmoid(values[f"logsnr.shift{shift}"][(values["t"] - t).abs().argmin()])
    return signal.sqrt() + (1 - signal).sqrt() * noise


def test_reference_noise_leaves_the_shift_out_and_matched_takes_it_in(handles, prompts, monkeypatch):
    for name, shift in (("matched", 2.0), ("reference", 1.0)):
        x, arguments = first_seen(handles, prompts, monkeypatch, start=0.8, shift=2.0, start_noise=name)
        torch.testing.assert_close(x, noised(0.8, shift), rtol=1e-5, atol=1e-5)
        assert (arguments["shift"], arguments["t_start"], arguments["steps"]) == (2.0, 0.8, 3)


def test_start_noise_acts_where_the_shift_does(handles, prompts, sampled):
    stage_c = handles["stage_c"]
    matched = sampled(stage_c, start=0.5, shift=2.0)
    assert torch.equal(matched, sampled(stage_c, start=0.5, shift=2.0, start_noise="matched"))
    assert (matched - sampled(stage_c, start=0.5, shift=2.0, start_noise="reference")).abs().max() > 1e-3
    without_shift = [sampled(stage_c, start=0.5, shift=1.0, start_noise=name) for name in ("matched", "reference")]
    assert torch.equal(*without_shift)


def test_start_noise_without_effect_is_refused(handles, sampled):
    with pytest.raises(ValueError, match="start_noise is 'reference' and has no effect when start is 1"):
        sampled(handles["stage_c"], start_noise="reference")
    with pytest.raises(ValueError, match="no start_noise 'none': choose matched or reference"):
        sampled(handles["stage_c"], start=0.5, start_noise="none")


@pytest.mark.parametrize("node", ["CascadeSampleStageC", "CascadeSampleStageB"])
def test_both_nodes_offer_it(host, node):
    result, inputs = (sample_c if node == "CascadeSampleStageC" else sample_b)(host)
    if node == "CascadeSampleStageB":
        inputs["start_latent"] = {"samples": result["result"][0]["samples"]}
    settings = inputs | {"start": 0.5, "shift": 2.0}
    matched, reference = (
        run(node, **settings, start_noise=name)["result"][0]["samples"] for name in ("matched", "reference")
    )
    assert torch.equal(matched, run(node, **settings)["result"][0]["samples"])
    assert (matched - reference).abs().max() > 1e-3


# Held parts ----------------------------------------------------------------------------------------------------


def chain(handles, prompts, latent, first, mask, steps=2, **settings):
    """Stages C and B with one mask for both; the Stage C latent and the Stage B latent."""
    chosen = SamplingSettings(steps=steps, **settings)
    held, first = replace(latent, mask=mask), replace(first, mask=mask)
    small = stages.sample_stage_c(handles["stage_c"], *prompts, held, seed=1, settings=chosen)
    large = stages.sample_stage_b(handles["stage_b"], small, *prompts, seed=1, settings=chosen, start_latent=first)
    return small.samples, large.samples


@pytest.fixture(scope="module")
def pair(handles):
    """Latents to hold, as if encoded from a picture of 100 x 60."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 2, 3), (2, 4, 16, 26))
    return [Latent(torch.randn(shape, generator=generator), 100, 60) for shape in shapes]


def test_a_mask_of_zeros_gives_back_the_latents_to_the_bit(handles, prompts, pair):
    small, large = chain(handles, prompts, *pair, torch.zeros(1, 1, 60, 100))
    assert torch.equal(small, pair[0].samples) and torch.equal(large, pair[1].samples)


def test_a_mask_of_ones_is_text_to_image_to_the_bit(handles, prompts, pair):
    small, large = chain(handles, prompts, *pair, torch.ones(1, 1, 60, 100))
    chosen = SamplingSettings(steps=2)
    empty = stages.empty_latent(handles["stage_c"], 100, 60, 2)
    alone = stages.sample_stage_c(handles["stage_c"], *prompts, empty, seed=1, settings=chosen)
    assert torch.equal(small, alone.samples)
    detail = stages.sample_stage_b(handles["stage_b"], alone, *prompts, seed=1, settings=chosen)
    assert torch.equal(large, detail.samples)


def test_a_mask_of_the_picture_lands_on_the_cells_that_it_covers(handles, prompts, pair):
    mask = torch.zeros(1, 1, 60, 100)
    mask[..., 67:] = 1  # the last of three columns of Stage C
    small, large = chain(handles, prompts, *pair, mask)
    assert torch.equal(small[..., :2], pair[0].samples[..., :2])
    assert (small[..., 2] - pair[0].samples[..., 2]).abs().min() > 0
    assert torch.equal(large[..., :17], pair[1].samples[..., :17])
    assert (large[..., 18:] - pair[1].samples[..., 18:]).abs().min() > 0


def test_a_mask_and_a_start_below_one_go_together(handles, prompts, pair):
    mask = torch.zeros(1, 1, 60, 100)
    mask[..., 67:] = 1
    for name in ("matched", "reference"):
        small, large = chain(handles, prompts, *pair, mask, start=0.6, shift=2.0, start_noise=name)
        assert torch.equal(small[..., :2], pair[0].samples[..., :2])
        assert torch.equal(large[..., :17], pair[1].samples[..., :17])
        other = replace(pair[0], samples=-pair[0].samples)
        assert not torch.equal(small[..., 2], chain(handles, prompts, other, pair[1], mask, start=0.6)[0][..., 2])


# The tiny family -----------------------------------------------------------------------------------------------


def painted(tiny, prompts, image, mask, control=False, hold=True):
    """Inpainting as the example workflow does it; a picture ``[1, H, W, 3]``."""
    latent = encoding.encode_stage_c(tiny["latent_encoder"], image, mask=mask)
    stage_c = tiny["stage_c"]
    if control:
        network = load_stage(bundled("controlnet_inpainting").path, "controlnet")
        stage_c = apply_control(stage_c, network, inpainting_input(image, mask), 1.0, 1.0, 0.0)
    settings = SamplingSettings(steps=10, sampler="dpmpp_2m")
    small = stages.sample_stage_c(stage_c, *prompts, latent, seed=0, settings=settings)
    start = encoding.encode_stage_a(tiny["stage_a"], image, mask=mask) if hold else None
    large = stages.sample_stage_b(tiny["stage_b"], small, *prompts, seed=0, settings=settings, start_latent=start)
    return stages.decode_stage_a(tiny["stage_a"], large)


def shown(picture):
    reading = read_picture(picture[0].numpy())
    return reading.background, [(each.colour, each.shape) for each in reading.objects]


@pytest.mark.parametrize("control", [False, True], ids=["mask alone", "with ControlNet"])
def test_inpainting_follows_the_prompt_inside_and_keeps_the_picture_outside(tiny, tiny_prompt, control):
    image, hole = run("CascadeExampleImage", picture="hole")["result"]
    mask = masks.feathered(hole, 0, FEATHER)
    prompts = tiny_prompt("a large red circle in the centre on a purple background")
    made = painted(tiny, prompts, image, mask, control)
    assert shown(image) == ("purple", [("white", "square")])
    assert shown(made) == ("purple", [("red", "circle")])
    outside = mask[0] == 0
    kept = stages.decode_stage_a(tiny["stage_a"], encoding.encode_stage_a(tiny["stage_a"], image))
    as_good = psnr(kept[:, outside], image[:, outside]) - 1.5
    assert psnr(made[:, outside], image[:, outside]) > as_good
    if not control:
        assert psnr(painted(tiny, prompts, image, mask, hold=False)[:, outside], image[:, outside]) < as_good - 5


def test_image_to_image_keeps_the_place_and_takes_the_colours_of_the_prompt(tiny, tiny_prompt):
    prompts = tiny_prompt("a yellow circle on a green background")
    latent = encoding.encode_stage_c(tiny["latent_encoder"], example("circle"))

    def finished(**settings):
        small = stages.sample_stage_c(
            tiny["stage_c"], *prompts, latent, seed=0, settings=SamplingSettings(steps=10, **settings)
        )
        large = stages.sample_stage_b(tiny["stage_b"], small, *prompts, seed=0, settings=SamplingSettings(steps=6))
        reading = read_picture(stages.decode_stage_a(tiny["stage_a"], large)[0].numpy())
        (found,) = reading.objects
        return reading.background, found.colour, found.shape, found.position, found.size

    assert finished(start=0.8) == ("green", "yellow", "circle", "right", "large")
    assert finished(start=0.05)[:3] == ("blue", "cyan", "circle")
    assert finished()[3:] != ("right", "large")


def test_reconstruction_and_refining_bring_back_the_picture(tiny, tiny_prompt):
    prompts, image = tiny_prompt(""), example("circle")
    small = encoding.encode_stage_c(tiny["latent_encoder"], image)
    start = encoding.encode_stage_a(tiny["stage_a"], image)

    def drawn(**settings):
        first = start if "start" in settings else None
        large = stages.sample_stage_b(
            tiny["stage_b"], small, *prompts, seed=0, settings=SamplingSettings(steps=6, **settings), start_latent=first
        )
        return stages.decode_stage_a(tiny["stage_a"], large)

    again = drawn()
    assert shown(again) == ("blue", [("cyan", "circle")]) and psnr(again, image) > 20
    strengths = [psnr(drawn(start=start), image) for start in (0.2, 0.6)]
    assert strengths[0] > strengths[1] > psnr(again, image) and strengths[0] > psnr(again, image) + 3
