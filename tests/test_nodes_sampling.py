"""The nodes that sample and decode, called by hand."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from nodes_kit import TestBackend, load, run, sample_b, sample_c

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.nodes import runtime


def test_whole_chain_by_hand(host):
    detail, _ = sample_b(host)
    latent = detail["result"][0]
    assert (latent["width"], latent["height"], latent["samples"].shape) == (100, 60, (1, 4, 16, 26))
    image = run("CascadeDecodeStageA", stage_a=load("CascadeLoadStageA"), latent=latent)["result"][0]
    assert image.shape == (1, 60, 100, 3) and image.dtype == torch.float32 and image.std() > 0.01
    small, _ = sample_c(host)
    preview = run("CascadePreviewLatent", previewer=load("CascadeLoadPreviewer"), latent=small["result"][0])["result"]
    assert preview[0].shape == (1, 16, 24, 3)


def test_sampling_reports_every_step_and_shows_previews(host):
    sample_c(host)
    assert [entry[:2] for entry in host.seen] == [(1, 2), (2, 2)] and host.seen[0][2] is None
    host.seen.clear()
    plain, _ = sample_c(host)
    host.seen.clear()
    shown, _ = sample_c(host, previewer=load("CascadeLoadPreviewer"))
    assert [(entry[0], entry[2].size) for entry in host.seen] == [(1, (24, 16)), (2, (24, 16))]
    assert torch.equal(plain["result"][0]["samples"], shown["result"][0]["samples"])
    host.seen.clear()
    sample_b(host, stage_a=load("CascadeLoadStageA"))
    assert [(entry[0], entry[2] and entry[2].size) for entry in host.seen[2:]] == [(1, (104, 64)), (2, (104, 64))]


def test_a_run_can_be_stopped_at_every_step_and_picture(host):
    for node in (sample_c, sample_b):
        host.stop_at = None
        _, inputs = node(host)
        for step in (1, 2):
            host.stop_at = step
            with pytest.raises(KeyboardInterrupt):
                run("CascadeSampleStageC" if node is sample_c else "CascadeSampleStageB", **inputs)
    host.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        run("CascadeDecodeStageA", stage_a=load("CascadeLoadStageA"), latent={"samples": torch.zeros(2, 4, 8, 8)})


OPTIONS = {
    "shift": 3.0,
    "guidance_end": 1.0,
    "guidance_from": 0.6,
    "guidance_until": 0.6,
    "rescale": 0.1,
    "end": 0.3,
    "start": 0.5,
    "sampler": "euler",
    "guidance": 2.0,
    "steps": 3,
    "seed": 2,
}


@pytest.mark.parametrize("node", ["CascadeSampleStageC", "CascadeSampleStageB"])
def test_every_option_acts_and_its_default_is_the_plain_run(host, node):
    result, inputs = (sample_c if node == "CascadeSampleStageC" else sample_b)(host)
    plain = result["result"][0]["samples"]
    declared = NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["optional"]
    defaults = {name: options["default"] for name, (_, options) in declared.items() if "default" in options}
    assert torch.equal(run(node, **inputs, **defaults)["result"][0]["samples"], plain)
    windows = {"window", "window_overlap"} if node == "CascadeSampleStageB" else set()
    assert set(defaults) - set(OPTIONS) == {"rescale_over", "start_noise"} | windows
    for name, value in OPTIONS.items():
        start = {"start_latent": {"samples": plain}} if (name, node) == ("start", "CascadeSampleStageB") else {}
        changed = run(node, **inputs | {name: value} | start)["result"][0]["samples"]
        assert not torch.allclose(changed, plain, rtol=1e-3), name
    # Over the batch needs a batch to differ.
    pair = inputs | {"latent": inputs["latent"] | {"samples": inputs["latent"]["samples"].expand(2, -1, -1, -1)}}
    each, together = (run(node, **pair, rescale_over=over)["result"][0]["samples"] for over in ("image", "batch"))
    assert not torch.allclose(each, together, rtol=1e-3)


def test_inputs_are_not_changed(host):
    def snapshot(inputs):
        tensors = {
            "samples": inputs["latent"]["samples"],
            "hidden": inputs["positive"][0][0],
            "pooled": inputs["positive"][0][1]["pooled_output"],
        }
        handle = inputs.get("stage_c") or inputs["stage_b"]
        tensors |= handle.module.state_dict()
        keys = sorted(inputs["latent"]), sorted(inputs["positive"][0][1])
        return keys, {name: hash(tensor.numpy().tobytes()) for name, tensor in tensors.items()}

    for node, name in ((sample_c, "CascadeSampleStageC"), (sample_b, "CascadeSampleStageB")):
        _, inputs = node(host)
        before = snapshot(inputs)
        first, second = (run(name, **inputs)["result"][0]["samples"] for _ in range(2))
        assert torch.equal(first, second)
        assert snapshot(inputs) == before


def test_works_in_inference_mode(host):
    """ComfyUI runs nodes in it."""
    plain, _ = sample_b(host)
    with torch.inference_mode():
        inside, _ = sample_b(host)
    assert torch.equal(plain["result"][0]["samples"], inside["result"][0]["samples"])


def test_previewer_of_another_family_is_left_out_and_that_is_said(host):
    previewer = load("CascadeLoadPreviewer")
    tiny = replace(previewer, info=replace(previewer.info, size="tiny", rank=3))
    stage_c = load("CascadeLoadStageC")
    release = replace(stage_c, info=replace(stage_c.info, rank=0))
    host.seen.clear()
    answer, _ = sample_c(host, stage_c=release, previewer=tiny)
    assert answer["ui"]["text"][1].startswith("no live previews from previewer tiny (p.safetensors): it belongs to an")
    assert [entry[2] for entry in host.seen] == [None, None]
    with pytest.raises(ValueError, match="belongs to the bundled tiny family"):
        run("CascadePreviewLatent", previewer=tiny, latent=answer["result"][0])


def test_text_of_another_encoder_is_refused_by_the_node(host):
    _, inputs = sample_c(host)
    inputs["positive"] = [[torch.zeros(1, 77, 1280), {"pooled_output": torch.zeros(1, 1280)}]]
    with pytest.raises(ValueError, match="encoded 1280 wide"):
        run("CascadeSampleStageC", **inputs)


def test_embeddings_come_from_the_models_folder(empty_host, small_family):
    from safetensors.torch import save_file

    models = shutil.copytree(small_family.models, empty_host / "models")
    (models / "embeddings").mkdir()
    save_file({"clip_g": torch.ones(2, 64)}, models / "embeddings/glow.safetensors")
    encoder = load("CascadeLoadTextEncoder")

    def encode(text):
        return run("CascadeEncodeText", text_encoder=encoder, text=text)["result"][0][0][0]

    assert not torch.allclose(encode("red embedding:glow"), encode("red"))
    with pytest.raises(ValueError, match="'gloom', which was not found"):
        encode("red embedding:gloom")


def test_device_gets_a_copy(small_family, handles):
    with runtime.using(TestBackend(small_family.models, device="meta")):
        given = [handles["stage_b"], handles["stage_a"]]
        moved = runtime.placed(given, 1000)
        assert [handle.device.type for handle in moved] == ["meta", "meta"]
        assert [handle.device.type for handle in given] == ["cpu", "cpu"]
        assert runtime.placed(moved) == moved
    assert handles["stage_b"].size_in_bytes == 4 * sum(p.numel() for p in handles["stage_b"].module.parameters())


def test_a_node_places_all_that_it_runs_at_once(host):
    sample_b(host, stage_a=load("CascadeLoadStageA"))
    run("CascadeDecodeStageA", stage_a=load("CascadeLoadStageA"), latent={"samples": torch.zeros(1, 4, 8, 8)})
    stages = [placed for placed, _ in host.placings]
    assert stages == [["text_encoder"], ["text_encoder"], ["stage_c"], ["stage_b", "stage_a"], ["stage_a"]]
    sample_c(host, previewer=load("CascadeLoadPreviewer"))
    assert host.placings[-1][0] == ["stage_c", "previewer"]
    # More pictures and larger ones need more memory; encoding a text needs little.
    needed = {placed[0]: memory for placed, memory in host.placings[:5]}
    assert needed["text_encoder"] == 0 and needed["stage_c"] > 10_000 and needed["stage_a"] > 10_000
    _, inputs = sample_c(host)
    pair = {"samples": inputs["latent"]["samples"].repeat(2, 1, 2, 1)}
    run("CascadeSampleStageC", **inputs | {"latent": pair})
    assert host.placings[-1][1] > 2 * host.placings[-2][1]


def test_rough_previews_where_the_host_wants_them_and_nothing_better_is_connected(host):
    def tiny(handle):
        return replace(handle, info=replace(handle.info, size="tiny", rank=3))

    stage_c, stage_b = tiny(load("CascadeLoadStageC")), tiny(load("CascadeLoadStageB"))
    plain, _ = sample_b(host, stage_b=stage_b)
    assert [entry[2] for entry in host.seen] == [None] * 4
    host.previews = True
    host.seen.clear()
    shown, _ = sample_b(host, stage_b=stage_b)
    # The small family is of no known kind, so nothing is known of the colours of its Stage C latents.
    assert [entry[2] and entry[2].size for entry in host.seen] == [None, None, (256, 158), (256, 158)]
    assert torch.equal(plain["result"][0]["samples"], shown["result"][0]["samples"])
    host.seen.clear()
    sample_c(host, stage_c=stage_c)
    assert [entry[2].size for entry in host.seen] == [(256, 171), (256, 171)]
    host.seen.clear()
    sample_c(host, stage_c=stage_c, previewer=load("CascadeLoadPreviewer"))
    assert [entry[2].size for entry in host.seen] == [(24, 16), (24, 16)]


def test_pictures_in_the_conditioning_act_on_stage_c_and_leave_stage_b_alone(host):
    first, inputs = sample_c(host)
    plain = first["result"][0]["samples"]
    generator = torch.Generator().manual_seed(0)

    def with_pictures(*strengths, augmentation=0.0):
        embeddings = torch.randn(len(strengths), 1, 24, generator=generator.manual_seed(0)) * 5
        pictures = [
            {
                "clip_vision_output": SimpleNamespace(image_embeds=embedding),
                "strength": strength,
                "noise_augmentation": augmentation,
            }
            for embedding, strength in zip(embeddings, strengths, strict=True)
        ]
        return [[inputs["positive"][0][0], inputs["positive"][0][1] | {"unclip_conditioning": pictures}]]

    def sampled(**changes):
        return run("CascadeSampleStageC", **inputs | changes)["result"][0]["samples"]

    one, weaker, two = (sampled(positive=with_pictures(*s)) for s in ((1.0,), (0.5,), (1.0, 0.5)))
    for ours, theirs in ((one, plain), (weaker, one), (two, one), (sampled(negative=with_pictures(1.0)), plain)):
        assert not torch.allclose(ours, theirs, rtol=1e-3)
    # No picture is one of zeros.
    assert torch.equal(sampled(positive=with_pictures(0.0)), plain)
    with pytest.raises(ValueError, match=r"noise_augmentation of 0\.1.*set it to 0"):
        sampled(positive=with_pictures(1.0, augmentation=0.1))
    wide = with_pictures(1.0)
    wide[0][1]["unclip_conditioning"][0]["clip_vision_output"].image_embeds = torch.zeros(1, 768)
    with pytest.raises(ValueError, match=r"picture was encoded 768 wide and Stage C custom .* reads 24"):
        sampled(positive=wide)
    second, inputs_b = sample_b(host)
    pictured = run("CascadeSampleStageB", **inputs_b | {"positive": with_pictures(1.0)})["result"][0]["samples"]
    assert torch.equal(pictured, second["result"][0]["samples"])


def test_stage_b_takes_one_stage_c_latent(host):
    plain, inputs = sample_b(host)
    hidden, options = inputs["positive"][0]

    def sampled(prior):
        wire = [[hidden, options | {"stable_cascade_prior": prior}]]
        return run("CascadeSampleStageB", **inputs | {"positive": wire})["result"][0]["samples"]

    assert torch.equal(sampled(inputs["latent"]["samples"].clone()), plain["result"][0]["samples"])
    for other in (inputs["latent"]["samples"] + 1, torch.zeros(1, 16, 9, 9)):
        with pytest.raises(ValueError, match="'positive' brings a Stage C latent of its own"):
            sampled(other)
