"""ControlNets on a Stage C handle: nothing at strength 0, exactly the model's residuals at 1, and what does not fit."""

from dataclasses import replace

import pytest
import torch
from attachment_kit import differ, near, noise, saved_controlnet
from conftest import DEFAULTS_C

from stable_cascade_nodes.cascade_ops import stages
from stable_cascade_nodes.cascade_ops.attached import fitted_control, stepped_controls
from stable_cascade_nodes.cascade_ops.attachments import AppliedControl, apply_control, residual_widths
from stable_cascade_nodes.cascade_ops.control_inputs import ControlInput, canny_input, inpainting_input
from stable_cascade_nodes.cascade_ops.diffusion import Guidance, draw_noise, image_generators, sample
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.models.layers import ResBlock

# 128 x 96 pixels: a latent of 3 x 3 cells, which a control of 96 x 96 pixels covers.
SIZE = (128, 96)


def canny_of(seed=0, batch=1):
    return ControlInput("canny", noise(batch, 1, 96, 96, seed=seed).round(), size=(96, 128))


@pytest.fixture(scope="module")
def stage_c(handles):
    return handles["stage_c"]


def test_strength_0_equals_none_to_the_last_bit(stage_c, controlnets, sampled):
    plain = sampled(stage_c)
    applied = apply_control(stage_c, controlnets["canny"], canny_of())
    differ(sampled(applied), plain)
    assert torch.equal(sampled(apply_control(stage_c, controlnets["canny"], canny_of(), strength=0.0)), plain)


def test_strength_0_computes_nothing(stage_c, controlnets, sampled, monkeypatch):
    applied = apply_control(stage_c, controlnets["canny"], canny_of(), strength=0.0)
    monkeypatch.setattr(controlnets["canny"].module, "forward", lambda control: pytest.fail("it was run"))
    assert applied.attached == ()
    sampled(applied)


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.25])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equals_the_models_own_forward_with_residuals(stage_c, controlnets, prompts, sampled, strength, guidance):
    """An independent denoiser that calls `StageC.forward` for each half, the control in both."""
    model, control = stage_c.module, canny_of()
    with torch.no_grad():
        residuals = [None if r is None else r * strength for r in controlnets["canny"].module(control.samples)]

    class Forward:
        def prepare(self, noise_cond, shape, guided):
            def half(x, index, text):
                level = noise_cond[index].expand(len(x))
                image = torch.zeros(1, 1, model.clip_img_mapper.in_features)
                return model(x, level, text.hidden, text.pooled[:, None], image, control=residuals)

            def predict(x, index, guided):
                return half(x, index, prompts[0]), half(x, index, prompts[1]) if guided else None

            return predict

    generators = image_generators(3, 1)
    start = draw_noise(generators, (1, 16, 3, 3), torch.device("cpu"))
    expected = sample(
        Forward(), start, steps=4, shift=DEFAULTS_C["shift"], guidance=Guidance(guidance), generators=generators
    )
    applied = apply_control(stage_c, controlnets["canny"], control, strength)
    near(sampled(applied, guidance=guidance), expected.latent)
    differ(sampled(stage_c, guidance=guidance), expected.latent)


def test_residuals_are_computed_once_per_run(stage_c, controlnets, sampled, monkeypatch):
    calls, forward = [], type(controlnets["canny"].module).forward
    module = controlnets["canny"].module
    monkeypatch.setattr(module, "forward", lambda control: calls.append(len(control)) or forward(module, control))
    sampled(apply_control(stage_c, controlnets["canny"], canny_of(batch=2)), batch=2)
    assert calls == [1, 1]


def test_start_and_end_are_times_of_the_schedule(stage_c, controlnets, sampled):
    """Four steps begin at 1, 0.75, 0.5 and 0.25; the bounds count."""
    applied = AppliedControl(controlnets["canny"], canny_of().samples, 1.0, 0.75, 0.5)
    assert applied.steps([1.0, 0.75, 0.5, 0.25]) == (False, True, True, False)
    assert applied.steps(torch.linspace(1, 0, 11)[:-1].tolist()) == (*[False] * 3, *[True] * 3, *[False] * 4)

    def run(start, end):
        return sampled(apply_control(stage_c, controlnets["canny"], canny_of(), 1.0, start, end))

    plain, whole = sampled(stage_c), run(1.0, 0.0)
    assert torch.equal(run(1.0, 0.25), whole)
    assert torch.equal(run(0.2, 0.0), plain)
    assert torch.equal(run(0.9, 0.8), plain)
    for start, end in ((1.0, 0.75), (0.75, 0.5), (0.25, 0.0)):
        differ(run(start, end), plain)
        differ(run(start, end), whole)


def test_a_window_is_of_the_schedule_and_not_of_the_run(stage_c, controlnets, sampled):
    """Image to image from 0.5 on has no steps above it."""
    early = apply_control(stage_c, controlnets["canny"], canny_of(), 1.0, 1.0, 0.6)
    assert torch.equal(sampled(early, start=0.5), sampled(stage_c, start=0.5))
    differ(sampled(early), sampled(stage_c))


