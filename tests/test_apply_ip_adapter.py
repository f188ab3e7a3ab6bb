"""IP-Adapters on a Stage C handle: nothing at weight 0, the model's own decoupled attention, and what does not fit."""

import pytest
import torch
from attachment_kit import IMAGE_WIDTH, differ, near, noise, saved_adapter
from conftest import DEFAULTS_C

from stable_cascade_nodes.cascade_ops import stages
from stable_cascade_nodes.cascade_ops.attachments import AppliedIPAdapter, apply_control, apply_ip_adapter
from stable_cascade_nodes.cascade_ops.control_inputs import ControlInput
from stable_cascade_nodes.cascade_ops.diffusion import Guidance, draw_noise, image_generators, sample
from stable_cascade_nodes.cascade_ops.handles import load_stage


def pictures(seed=0, batch=1, count=1):
    return noise(batch, count, IMAGE_WIDTH, seed=seed)


@pytest.fixture(scope="module")
def stage_c(handles):
    return handles["stage_c"]


def test_weight_0_equals_none_to_the_last_bit(stage_c, adapter, sampled):
    plain = sampled(stage_c)
    differ(sampled(apply_ip_adapter(stage_c, adapter, pictures())), plain)
    off = apply_ip_adapter(stage_c, adapter, pictures(), weight=0.0)
    assert torch.equal(sampled(off), plain) and off.attached == ()


@pytest.mark.parametrize("weight", [1.0, 0.6])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("negative_length", [77, 40])
def test_equals_the_models_own_forward(stage_c, adapter, prompts, sampled, weight, guidance, negative_length):
    """An independent denoiser that calls `StageC.forward` for each half: the picture, and an embedding of zeros."""
    model, embeddings = stage_c.module, pictures(count=2)
    prompts = [prompts[0], prompts[1]._replace(hidden=prompts[1].hidden[:, :negative_length])]

    class Forward:
        def prepare(self, noise_cond, shape, guided):
            def half(x, index, text, seen):
                image = torch.zeros(1, 1, model.clip_img_mapper.in_features)
                decoupled = [adapter.module.attention(seen, weight)]
                level = noise_cond[index].expand(len(x))
                return model(x, level, text.hidden, text.pooled[:, None], image, decoupled=decoupled)

            def predict(x, index, guided):
                cond = half(x, index, prompts[0], embeddings)
                return cond, half(x, index, prompts[1], torch.zeros_like(embeddings)) if guided else None

            return predict

    generators = image_generators(3, 1)
    start = draw_noise(generators, (1, 16, 3, 3), torch.device("cpu"))
    expected = sample(
        Forward(), start, steps=4, shift=DEFAULTS_C["shift"], guidance=Guidance(guidance), generators=generators
    )
    applied = apply_ip_adapter(stage_c, adapter, embeddings, weight)
    near(sampled(applied, prompts=prompts, guidance=guidance), expected.latent)
    differ(sampled(stage_c, prompts=prompts, guidance=guidance), expected.latent)


def test_start_and_end_are_times_of_the_schedule(stage_c, adapter, sampled):
    def run(start, end):
        return sampled(apply_ip_adapter(stage_c, adapter, pictures(), 1.0, start, end))

    plain, whole = sampled(stage_c), run(1.0, 0.0)
    assert torch.equal(run(1.0, 0.25), whole)
    assert torch.equal(run(0.9, 0.8), plain)
    for start, end in ((1.0, 0.75), (0.75, 0.5), (0.25, 0.0)):
        differ(run(start, end), plain)
        differ(run(start, end), whole)


def test_two_adapters_in_parts_that_do_not_meet_are_each_alone_there(stage_c, adapter, prompts):
    """The one that acts in a step is what the model is run with, whichever way round they were applied."""
    first = (adapter, pictures(1), 1.0, 1.0, 0.75)
    second = (adapter, pictures(2), 0.5, 0.5, 0.25)
    seen = []
    step = stage_c.module.step

    def recording(x, prepared, index, control=None):
        seen.append([attention.weights[0] for attention in prepared.decoupled])
        return step(x, prepared, index, control)

    handle = apply_ip_adapter(apply_ip_adapter(stage_c, *second), *first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_c.module, "step", recording)
        latent = stages.empty_latent(handle, 128, 96)
        settings = stages.SamplingSettings(steps=8)
        stages.sample_stage_c(handle, *prompts, latent, seed=1, settings=settings)
    assert seen == [[1.0], [1.0], [1.0], [], [0.5], [0.5], [0.5], []]


