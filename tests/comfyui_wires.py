"""Checks inside ComfyUI: values of its own nodes into ours, and ours into its own."""

import importlib
import json
from types import SimpleNamespace

import torch
from comfyui_inside import SETTINGS, check, differ, near, refused, sampled_c

WIDTH, HEIGHT = 128, 96


def started(inside, batch=2):
    """Stage C and B with a Stage C latent of 128 x 96 and a Stage B latent."""
    stage_c, stage_b, conditions = inside.load("StageC"), inside.load("StageB"), inside.conditions()
    empty = inside.run("CascadeEmptyLatent", stage_c=stage_c, width=WIDTH, height=HEIGHT, batch_size=batch)[0]
    latent_c = sampled_c(inside, stage_c, *conditions, latent=empty)
    latent_b = sampled_b(inside, stage_b, latent_c, *conditions)
    return SimpleNamespace(
        stage_c=stage_c,
        stage_b=stage_b,
        stage_a=inside.load("StageA"),
        conditions=conditions,
        empty=empty,
        latent_c=latent_c,
        latent_b=latent_b,
    )


def sampled_b(inside, stage_b, latent, positive, negative, **changes):
    inputs = {"stage_b": stage_b, "latent": latent, "positive": positive, "negative": negative, **SETTINGS}
    return inside.run("CascadeSampleStageB", **inputs | changes)[0]


def decoded(inside, start, latent):
    return inside.run("CascadeDecodeStageA", stage_a=start.stage_a, latent=latent)[0]


@check
def latents_pass_through_cores_batch_nodes(inside):
    start = started(inside)
    later = inside.run("LatentFromBatch", samples=start.empty, batch_index=1, length=1)[0]
    alone = sampled_c(inside, start.stage_c, *start.conditions, latent=later)
    near(alone["samples"], start.latent_c["samples"][1:])
    later = inside.run("LatentFromBatch", samples=start.latent_c, batch_index=1, length=1)[0]
    detail = sampled_b(inside, start.stage_b, later, *start.conditions)
    near(detail["samples"], start.latent_b["samples"][1:])
    twice = inside.run("RepeatLatentBatch", samples=start.latent_c, amount=2)[0]
    detail = sampled_b(inside, start.stage_b, twice, *start.conditions)
    near(detail["samples"][:2], start.latent_b["samples"])
    differ(detail["samples"][2:], start.latent_b["samples"])
    assert decoded(inside, start, detail).shape == (4, HEIGHT, WIDTH, 3)
    both = inside.run("LatentBatch", samples1=start.latent_b, samples2=start.latent_b)[0]
    pictures = decoded(inside, start, both)
    near(pictures[:2], pictures[2:])
    flipped = inside.run("LatentFlip", samples=start.latent_b, flip_method="y-axis: horizontally")[0]
    assert decoded(inside, start, flipped).shape == (2, HEIGHT, WIDTH, 3)


@check
def latents_pass_through_cores_size_nodes(inside):
    start = started(inside, batch=1)
    for larger in (
        inside.run("LatentUpscaleBy", samples=start.latent_c, upscale_method="bilinear", scale_by=2.0)[0],
        inside.run(
            "LatentUpscale",
            samples=start.latent_c,
            upscale_method="nearest-exact",
            width=48,
            height=48,
            crop="disabled",
        )[0],
    ):
        rows, columns = larger["samples"].shape[-2:]
        assert rows > 3 and larger["width"] == WIDTH
        # The size of before no longer fits, so it is that of the samples.
        detail = sampled_b(inside, start.stage_b, larger, *start.conditions)
        assert decoded(inside, start, detail).shape == (1, round(rows * 16 / 3) * 8, round(columns * 16 / 3) * 8, 3)
        again = sampled_c(inside, start.stage_c, *start.conditions, latent=larger, start=0.5)
        assert again["samples"].shape == larger["samples"].shape
    pasted = inside.run("LatentComposite", samples_to=start.latent_c, samples_from=start.latent_c, x=8, y=8, feather=0)[
        0
    ]
    assert sampled_b(inside, start.stage_b, pasted, *start.conditions)["samples"].shape == (1, 4, 24, 32)