def test_several_stack_in_any_order(stage_c, controlnets, sampled):
    hole = ControlInput("inpainting", noise(1, 4, 96, 96, seed=2).round(), size=(96, 128))
    large = ControlInput("super_resolution", noise(1, 16, 5, 5, seed=3), size=(96, 128))
    parts = [
        (controlnets["canny"], canny_of(), 1.0, 1.0, 0.5),
        (controlnets["inpainting"], hole, 0.5, 0.75, 0.0),
        (controlnets["super_resolution"], large, 0.7),
    ]

    def stacked(order):
        handle = stage_c
        for number in order:
            handle = apply_control(handle, *parts[number])
        return sampled(handle)

    whole = stacked([0, 1, 2])
    near(stacked([2, 0, 1]), whole)
    near(stacked([1, 2, 0]), whole)
    for left_out in ([0, 1], [0, 2], [1, 2]):
        differ(stacked(left_out), whole)


def test_the_same_control_twice_at_half_strength_is_one_at_full(stage_c, controlnets, sampled):
    half = apply_control(stage_c, controlnets["canny"], canny_of(), 0.5)
    near(
        sampled(apply_control(half, controlnets["canny"], canny_of(), 0.5)),
        sampled(apply_control(stage_c, controlnets["canny"], canny_of())),
    )


def test_handles_that_went_in_stay_as_they_were(stage_c, controlnets, sampled):
    before = {name: tensor.clone() for name, tensor in stage_c.module.state_dict().items()}
    plain = sampled(stage_c)
    first = apply_control(stage_c, controlnets["canny"], canny_of())
    once = sampled(first)
    second = apply_control(first, controlnets["canny"], canny_of(seed=5))
    differ(sampled(second), once)
    assert torch.equal(sampled(first), once) and torch.equal(sampled(stage_c), plain)
    assert stage_c.controls == () and len(first.controls) == 1 and len(second.controls) == 2
    assert second.module is stage_c.module
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage_c.module.state_dict().items())


# Batches and sizes ---------------------------------------------------------------------------------------------


def test_one_control_serves_a_batch_and_each_picture_its_own(stage_c, controlnets, sampled):
    controls = canny_of(batch=2)
    both = sampled(apply_control(stage_c, controlnets["canny"], controls), batch=2)
    for index, seed in enumerate((3, 4)):
        own = ControlInput("canny", controls.samples[index : index + 1], controls.size)
        alone = sampled(apply_control(stage_c, controlnets["canny"], own), seed=seed)
        near(both[index : index + 1], alone)
        others = ControlInput("canny", controls.samples[1 - index : 2 - index], controls.size)
        differ(alone, sampled(apply_control(stage_c, controlnets["canny"], others), seed=seed))
    shared = sampled(apply_control(stage_c, controlnets["canny"], canny_of()), batch=2)
    near(shared[1:], sampled(apply_control(stage_c, controlnets["canny"], canny_of()), seed=4))


def test_another_batch_is_refused_with_both_sizes(stage_c, controlnets, sampled):
    applied = apply_control(stage_c, controlnets["canny"], canny_of(batch=2))
    with pytest.raises(ValueError, match=r"ControlNet custom canny .* given 2 controls and 3 pictures are made"):
        sampled(applied, batch=3)


@pytest.mark.parametrize(
    ("picture", "made", "fits"),
    [
        ((1000, 600), (1000, 600), True),
        ((2000, 1200), (1000, 600), True),
        ((100, 60), (1000, 600), True),
        ((1024, 1024), (128, 128), True),
        ((1024, 768), (256, 256), False),
        ((768, 1024), (1024, 768), False),
    ],
)
def test_a_control_must_have_the_shape_of_the_picture_to_make(stage_c, controlnets, picture, made, fits):
    control = canny_input(noise(1, picture[1], picture[0], 3))
    applied = apply_control(stage_c, controlnets["canny"], control).controls[0]
    latent = stages.empty_latent(stage_c, *made).samples
    if fits:
        fitted = fitted_control(applied, latent, made[::-1])
        assert fitted.shape == (1, 1, 32 * latent.shape[2], 32 * latent.shape[3])
    else:
        words = f"is {picture[0]} x {picture[1]} and the picture to make is {made[0]} x {made[1]}"
        with pytest.raises(ValueError, match=words):
            fitted_control(applied, latent, made[::-1])


def test_a_control_of_the_pictures_own_size_is_not_resized(stage_c, controlnets):
    control = canny_input(noise(1, 600, 1000, 3))
    applied = apply_control(stage_c, controlnets["canny"], control).controls[0]
    assert fitted_control(applied, stages.empty_latent(stage_c, 1000, 600).samples, (600, 1000)) is control.samples


