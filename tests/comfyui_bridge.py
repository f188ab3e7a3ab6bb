"""Checks inside ComfyUI: its own models as handles, and handles as its own models."""

import gc
import importlib
import weakref
from types import SimpleNamespace

import torch
from comfyui_inside import check, differ, near, refused, sampled_c
from comfyui_wires import sampled_b

CLASSES = {"stage_c": "Stable_Cascade_C", "stage_b": "Stable_Cascade_B"}


def loaded_by_core(inside, handle):
    """A handle's file as ComfyUI's own loader reads it; only the sizes, which it knows of two releases, are told."""
    supported, patchers = importlib.import_module("comfy.supported_models"), inside.patchers
    description = getattr(supported, CLASSES[handle.stage])(
        {"stable_cascade_stage": handle.stage[-1], **handle.info.config}
    )
    description.set_inference_dtype(torch.float32, None)
    description.sampling_settings["shift"] = handle.info.defaults["shift"]
    weights = {
        name: weight.float() for name, weight in inside.comfy_utils.load_torch_file(str(handle.info.path)).items()
    }
    model = description.get_model(weights, "")
    missing, unexpected = model.diffusion_model.load_state_dict(
        description.process_unet_state_dict(weights), strict=False
    )
    assert not missing and not unexpected, (missing, unexpected)
    return patchers.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def ksampled(inside, model, positive, negative, latent, sampler="euler"):
    return inside.run(
        "KSampler",
        model=model,
        seed=5,
        steps=4,
        cfg=2.0,
        sampler_name=sampler,
        scheduler="simple",
        positive=positive,
        negative=negative,
        latent_image={"samples": latent},
        denoise=1.0,
    )[0]["samples"]