@check
def masks_of_core_hold_what_is_outside(inside):
    start = started(inside, batch=1)
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, :, : WIDTH // 2] = 1
    for stage, latent, side in (("c", start.latent_c, 1), ("b", start.latent_b, 16)):
        masked = inside.run("SetLatentNoiseMask", samples=latent, mask=mask)[0]
        if stage == "c":
            again = sampled_c(inside, start.stage_c, *start.conditions, latent=masked, seed=9)
        else:
            inputs = {"start_latent": masked, "seed": 9}
            again = sampled_b(inside, start.stage_b, start.latent_c, *start.conditions, **inputs)
        near(again["samples"][..., -side:], latent["samples"][..., -side:])
        differ(again["samples"][..., :side], latent["samples"][..., :side])


@check
def latents_of_cores_own_nodes_are_sampled(inside):
    start = started(inside, batch=1)
    for_c, for_b = inside.run("StableCascade_EmptyLatentImage", width=256, height=256, compression=42, batch_size=1)
    latent_c = sampled_c(inside, start.stage_c, *start.conditions, latent=for_c)
    assert latent_c["samples"].shape == (1, 16, 6, 6)
    positive = inside.run("StableCascade_StageB_Conditioning", conditioning=start.conditions[0], stage_c=latent_c)[0]
    plain = sampled_b(inside, start.stage_b, latent_c, *start.conditions)
    near(sampled_b(inside, start.stage_b, latent_c, positive, start.conditions[1])["samples"], plain["samples"])
    refused(
        "brings a Stage C latent of its own",
        *(sampled_b, inside, start.stage_b, start.latent_c, positive, start.conditions[1]),
    )
    refused("has no effect", sampled_c, inside, start.stage_c, positive, start.conditions[1])
    assert plain["samples"].shape == for_b["samples"].shape
    refused(
        "has no effect when start is 1",
        sampled_b,
        inside,
        start.stage_b,
        latent_c,
        *start.conditions,
        start_latent=for_b,
    )
    refused("expects 16", sampled_c, inside, start.stage_c, *start.conditions, latent=for_b)


@check
def cores_vae_nodes_take_and_give_stage_b_latents(inside):
    """Stage A at its published size, which is the only one that ComfyUI builds; random weights."""
    models, checkpoints = inside.pack("cascade_ops.models"), inside.pack("cascade_ops.checkpoints")
    generator = torch.Generator().manual_seed(0)
    module = models.StageA()
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
        module.out_block[0].bias.fill_(0.5)
        module.out_block[0].weight.mul_(0.05)
    path = inside.base / "models" / "vae" / "stage_a.safetensors"
    path.parent.mkdir(exist_ok=True)
    checkpoints.save(module, path, stage="stage_a", config={})
    try:
        vae = inside.run("VAELoader", vae_name=path.name)[0]
        ours = inside.run("CascadeLoadStageA", file=path.name)[0]
        latent = {"samples": torch.randn(1, 4, 16, 24, generator=generator)}
        theirs = inside.run("VAEDecode", vae=vae, samples=latent)[0]
        assert theirs.std() > 0.05
        near(inside.run("CascadeDecodeStageA", stage_a=ours, latent=latent)[0], theirs, 1 / 255)
        # And the scale is the one that ComfyUI's Stage B samples in.
        formats = importlib.import_module("comfy.latent_formats")
        wires = inside.pack("cascade_ops.wires")
        near(wires.read_latent(latent, "stage_b").samples, formats.SC_B().process_in(latent["samples"]))
        near(wires.read_latent(latent).samples, formats.SC_Prior().process_in(latent["samples"]))
    finally:
        path.unlink()