def test_holes_stay_sharp_when_resized(stage_c, controlnets):
    mask = torch.zeros(1, 512, 512)
    mask[:, 100:300, 200:400] = 1
    control = inpainting_input(noise(1, 512, 512, 3), mask)
    applied = apply_control(stage_c, controlnets["inpainting"], control).controls[0]
    fitted = fitted_control(applied, stages.empty_latent(stage_c, 1024, 1024).samples, (1024, 1024))
    hole = fitted[:, 3]
    assert set(hole.unique().tolist()) == {0.0, 1.0}
    assert abs(hole.mean().item() - mask.mean().item()) < 0.02
    assert (fitted[:, :3].permute(0, 2, 3, 1)[hole == 1] == 1).all()


# What does not fit ---------------------------------------------------------------------------------------------


def test_a_controlnet_for_another_stage_c_is_refused(stage_c, tmp_path):
    for changes, words in (
        ({"c_proj": 32}, r"up to number 3 with a width of 32 and Stage C custom .* has 4 of width 64"),
        ({"proj_blocks": [0, 4]}, r"up to number 4 with a width of 64 and Stage C custom .* has 4 of width 64"),
    ):
        network = load_stage(saved_controlnet(tmp_path / "other.safetensors", "canny", **changes), "controlnet")
        with pytest.raises(ValueError, match=words + r".*\(it was trained with custom\)"):
            apply_control(stage_c, network, canny_of())


def test_widths_count_repeats_in_the_order_in_which_they_run(stage_c):
    from stable_cascade_nodes.cascade_ops.models import StageC

    config = stage_c.info.config | {"c_hidden": [64, 128], "nhead": [1, 2], "block_repeat": [[1, 2], [1, 1]]}
    model = StageC(**config | {"blocks": [[1, 2], [1, 1]]}).eval()
    seen = []
    for block in (module for module in model.modules() if isinstance(module, ResBlock)):
        block.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[-1]))
    with torch.no_grad():
        model(torch.zeros(1, 16, 2, 2), torch.ones(1), torch.zeros(1, 1, config["c_clip_text"]))
    assert residual_widths(model) == seen == [64, 128, 128, 128, 128, 128, 64]


def test_a_control_of_another_kind_is_refused(stage_c, controlnets):
    hole = ControlInput("inpainting", noise(1, 4, 96, 96))
    with pytest.raises(ValueError, match=r"control is for inpainting and outpainting with 4 channels.*reads edges"):
        apply_control(stage_c, controlnets["canny"], hole)
    with pytest.raises(ValueError, match=r"with 3 channels, and .* expected 1 channels"):
        apply_control(stage_c, controlnets["canny"], ControlInput("canny", noise(1, 3, 96, 96)))
    with pytest.raises(ValueError, match="kind 'depth' with samples of shape"):
        ControlInput("depth", noise(1, 1, 96, 96))


def test_a_control_of_the_other_family_is_refused(stage_c, controlnets):
    network = controlnets["super_resolution"]
    published = replace(network, info=replace(network.info, rank=0))
    with pytest.raises(ValueError, match="belong to different families"):
        apply_control(stage_c, published, ControlInput("super_resolution", noise(1, 16, 6, 6), family="tiny"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": 0.0, "end": 1.0}, "acts from 0 to 1, expected 1 >= start >= end >= 0"),
        ({"start": 1.5}, "acts from 1.5 to 0"),
        ({"strength": float("nan")}, "applied with nan"),
    ],
)
def test_settings_without_meaning_are_refused(stage_c, controlnets, settings, words):
    with pytest.raises(ValueError, match=words):
        apply_control(stage_c, controlnets["canny"], canny_of(), **settings)


def test_stages_are_told_apart(stage_c, controlnets, handles):
    with pytest.raises(ValueError, match="was given where a Stage C is read"):
        apply_control(handles["stage_b"], controlnets["canny"], canny_of())
    with pytest.raises(ValueError, match="was given where a ControlNet is read"):
        apply_control(stage_c, handles["previewer"], canny_of())


def test_each_network_is_placed_once_and_where_it_goes(stage_c, controlnets):
    canny, hole = controlnets["canny"], ControlInput("inpainting", noise(1, 4, 96, 96), size=(96, 128))
    handle = apply_control(apply_control(stage_c, canny, canny_of()), canny, canny_of(seed=1), 0.5)
    handle = apply_control(handle, controlnets["inpainting"], hole, 0.0)
    assert handle.attached == (canny,)
    moved = handle.with_attached([replace(canny, name="elsewhere")])
    assert [each.network.name for each in moved.controls] == ["elsewhere", "elsewhere", "inpainting.safetensors"]
    assert [each.strength for each in moved.controls] == [1.0, 0.5, 0.0]
    assert handle.controls[0].network is canny


def test_residuals_come_in_the_dtype_of_stage_c(controlnets, small_family):
    stage_c = load_stage(small_family.paths["stage_c"], "stage_c", dtype="bfloat16")
    applied = apply_control(stage_c, controlnets["canny"], canny_of())
    latent = stages.empty_latent(stage_c, *SIZE).samples
    (found,) = stepped_controls(applied, latent, SIZE[::-1], [1.0])
    assert {r.dtype for r in found.residuals if r is not None} == {torch.bfloat16}