def test_several_stack_in_any_order_and_beside_a_controlnet(stage_c, adapter, controlnets, sampled):
    control = ControlInput("canny", noise(1, 1, 96, 96).round(), size=(96, 128))

    def with_control(handle):
        return apply_control(handle, controlnets["canny"], control, 0.7)

    def with_picture(handle, seed, weight):
        return apply_ip_adapter(handle, adapter, pictures(seed), weight)

    whole = sampled(with_control(with_picture(with_picture(stage_c, 1, 0.5), 2, 0.8)))
    near(sampled(with_picture(with_control(with_picture(stage_c, 2, 0.8)), 1, 0.5)), whole)
    for part in (with_control(with_picture(stage_c, 1, 0.5)), with_picture(with_picture(stage_c, 1, 0.5), 2, 0.8)):
        differ(sampled(part), whole)


def test_handles_that_went_in_stay_as_they_were(stage_c, adapter, sampled):
    plain = sampled(stage_c)
    first = apply_ip_adapter(stage_c, adapter, pictures())
    once = sampled(first)
    differ(sampled(apply_ip_adapter(first, adapter, pictures(3))), once)
    assert torch.equal(sampled(first), once) and torch.equal(sampled(stage_c), plain)
    assert stage_c.ip_adapters == () and first.module is stage_c.module


def test_one_picture_serves_a_batch_and_each_its_own(stage_c, adapter, sampled):
    embeddings = pictures(batch=2)
    both = sampled(apply_ip_adapter(stage_c, adapter, embeddings), batch=2)
    for index, seed in enumerate((3, 4)):
        alone = sampled(apply_ip_adapter(stage_c, adapter, embeddings[index : index + 1]), seed=seed)
        near(both[index : index + 1], alone)
    shared = sampled(apply_ip_adapter(stage_c, adapter, embeddings[:1]), batch=2)
    near(shared[:1], both[:1])
    differ(shared[1:], both[1:])
    with pytest.raises(ValueError, match=r"IP-Adapter custom .* given 2 pictures and 3 pictures are made"):
        sampled(apply_ip_adapter(stage_c, adapter, embeddings), batch=3)


@pytest.mark.parametrize(
    "changes", [{"c_hidden_per_block": [64] * 3}, {"c_hidden_per_block": [32] * 4}], ids=["fewer blocks", "narrower"]
)
def test_an_adapter_for_another_stage_c_is_refused(stage_c, tmp_path, changes):
    other = load_stage(saved_adapter(tmp_path / "other.safetensors", **changes), "ip_adapter")
    with pytest.raises(ValueError, match=r"IP-Adapter custom \(other.safetensors\) does not fit Stage C custom"):
        apply_ip_adapter(stage_c, other, pictures())


def test_an_embedding_of_another_encoder_is_refused(stage_c, adapter):
    with pytest.raises(
        ValueError, match=r"encoded to the shape \[1, 1, 768\] and IP-Adapter .* reads \[n, pictures, 24"
    ):
        apply_ip_adapter(stage_c, adapter, torch.zeros(1, 1, 768))


def test_stages_are_told_apart(stage_c, adapter, handles):
    with pytest.raises(ValueError, match="was given where a Stage C is read"):
        apply_ip_adapter(handles["stage_b"], adapter, pictures())
    with pytest.raises(ValueError, match="was given where an IP-Adapter is read"):
        apply_ip_adapter(stage_c, handles["previewer"], pictures())


def test_settings_without_meaning_are_refused(adapter):
    with pytest.raises(ValueError, match="acts from 0 to 1"):
        AppliedIPAdapter(adapter, pictures(), 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="applied with inf"):
        AppliedIPAdapter(adapter, pictures(), float("inf"))


def test_it_reads_in_the_dtype_of_stage_c(adapter, small_family, sampled):
    stage_c = load_stage(small_family.paths["stage_c"], "stage_c", dtype="bfloat16")
    differ(sampled(apply_ip_adapter(stage_c, adapter, pictures())), sampled(stage_c))