@check
def cores_text_encoder_gives_the_same_conditioning(inside):
    """The tiny family's weights in ComfyUI's CLIP of the type stable_cascade, which is told their sizes."""
    clip_module, sd = importlib.import_module("comfy.sdxl_clip"), importlib.import_module("comfy.sd")
    ours = inside.load("TextEncoder")
    tiny = ours.info.config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
    target = SimpleNamespace(
        params={}, clip=clip_module.StableCascadeClipModel, tokenizer=clip_module.StableCascadeTokenizer
    )
    options = {"clip_g_model_config": {name: tiny[name] for name in sizes}, "dtype": torch.float32}
    clip = sd.CLIP(target, embedding_directory=None, model_options=options)
    missing, unexpected = clip.load_sd(ours.network.state_dict())
    assert not missing and not unexpected, (missing, unexpected)
    stage_c = inside.load("StageC")
    for text in ("a large red circle", "a (red:1.3) star \\(small\\), ((blue)) background", "", "a cross " * 60):
        theirs = inside.run("CLIPTextEncode", clip=clip, text=text)[0]
        mine = inside.run("CascadeEncodeText", text_encoder=ours, text=text)[0]
        assert set(theirs[0][1]) == {"pooled_output"}
        near(mine[0][0], theirs[0][0], 1e-3)
        near(mine[0][1]["pooled_output"], theirs[0][1]["pooled_output"], 1e-3)
    both = [inside.run("CLIPTextEncode", clip=clip, text=text)[0] for text in ("a large red circle", "")]
    mine = inside.conditions("a large red circle")
    near(sampled_c(inside, stage_c, *both)["samples"], sampled_c(inside, stage_c, *mine)["samples"], 1e-2)


@check
def cores_unclip_pictures_act_as_in_cores_model(inside):
    positive, negative = inside.conditions()
    stage_c = inside.load("StageC")
    generator = torch.Generator().manual_seed(0)
    pictures = [SimpleNamespace(image_embeds=torch.randn(n, 96, generator=generator)) for n in (1, 2)]

    def with_picture(condition, picture, strength, augmentation=0.0):
        return inside.run(
            "unCLIPConditioning",
            conditioning=condition,
            clip_vision_output=picture,
            strength=strength,
            noise_augmentation=augmentation,
        )[0]

    one = with_picture(positive, pictures[0], 1.0)
    two = with_picture(one, pictures[1], 0.5)
    core = inside.run("CascadeToModel", stage=stage_c)[0].model
    for wire, tokens in ((one, 1), (two, 3)):
        theirs = core.extra_conds(**wire[0][1])["clip_img"].cond
        assert theirs.shape == (1, tokens, 96)
        # Scaled as core scales them, and no further.
        read = inside.pack("cascade_ops.wires").read_pictures(wire, "positive")
        near(read.embeddings, theirs)
        assert read.weights.tolist() == [1.0] * tokens
    plain, first, second = (sampled_c(inside, stage_c, wire, negative)["samples"] for wire in (positive, one, two))
    differ(first, plain)
    differ(second, first)
    refused(
        "noise_augmentation of 0.2", sampled_c, inside, stage_c, with_picture(positive, pictures[0], 1.0, 0.2), negative
    )


