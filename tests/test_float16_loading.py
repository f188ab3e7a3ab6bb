"""float16 as a loader's choice: which weights are rescaled, what is refused, and where rescaled ones may not go."""

import copy

import pytest
import torch

from stable_cascade_nodes.cascade_ops import float16, stages
from stable_cascade_nodes.cascade_ops.checkpoints import save
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.streaming import same_structure
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.nodes.comfyui_bridge import to_model
from stable_cascade_nodes.nodes.comfyui_layers import rebuilt


@pytest.fixture
def as_large(monkeypatch):
    """Every Stage C is as large as the published one that overflows."""
    monkeypatch.setattr(float16, "_OVERFLOWING_PARAMETERS", 0)


@pytest.fixture
def rescaled(as_large, small_family):
    return load_stage(small_family.paths["stage_c"], "stage_c", dtype="float16")


def test_float16_of_a_large_stage_c_is_rescaled(rescaled, handles):
    expected = float16.rescaled(handles["stage_c"].module, dtype=torch.float16)
    for (name, ours), theirs in zip(rescaled.module.named_parameters(), expected.parameters(), strict=True):
        assert ours.dtype == torch.float16 and torch.equal(ours, theirs), name
    assert float16.scale_of(rescaled.module) == float16.SCALE
    assert [block.stream_scale for block in rescaled.module.up_blocks[-1]] == [64.0] * 3
    assert float16.described(rescaled.module) == "last level divided by 64 to stay in float16's range"


def test_other_choices_are_not(as_large, small_family):
    for stage, dtype in (
        ("stage_c", "float16 (fixed weights)"),
        ("stage_c", "bfloat16"),
        ("stage_b", "float16"),
        ("text_encoder", "float16"),
    ):
        handle = load_stage(small_family.paths[stage], stage, dtype=dtype)
        plain = load_stage(small_family.paths[stage], stage, dtype="float32")
        assert float16.scale_of(handle.network) == 1 and float16.described(handle.network) == ""
        for ours, theirs in zip(handle.network.parameters(), plain.network.parameters(), strict=True):
            assert torch.equal(ours, theirs.to(ours.dtype))


def test_a_stage_c_that_does_not_overflow_is_not(small_family):
    assert float16.scale_of(load_stage(small_family.paths["stage_c"], "stage_c", dtype="float16").module) == 1


def test_the_rescaling_starts_from_what_the_file_holds(as_large, small_family, handles, tmp_path):
    """A weight of bfloat16 below float16's normal numbers would be rounded if it were cast first."""
    module, config = copy.deepcopy(handles["stage_c"].module), handles["stage_c"].info.config
    name = next(iter(float16.divided(module)))
    with torch.no_grad():
        module.get_parameter(name).fill_(70000.0)
    path = save(module, tmp_path / "c.safetensors", stage="stage_c", config=config, dtype=torch.bfloat16)
    loaded = load_stage(path, "stage_c", dtype="float16").module.get_parameter(name)
    stored = torch.tensor(70000.0).bfloat16().float()
    assert torch.equal(loaded.float(), (stored / 64).half().float().expand_as(loaded))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 70000.0])
@pytest.mark.parametrize(("stage", "dtype"), [("stage_c", "float16 (fixed weights)"), ("stage_b", "float16")])
def test_weights_that_are_not_finite_in_float16_are_refused(handles, tmp_path, stage, dtype, value):
    module = copy.deepcopy(handles[stage].module)
    with torch.no_grad():
        module.clf[1].weight[-1, -1] = value
    path = save(module, tmp_path / "spoilt.safetensors", stage=stage, config=handles[stage].info.config)
    found = "values beyond float16" if value == 70000.0 else "NaN or infinite values"
    with pytest.raises(ValueError, match=rf"spoilt.safetensors holds {found} in 'clf.1.weight', expected finite"):
        load_stage(path, stage, dtype=dtype)
    load_stage(path, stage, dtype="float32")  # its own business


def test_the_loader_says_so(as_large, small_family):
    from stable_cascade_nodes.nodes.loaders import _said

    handle = load_stage(small_family.paths["stage_c"], "stage_c", dtype="float16", name="c.safetensors")
    [line] = _said([handle])["text"]
    assert line.endswith("(c.safetensors), float16, last level divided by 64 to stay in float16's range")


def test_it_samples_as_float32_does(rescaled, handles):
    settings = stages.SamplingSettings(steps=3)
    text = stages.encode_text(handles["text_encoder"], "a red circle")
    latents = [
        stages.sample_stage_c(handle, text, text, stages.empty_latent(handle, 128, 96), seed=1, settings=settings)
        for handle in (rescaled, handles["stage_c"])
    ]
    half, exact = (latent.samples for latent in latents)
    assert 0 < (half - exact).abs().max() < 0.02 * exact.abs().max()


def test_the_scale_goes_where_the_weights_go(rescaled):
    def marks(module):
        return [float16.scale_of(module), *(block.stream_scale for block in module.up_blocks[-1])]

    assert set(marks(rescaled.to("meta").module)) == {64.0}
    for made in (rebuilt(rescaled.module, lambda name, layer: None), same_structure(rescaled.module)):
        assert made is not rescaled.module and set(marks(made)) == {64.0}


def test_rescaled_weights_are_not_written(rescaled, tmp_path):
    with pytest.raises(ValueError, match="rescaled for float16"):
        save(rescaled.module, tmp_path / "x.safetensors", stage="stage_c", config=rescaled.info.config)
    assert not list(tmp_path.iterdir())


def test_rescaled_weights_are_not_trained_with(rescaled, handles):
    with pytest.raises(ValueError, match="training needs the weights as they were published"):
        Parts(given={"stage_c": rescaled})
    Parts(given={"stage_c": handles["stage_c"]})


def test_rescaled_weights_are_not_given_to_comfyuis_network(rescaled):
    with pytest.raises(ValueError, match="ComfyUI's own network needs the weights as they were published"):
        to_model(rescaled)
