"""What can act on Stage C at once: in any order of the nodes, with one of each or one per picture of the batch."""

import itertools
from dataclasses import replace

import pytest
import torch
from attachment_kit import IMAGE_WIDTH, differ, near, noise
from conftest import POOLED_WIDTH, TEXT_WIDTH
from nodes_kit import TestBackend, load, run
from test_pipeline import GRAPH, pixels

from stable_cascade_nodes.cascade_ops import stages
from stable_cascade_nodes.cascade_ops.attachments import apply_control, apply_ip_adapter
from stable_cascade_nodes.cascade_ops.control_inputs import ControlInput
from stable_cascade_nodes.cascade_ops.denoisers import TextCondition
from stable_cascade_nodes.cascade_ops.wires import Latent
from stable_cascade_nodes.nodes import runtime
from stable_cascade_nodes.nodes.files import BUNDLED
from stable_cascade_nodes.workflows.running import Runner

OWN_SIZE = {"width": 0, "height": 0, "fit": "crop"}
PROMPT = "a large red circle on the left on a [chess] background"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The bundled tiny family on a machine without other files: a backend, and what the nodes below share."""
    with runtime.using(TestBackend(tmp_path_factory.mktemp("bare"))):
        parts = {
            name: load(f"CascadeLoad{name}")
            for name in ("StageC", "TextEncoder", "ImageEncoder", "IPAdapter", "LatentEncoder")
        }
        for name in ("triangle", "cross", "hole"):
            parts[name], parts[f"{name} mask"] = run("CascadeExampleImage", picture=name)["result"]
        edges = run("CascadeCannyControl", image=parts["triangle"], low=100, high=200, side=224)["result"][0]
        hole = run("CascadeInpaintControl", image=parts["hole"], mask=parts["hole mask"])["result"][0]
        parts["canny"] = load("CascadeLoadControlNet", file="auto (canny)"), edges
        parts["inpainting"] = load("CascadeLoadControlNet", file="auto (inpainting)"), hole
        yield parts


def steer(tiny, name, stage_c):
    """Stage C after the node that applies `name`."""
    times = {"start": 1.0, "end": 0.0}
    if name == "lora":
        inputs = {"file": BUNDLED, "strength": 0.8, "text_encoder": tiny["TextEncoder"]}
        return run("CascadeLoadLoRA", stage_c=stage_c, **inputs)["result"][0]
    if name in ("canny", "inpainting"):
        network, control = tiny[name]
        inputs = {"controlnet": network, "control": control, "strength": 0.7, **times}
        return run("CascadeApplyControlNet", stage_c=stage_c, **inputs)["result"][0]
    inputs = {"ip_adapter": tiny["IPAdapter"], "image_encoder": tiny["ImageEncoder"], "image": tiny[name], **times}
    if name == "cross":
        inputs |= {"mask": tiny["hole mask"], "down_outer": 0.0}
    return run("CascadeApplyIPAdapter", stage_c=stage_c, weight=0.6, **inputs)["result"][0]


def image_prompted(tiny, conditioning, picture):
    inputs = {"image_encoder": tiny["ImageEncoder"], "image": tiny[picture], "crop": "center"}
    return run("CascadeImagePrompt", conditioning=conditioning, weight=0.5, **inputs)["result"][0]


@pytest.fixture(scope="module")
def sampled(tiny):
    """Samples with the LoRA's word, pictures as prompts, and a start latent that a mask holds outside of it."""
    inputs = {"stage_c": tiny["StageC"], "file": BUNDLED, "strength": 0.0, "text_encoder": tiny["TextEncoder"]}
    encoder = run("CascadeLoadLoRA", **inputs)["result"][1]
    texts = [run("CascadeEncodeText", text_encoder=encoder, text=text)["result"][0] for text in (PROMPT, "")]
    inputs = {"latent_encoder": tiny["LatentEncoder"], "image": tiny["hole"], "mask": tiny["hole mask"], **OWN_SIZE}
    latent = run("CascadeEncodeStageC", **inputs)["result"][0]

    def sample(order, prompted=("cross",), latent=latent):
        stage_c, positive = tiny["StageC"], texts[0]
        for name in order:
            stage_c = steer(tiny, name, stage_c)
        for name in prompted:
            positive = image_prompted(tiny, positive, name)
        inputs = {"stage_c": stage_c, "positive": positive, "negative": texts[1], "latent": latent, "seed": 7}
        answer = run("CascadeSampleStageC", **inputs, steps=3, guidance=0.0, sampler="ddpm")
        return answer["result"][0]["samples"]

    return sample


ONCE = ("lora", "canny", "triangle")