@check
def our_image_prompts_act_as_in_cores_model(inside):
    from comfy.clip_vision import ClipVisionModel

    encoder, stage_c = inside.load("ImageEncoder"), inside.load("StageC")
    config = inside.base / "clip_vision.json"
    config.write_text(json.dumps({"model_type": "clip_vision_model", "num_channels": 3, **encoder.info.config}))
    vision = ClipVisionModel(str(config))
    missing, unexpected = vision.load_sd(encoder.network.state_dict())
    assert not missing and not unexpected, (missing, unexpected)
    positive, negative = inside.conditions("")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 224, 224, 3, generator=generator)
    by_core = inside.run("CLIPVisionEncode", clip_vision=vision, image=pictures, crop="center")[0]
    core = inside.run("CascadeToModel", stage=stage_c)[0].model
    read_pictures = inside.pack("cascade_ops.wires").read_pictures

    def prompted(weight):
        """By our node, by it from core's encoder, and by core's node."""
        inputs = {"conditioning": positive, "weight": weight, "crop": "center"}
        unclip = {"clip_vision_output": by_core, "strength": weight, "noise_augmentation": 0.0}
        return (
            inside.run("CascadeImagePrompt", image=pictures, image_encoder=encoder, **inputs)[0],
            inside.run("CascadeImagePrompt", clip_vision_output=by_core, **inputs)[0],
            inside.run("unCLIPConditioning", conditioning=positive, **unclip)[0],
        )

    # ComfyUI reads our weight as its strength; we read it as how far to go towards the picture.
    for weight in (1.0, 0.7):
        ours, theirs, cores = prompted(weight)
        expected = core.extra_conds(**cores[0][1])["clip_img"].cond
        assert expected.shape == (1, 2, 96)
        for wire in (ours, theirs):
            near(core.extra_conds(**wire[0][1])["clip_img"].cond, expected, 1e-2)
            read = read_pictures(wire, "positive")
            near(read.embeddings, expected / weight, 1e-2)
            near(read.weights, torch.full((2,), weight))
        near(read_pictures(cores, "positive").embeddings, expected)
        assert read_pictures(cores, "positive").weights.tolist() == [1.0, 1.0]
        # Behind one another.
        unclip = {"clip_vision_output": by_core, "strength": weight, "noise_augmentation": 0.0}
        chained = inside.run("unCLIPConditioning", conditioning=ours, **unclip)[0]
        near(core.extra_conds(**chained[0][1])["clip_img"].cond, torch.cat([expected, expected], 1), 1e-2)
    results = [sampled_c(inside, stage_c, wire, negative)["samples"] for wire in (theirs, cores, positive)]
    differ(results[0], results[1])
    differ(results[0], results[2])
    # At 1, both mean the same in both samplers.
    ours, theirs, cores = prompted(1.0)
    results = [sampled_c(inside, stage_c, wire, negative)["samples"] for wire in (ours, theirs, cores, positive)]
    near(results[0], results[2], 0.1)
    assert torch.equal(results[1], results[2])
    differ(results[0], results[3])
    latent = {"samples": torch.zeros(1, 16, 6, 6)}
    model = inside.run("CascadeToModel", stage=stage_c)[0]
    results = [
        inside.run(
            "KSampler",
            model=model,
            seed=1,
            steps=3,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            positive=wire,
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )[0]["samples"]
        for wire in (ours, cores, positive)
    ]
    near(results[0], results[1], 0.1)
    differ(results[0], results[2])


@check
def conditioning_that_has_no_effect_is_refused_by_name(inside):
    positive, negative = inside.conditions()
    stage_c = inside.load("StageC")
    for name, inputs, words in (
        ("ConditioningSetArea", {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}, "'area'"),
        ("ConditioningSetTimestepRange", {"start": 0.0, "end": 0.5}, "'start_percent'"),
        ("ConditioningSetMask", {"mask": torch.ones(1, 8, 8), "strength": 1.0, "set_cond_area": "default"}, "'mask'"),
        ("FluxGuidance", {"guidance": 3.0}, "'guidance'"),
    ):
        changed = inside.run(name, conditioning=positive, **inputs)[0]
        refused(words, sampled_c, inside, stage_c, changed, negative)
    combined = inside.run("ConditioningCombine", conditioning_1=positive, conditioning_2=negative)[0]
    refused("combines 2 prompts", sampled_c, inside, stage_c, combined, negative)
    # What core makes one conditioning of is one.
    plain = sampled_c(inside, stage_c, positive, negative)["samples"]
    joined = inside.run("ConditioningConcat", conditioning_to=positive, conditioning_from=negative)[0]
    mixed = inside.run(
        "ConditioningAverage", conditioning_to=positive, conditioning_from=negative, conditioning_to_strength=0.5
    )[0]
    nothing = inside.run("ConditioningZeroOut", conditioning=positive)[0]
    for wire in (joined, mixed, nothing):
        differ(sampled_c(inside, stage_c, wire, negative)["samples"], plain)