@check
def a_handle_as_model_samples_as_cores_own_loader(inside):
    positive, negative = inside.conditions()
    stage_c, stage_b = inside.load("StageC"), inside.load("StageB")
    before = [weight.clone() for handle in (stage_c, stage_b) for weight in handle.network.parameters()]
    model_c = inside.run("CascadeToModel", stage=stage_c)[0]
    latent = torch.zeros(1, 16, 6, 6)
    core_c = loaded_by_core(inside, stage_c)
    # ComfyUI fills in 768 zeros for a missing picture, the tiny family's are 96 wide.
    picture = [[text, more | {"unclip_conditioning": [no_picture()]}] for text, more in positive]
    nothing = [[text, more | {"unclip_conditioning": [no_picture()]}] for text, more in negative]
    theirs = ksampled(inside, core_c, picture, nothing, latent)
    near(ksampled(inside, model_c, positive, negative, latent), theirs)
    assert theirs.std() > 0.1
    model_b = inside.run("CascadeToModel", stage=stage_b)[0]
    core_b = loaded_by_core(inside, stage_b)
    with_prior = inside.run("StableCascade_StageB_Conditioning", conditioning=positive, stage_c={"samples": theirs})[0]
    zeros = torch.zeros(1, 4, 64, 64)
    detail = ksampled(inside, core_b, with_prior, negative, zeros)
    near(ksampled(inside, model_b, with_prior, negative, zeros), detail)
    # One set of weights with one book-keeping: both sides' patchers hold the same model.
    models = inside.pack("nodes.comfyui_models")
    for handle, model in ((stage_c, model_c), (stage_b, model_b)):
        assert models.managed(handle).patcher.model is model.model
        own = {weight.untyped_storage().data_ptr() for weight in handle.network.parameters()}
        assert {weight.untyped_storage().data_ptr() for weight in model.model.diffusion_model.parameters()} == own
    # Both are the same latents on the wire, which our Stage A decodes.
    picture = inside.run("CascadeDecodeStageA", stage_a=inside.load("StageA"), latent={"samples": detail})[0]
    assert 0.05 < picture.mean() < 0.95 and picture.std() > 0.05
    after = [weight for handle in (stage_c, stage_b) for weight in handle.network.parameters()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def no_picture():
    return {"clip_vision_output": SimpleNamespace(image_embeds=torch.zeros(1, 96)), "strength": 1.0}


@check
def cores_model_as_handle_samples_as_our_loader(inside):
    positive, negative = inside.conditions()
    stage_c, stage_b = inside.load("StageC"), inside.load("StageB")
    core_c, core_b = loaded_by_core(inside, stage_c), loaded_by_core(inside, stage_b)
    from_c = inside.run("CascadeStageCFromModel", model=core_c)[0]
    from_b = inside.run("CascadeStageBFromModel", model=core_b)[0]
    # What ComfyUI keeps of a model says nothing of the tiny family's own guidance, size and shift.
    assert from_c.info.defaults["shift"] == 2.0 and from_c.info.config["c_hidden"] == stage_c.info.config["c_hidden"]
    assert from_c.info.parameters == stage_c.info.parameters and from_b.info.parameters == stage_b.info.parameters
    latent = inside.run("CascadeEmptyLatent", stage_c=stage_c, width=0, height=0, batch_size=1)[0]
    latent.pop("cascade_family")
    own = sampled_c(inside, stage_c, positive, negative, latent=latent, shift=1.0)
    theirs = sampled_c(inside, from_c, positive, negative, latent=latent, shift=1.0)
    near(own["samples"], theirs["samples"])
    detail = [sampled_b(inside, handle, theirs, positive, negative, shift=1.0) for handle in (stage_b, from_b)]
    near(detail[0]["samples"], detail[1]["samples"])
    # One set of weights, moved by ComfyUI's patcher.
    models = inside.pack("nodes.comfyui_models")
    assert models.managed(from_c).patcher is core_c
    core = {weight.data_ptr() for weight in core_c.model.diffusion_model.parameters()}
    assert {weight.data_ptr() for weight in from_c.network.parameters()} == core


@check
def patches_on_weights_come_along_and_go_again(inside):
    positive, negative = inside.conditions()
    stage_c = inside.load("StageC")
    plain = sampled_c(inside, stage_c, positive, negative)["samples"]
    model = inside.run("CascadeToModel", stage=stage_c)[0]
    patched = model.clone()
    keys = (
        "diffusion_model.down_blocks.0.2.attention.attn.to_q.weight",
        "diffusion_model.up_blocks.0.0.channelwise.0.weight",
        "diffusion_model.down_blocks.0.1.mapper.bias",
    )
    generator = torch.Generator().manual_seed(0)
    weights = model.model.state_dict()
    changes = {key: ("diff", (torch.randn(weights[key].shape, generator=generator) * 0.1,)) for key in keys}
    assert set(patched.add_patches(changes)) == set(keys)
    handle = inside.run("CascadeStageCFromModel", model=patched)[0]
    assert handle.title == stage_c.title and handle.family == "tiny"
    changed = sampled_c(inside, handle, positive, negative)["samples"]
    differ(changed, plain)
    # ComfyUI's sampler sees the same weights.
    core = ksampled(inside, patched, positive, negative, torch.zeros(1, 16, 6, 6))
    again = inside.run("CascadeToModel", stage=handle)[0]
    near(ksampled(inside, again, positive, negative, torch.zeros(1, 16, 6, 6)), core)
    # It runs on the layers of ComfyUI's model by now, whose weights are not read but asked: another order of sums.
    unpatched = sampled_c(inside, stage_c, positive, negative)["samples"]
    near(unpatched, plain, 1e-4)
    near(sampled_c(inside, handle, positive, negative)["samples"], changed, 0)
    # Offloaded, the patches are applied when a weight is fetched.
    patched.detach()
    patched.partially_load(torch.device("cpu"), extra_memory=1)
    load = inside.management.load_models_gpu
    inside.management.load_models_gpu = lambda *a, **k: None
    try:
        near(sampled_c(inside, handle, positive, negative)["samples"], changed)
    finally:
        inside.management.load_models_gpu = load
        patched.detach()
    near(sampled_c(inside, stage_c, positive, negative)["samples"], unpatched, 0)


@check
def a_lora_for_cores_names_reaches_the_handle(inside):
    """Every key of a LoRA in ComfyUI's names finds its weight, attention included."""
    positive, negative = inside.conditions()
    stage_c = inside.load("StageC")
    model = inside.run("CascadeToModel", stage=stage_c)[0]
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for layer in ("down_blocks_0_2_attention_attn_to_k", "up_blocks_0_0_channelwise_4"):
        weight = next(
            weight
            for name, weight in model.model.diffusion_model.named_parameters()
            if name.replace(".", "_") == f"{layer}_weight"
        )
        lora[f"lora_prior_unet_{layer}.lora_up.weight"] = torch.randn(len(weight), 2, generator=generator)
        lora[f"lora_prior_unet_{layer}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.1
    sd = importlib.import_module("comfy.sd")
    with_lora, _ = sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert len(with_lora.patches) == 2
    handle = inside.run("CascadeStageCFromModel", model=with_lora)[0]
    plain, changed = (sampled_c(inside, given, positive, negative)["samples"] for given in (stage_c, handle))
    differ(plain, changed)


@check
def other_models_and_other_changes_are_refused(inside):
    model_c = inside.run("CascadeToModel", stage=inside.load("StageC"))[0]
    convert = inside.run
    refused("The model is Stage C, expected Stage B", convert, "CascadeStageBFromModel", model=model_c)
    other = inside.patchers.ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))
    refused("The model is a Linear, expected Stage C", convert, "CascadeStageCFromModel", model=other)
    shifted = inside.run("ModelSamplingStableCascade", model=model_c, shift=3.0)[0]
    refused("carries 'model_sampling'", convert, "CascadeStageCFromModel", model=shifted)
    rescaled = inside.run("RescaleCFG", model=model_c, multiplier=0.7)[0]
    refused("carries 'sampler_cfg_function'", convert, "CascadeStageCFromModel", model=rescaled)
    replaced = model_c.clone()
    replaced.set_model_attn1_patch(lambda *given: given)
    refused("carries 'patches'", convert, "CascadeStageCFromModel", model=replaced)
    refused("expected Stage C or Stage B", convert, "CascadeToModel", stage=inside.load("StageA"))


@check
def bridged_models_are_given_back(inside):
    models, bridge = inside.pack("nodes.comfyui_models"), inside.pack("nodes.comfyui_bridge")
    positive, negative = inside.conditions()
    stage_c = inside.load("StageC")
    sampled_c(inside, stage_c, positive, negative)
    model = inside.run("CascadeToModel", stage=stage_c)[0]
    ksampled(inside, model, positive, negative, torch.zeros(1, 16, 6, 6))
    back = inside.run("CascadeStageCFromModel", model=model)[0]
    sampled_c(inside, back, positive, negative)
    references = [weakref.ref(thing) for thing in (stage_c.network, back.network, model, model.model)]
    del stage_c, back, model
    gc.collect()
    assert [reference() is not None for reference in references] == [False] * 4
    inside.management.cleanup_models()
    gc.collect()
    assert not models._managed and not bridge._origins