def test_nodes_in_any_order_give_the_same_latent_to_the_last_bit(sampled):
    results = [sampled(order) for order in itertools.permutations(ONCE)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_several_of_a_kind_in_any_order_differ_by_rounding_alone(sampled):
    """Residuals and what the attentions read are sums, and another order rounds them in another way."""
    order = ("lora", "canny", "inpainting", "triangle", "cross")
    whole = sampled(order, ("cross", "triangle"))
    for other in (order[::-1], ("cross", "canny", "lora", "triangle", "inpainting")):
        near(sampled(other, ("triangle", "cross")), whole, 1e-4)


def test_each_of_them_has_an_effect_beside_the_others(sampled, tiny):
    order = ("lora", "canny", "inpainting", "triangle", "cross")
    whole = sampled(order)
    for name in order:
        differ(sampled([other for other in order if other != name]), whole)
    differ(sampled(order, ()), whole)
    empty = run("CascadeEmptyLatent", stage_c=tiny["StageC"], width=0, height=0, batch_size=1)["result"][0]
    differ(sampled(order, latent=empty), whole)


def test_the_mask_of_the_latent_holds_whatever_acts(sampled, tiny):
    """Outside of the mask the latent is the encoded picture's, to the last bit."""
    inputs = {"latent_encoder": tiny["LatentEncoder"], "image": tiny["hole"], "mask": tiny["hole mask"], **OWN_SIZE}
    given = run("CascadeEncodeStageC", **inputs)["result"][0]
    held = torch.nn.functional.interpolate(tiny["hole mask"][:, None], size=(6, 6), mode="area")[0, 0] == 0
    assert 4 < held.sum() < 32
    made = sampled(ONCE)
    assert torch.equal(made[0, :, held], given["samples"][0, :, held])
    differ(made[0, :, ~held], given["samples"][0, :, ~held])


def test_graphs_with_the_nodes_in_any_order_save_the_same_picture(tmp_path):
    shared = {
        "20": ("CascadeExampleImage", {"picture": "triangle"}),
        "21": ("CascadeCannyControl", {"image": ["20", 0], "low": 100, "high": 200, "side": 224}),
        "22": ("CascadeLoadControlNet", {"file": "auto (canny)"}),
        "23": ("CascadeLoadIPAdapter", {"file": "auto"}),
        "24": ("CascadeLoadImageEncoder", {"file": "auto"}),
        "25": ("CascadeLoadLatentEncoder", {"file": "auto"}),
        "26": ("CascadeExampleImage", {"picture": "hole"}),
        "27": ("CascadeEncodeStageC", {"latent_encoder": ["25", 0], "image": ["26", 0], "mask": ["26", 1], **OWN_SIZE}),
        "28": ("CascadePreviewLatent", {"previewer": ["5", 0], "latent": ["9", 0]}),
        "29": ("SaveImage", {"images": ["28", 0], "filename_prefix": "small"}),
        "33": (
            "CascadeImagePrompt",
            {"conditioning": ["6", 0], "image_encoder": ["24", 0], "image": ["20", 0], "weight": 0.5, "crop": "center"},
        ),
    }
    times = {"start": 1.0, "end": 0.0}
    steps = {
        "30": ("CascadeLoadLoRA", {"file": BUNDLED, "strength": 0.8}),
        "31": (
            "CascadeApplyControlNet",
            {"controlnet": ["22", 0], "control": ["21", 0], "strength": 0.7, **times},
        ),
        "32": (
            "CascadeApplyIPAdapter",
            {"ip_adapter": ["23", 0], "image_encoder": ["24", 0], "image": ["20", 0], "weight": 0.6, **times}
            | {"mask": ["26", 1], "combine": "average", "up_inner": 0.5},
        ),
    }

    def graph(order):
        nodes = {key: GRAPH[key] for key in ("1", "2", "5", "6", "7")}
        nodes |= {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in shared.items()}
        before = "2"
        for key in order:
            kind, inputs = steps[key]
            text = {"text_encoder": ["1", 0]} if kind == "CascadeLoadLoRA" else {}
            nodes[key] = {"class_type": kind, "inputs": {**inputs, **text, "stage_c": [before, 0]}}
            before = key
        sampler = GRAPH["9"]["inputs"] | {"stage_c": [before, 0], "positive": ["33", 0], "latent": ["27", 0]}
        return nodes | {"9": {"class_type": "CascadeSampleStageC", "inputs": sampler | {"steps": 2}}}

    runner = Runner(tmp_path)
    shown = [runner.shown(graph(order))["29"] for order in (("30", "31", "32"), ("32", "31", "30"), ("31", "30"))]
    assert (pixels(shown[0][0]) == pixels(shown[1][0])).all() and pixels(shown[0][0]).std() > 3
    assert (pixels(shown[0][0]) != pixels(shown[2][0])).any()


# Batches -------------------------------------------------------------------------------------------------------

BATCH = 3
SIZE = (128, 96)


def text(count, seed):
    return TextCondition(noise(count, 20, TEXT_WIDTH, seed=seed), noise(count, POOLED_WIDTH, seed=seed + 1))


def inputs_of(count):
    """Everything that may come once for all pictures or once for each, by its name: `count` of each."""
    return {
        "prompt": text(count, 1),
        "negative": text(count, 3),
        "image prompt": noise(count, 2, IMAGE_WIDTH, seed=5),
        "negative image prompt": noise(count, 1, IMAGE_WIDTH, seed=6),
        "control": noise(count, 1, 96, 128, seed=7).round(),
        "adapter's pictures": noise(count, 2, IMAGE_WIDTH, seed=8),
        "adapter's mask": noise(count, 96, 128, seed=9),
        "latent mask": noise(count, 1, 12, 16, seed=10).round(),
    }


def sample_with(handles, controlnets, adapter, given, batch=BATCH, seed=5):
    control = ControlInput("canny", given["control"])
    stage_c = apply_control(handles["stage_c"], controlnets["canny"], control)
    stage_c = apply_ip_adapter(stage_c, adapter, given["adapter's pictures"], 0.8, mask=given["adapter's mask"])
    latent = stages.empty_latent(stage_c, *SIZE, batch)
    latent = replace(latent, samples=torch.ones_like(latent.samples), mask=given["latent mask"])
    pictures = {"pictures": given["image prompt"], "negative_pictures": given["negative image prompt"]}
    settings = stages.SamplingSettings(steps=3)
    made = stages.sample_stage_c(
        stage_c, given["prompt"], given["negative"], latent, seed=seed, settings=settings, **pictures
    )
    return made.samples


def only(values, index):
    """The part of each input that is for one picture."""
    return {
        name: TextCondition(*(part[index : index + 1] for part in value))
        if isinstance(value, TextCondition)
        else value[index : index + 1]
        for name, value in values.items()
    }


@pytest.mark.parametrize("single", [None, *inputs_of(1)])
def test_one_of_each_serves_all_and_one_per_picture_is_its_own(handles, controlnets, adapter, single):
    """Each picture of the batch is the one that is made alone of its own inputs; `single` comes once for all."""
    given = inputs_of(BATCH)
    if single:
        given[single] = only(given, 0)[single]
    made = sample_with(handles, controlnets, adapter, given)
    for index in range(BATCH):
        alone = only(given, index) | ({single: given[single]} if single else {})
        near(made[index : index + 1], sample_with(handles, controlnets, adapter, alone, 1, 5 + index))


WORDS = {
    "prompt": r"prompt has the shape \(2, 20, 64\)",
    "negative": r"negative prompt has the shape \(2, 20, 64\)",
    "image prompt": r"image embedding has the shape \(2, 2, 24\)",
    "negative image prompt": r"image embedding has the shape \(2, 1, 24\)",
    "control": "given 2 controls and 3 pictures are made, expected 1 or 3",
    "adapter's pictures": "given 2 pictures and 3 pictures are made, expected 1 or 3",
    "adapter's mask": "given 2 masks and 3 pictures are made, expected 1 or 3",
    "latent mask": r"mask has the shape \(2, 1, 12, 16\), expected .* n = 1 or 3",
}


@pytest.mark.parametrize("name", inputs_of(1))
def test_another_number_is_refused_with_both_numbers(handles, controlnets, adapter, name):
    given = inputs_of(1) | {name: inputs_of(2)[name]}
    with pytest.raises(ValueError, match=WORDS[name]) as caught:
        sample_with(handles, controlnets, adapter, given)
    assert "3" in str(caught.value)


def test_hidden_and_pooled_text_of_other_numbers_are_refused(handles, controlnets, adapter):
    given = inputs_of(1)
    given["prompt"] = given["prompt"]._replace(pooled=noise(2, POOLED_WIDTH))
    with pytest.raises(ValueError, match=r"pooled prompt has the shape \(2, 1, 32\), .* batch of 1 or 3"):
        sample_with(handles, controlnets, adapter, given)


def stage_b(handles, batch=BATCH, start=None, prompt=1, negative=1):
    prior = Latent(noise(batch, 16, 3, 3, seed=11), 128, 96)
    start = None if start is None else Latent(noise(start, 4, 24, 32, seed=12))
    settings = stages.SamplingSettings(steps=2, start=1.0 if start is None else 0.5)
    prompts = text(prompt, 1), text(negative, 3)
    made = stages.sample_stage_b(handles["stage_b"], prior, *prompts, seed=5, settings=settings, start_latent=start)
    return made.samples


def test_stage_b_takes_one_start_latent_and_prompt_or_one_per_picture(handles):
    for counts in ({"start": 1}, {"start": BATCH}, {"prompt": BATCH}, {"negative": BATCH}):
        assert len(stage_b(handles, **counts)) == BATCH
    one, each = stage_b(handles, start=1), stage_b(handles, start=BATCH)
    near(one[:1], each[:1])
    differ(one[1:], each[1:])
    with pytest.raises(ValueError, match=r"start_latent has batch, height and width \[2, 24, 32\] .* \[3, 24, 32\]"):
        stage_b(handles, start=2)
    with pytest.raises(ValueError, match=r"pooled prompt has the shape \(2, 1, 32\), .* batch of 1 or 3"):
        stage_b(handles, prompt=2)
    with pytest.raises(ValueError, match=r"pooled negative prompt has the shape \(2, 1, 32\), .* batch of 1 or 3"):
        stage_b(handles, negative=2)
