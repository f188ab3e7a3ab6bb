"""The nodes for IP-Adapters and LoRAs, called by hand and with ControlNets in a graph."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from attachment_kit import controlled, noise, samples
from nodes_kit import load, run, sample_c
from PIL import Image
from test_pipeline import GRAPH, run_graph


@pytest.fixture
def host(fuller_host):
    return fuller_host


def applied(image, weight=1.0, **more):
    inputs = {
        "stage_c": load("CascadeLoadStageC"),
        "ip_adapter": load("CascadeLoadIPAdapter"),
        "image_encoder": load("CascadeLoadImageEncoder"),
        "image": image,
        "weight": weight,
        "start": 1.0,
        "end": 0.0,
    }
    return run("CascadeApplyIPAdapter", **inputs | more)


def test_an_ip_adapter_reads_the_picture(host):
    image = noise(1, 60, 100, 3)
    answer = applied(image)
    assert answer["ui"]["text"] == ["IP-Adapter custom (ip.safetensors) at 1"]
    plain, _ = sample_c(host)
    first, _ = sample_c(host, stage_c=answer["result"][0])
    assert host.placings[-1][0] == ["stage_c", "ip_adapter"]
    second, _ = sample_c(host, stage_c=applied(noise(1, 60, 100, 3, seed=1) ** 3)["result"][0])
    for other in (plain, second):
        assert (samples(first) - samples(other)).abs().max() > 1e-4
    off, _ = sample_c(host, stage_c=applied(image, weight=0.0)["result"][0])
    assert torch.equal(samples(off), samples(plain))
    together = applied(noise(3, 60, 100, 3))
    assert together["ui"]["text"] == ["IP-Adapter custom (ip.safetensors) at 1, 3 pictures read together"]
    assert together["result"][0].ip_adapters[0].embeddings.shape == (1, 3, 24)
    sample_c(host, stage_c=controlled(stage_c=together["result"][0])["result"][0])
    assert host.placings[-1][0] == ["stage_c", "controlnet", "ip_adapter"]


def test_an_ip_adapter_acts_where_and_how_its_inputs_say(host):
    image = noise(2, 60, 100, 3)

    def made(image, **more):
        return samples(sample_c(host, stage_c=applied(image, **more)["result"][0])[0])

    whole = made(image)
    neutral = {"combine": "concatenate", "down_outer": 1, "down_inner": 1, "up_inner": 1, "up_outer": 1}
    assert torch.equal(made(image, **neutral, mask=torch.ones(1, 60, 100)), whole)
    off = samples(sample_c(host)[0])
    groups = ("down_outer", "down_inner", "up_inner", "up_outer")
    assert torch.equal(made(image, **dict.fromkeys(groups, 0.0)), off)
    assert torch.equal(made(image, mask=torch.zeros(60, 100)), off)
    half = torch.zeros(1, 60, 100)
    half[..., :50] = 1
    changes = [{name: 0.0} for name in groups] + [{"combine": "average"}, {"combine": "one each"}, {"mask": half}]
    results = [made(image[:1] if "one each" in change.values() else image, **change) for change in changes]
    for number, result in enumerate(results):
        assert all((result - other).abs().max() > 1e-4 for other in (whole, off, *results[:number]))

    answer = applied(image, 0.5, mask=half, combine="average", down_outer=0.0)
    assert answer["ui"]["text"] == [
        "IP-Adapter custom (ip.safetensors) at 0.5, block groups 0 1 1 1, 50% of the picture, 2 pictures averaged"
    ]
    assert answer["result"][0].ip_adapters[0].groups == (0, 1, 1, 1)
    each = applied(image, combine="one each")["result"][0]
    assert each.ip_adapters[0].embeddings.shape == (2, 1, 24)
    latent = run("CascadeEmptyLatent", stage_c=each, width=100, height=60, batch_size=2)["result"][0]
    sample_c(host, stage_c=each, latent=latent)
    three = applied(noise(3, 60, 100, 3), combine="one each")["result"][0]
    with pytest.raises(ValueError, match="given 3 pictures and 2 pictures are made, expected 1 or 2"):
        sample_c(host, stage_c=three, latent=latent)


# LoRA ----------------------------------------------------------------------------------------------------------


def lora_file(path, stages=("stage_c",), tokens=()):
    """A LoRA file in ComfyUI's dialect for the small family."""
    from stable_cascade_nodes.cascade_ops.adapters.dialects import write_lora
    from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, LoRAWeights

    generator = torch.Generator().manual_seed(0)
    shapes = {
        "stage_c": {"down_blocks.0.2.attention.attn.out_proj.weight": (64, 64)},
        "text_encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (96, 64)},
    }
    weights = {
        name: LoRAWeights(
            torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator), alpha=2.0
        )
        for stage in stages
        for name, (rows, columns) in shapes[stage].items()
    }
    return write_lora(LoRA(weights, tokens), path)


@pytest.fixture
def loras(host, tmp_path):
    root = shutil.copytree(host.root, tmp_path / "models")
    host.root = root
    return root / "loras"


def test_a_lora_changes_what_goes_through_it_alone(host, loras):
    lora_file(loras / "look.safetensors")
    stage_c = load("CascadeLoadStageC")
    plain, _ = sample_c(host, stage_c=stage_c)
    answer = run("CascadeLoadLoRA", stage_c=stage_c, file="look.safetensors", strength=1.0)
    changed, encoder = answer["result"]
    assert encoder is None
    assert answer["ui"]["text"] == ["Stage C custom (c.safetensors) at 1: 1 of 1 changes applied"]
    first, _ = sample_c(host, stage_c=changed)
    assert (samples(first) - samples(plain)).abs().max() > 1e-3
    assert torch.equal(samples(sample_c(host, stage_c=stage_c)[0]), samples(plain))
    off = run("CascadeLoadLoRA", stage_c=stage_c, file="look.safetensors", strength=0.0)["result"][0]
    assert torch.equal(samples(sample_c(host, stage_c=off)[0]), samples(plain))


def test_a_lora_keeps_what_stage_c_carries(host, loras):
    lora_file(loras / "look.safetensors")
    carried = controlled()["result"][0]
    after = run("CascadeLoadLoRA", stage_c=carried, file="look.safetensors", strength=1.0)["result"][0]
    before = run("CascadeLoadLoRA", stage_c=load("CascadeLoadStageC"), file="look.safetensors", strength=1.0)
    before = controlled(stage_c=before["result"][0])["result"][0]
    results = [samples(sample_c(host, stage_c=handle)[0]) for handle in (after, before)]
    assert torch.equal(*results)


def test_a_lora_for_the_text_encoder_wants_it(host, loras):
    from stable_cascade_nodes.cascade_ops.adapters.tokens import LearnedToken

    token = LearnedToken("[look]", vectors=torch.ones(2, 64))
    lora_file(loras / "both.safetensors", ("stage_c", "text_encoder"), (token,))
    lora_file(loras / "text.safetensors", ("text_encoder",))
    stage_c, encoder = load("CascadeLoadStageC"), load("CascadeLoadTextEncoder")

    def encoded(handle, text):
        return run("CascadeEncodeText", text_encoder=handle, text=text)["result"][0][0][0]

    alone = run("CascadeLoadLoRA", stage_c=stage_c, file="both.safetensors", strength=1.0)
    assert "connect the text encoder" in alone["ui"]["text"][-1] and "[look]" in alone["ui"]["text"][-1]
    answer = run("CascadeLoadLoRA", stage_c=stage_c, file="both.safetensors", strength=1.0, text_encoder=encoder)
    changed = answer["result"][1]
    assert answer["ui"]["text"][-1] == "learned words: [look]" and len(answer["ui"]["text"]) == 3
    assert not torch.equal(encoded(changed, "red"), encoded(encoder, "red"))
    assert not torch.equal(encoded(changed, "a [look]"), encoded(encoder, "a [look]"))
    off = run(
        "CascadeLoadLoRA",
        stage_c=stage_c,
        file="both.safetensors",
        strength=1.0,
        text_encoder=encoder,
        text_strength=0.0,
    )["result"][1]
    assert torch.equal(encoded(off, "a [look]"), encoded(encoder, "a [look]"))
    with pytest.raises(ValueError, match=r"text.safetensors changes nothing of Stage C: connect the text encoder"):
        run("CascadeLoadLoRA", stage_c=stage_c, file="text.safetensors", strength=1.0)


def test_a_lora_on_weights_of_comfyuis_own_is_refused(host, loras):
    from stable_cascade_nodes.nodes.comfyui_layers import LentAttention, rebuilt

    lora_file(loras / "look.safetensors")
    stage_c = load("CascadeLoadStageC")

    def lend(name, layer):
        if type(layer).__name__ != "Attention":
            return None
        return LentAttention(layer.nhead, 0.0, [torch.nn.Linear(64, 64) for _ in range(3)], layer.out_proj)

    lent = replace(stage_c, module=rebuilt(stage_c.module, lend))
    with pytest.raises(ValueError, match="runs on the weights of ComfyUI's own model"):
        run("CascadeLoadLoRA", stage_c=lent, file="look.safetensors", strength=1.0)


# In a graph ----------------------------------------------------------------------------------------------------


def test_a_graph_with_all_of_them(more_models, tmp_path):
    shutil.copytree(more_models, tmp_path / "models")
    lora_file(tmp_path / "models/loras/look.safetensors")
    graph = copy.deepcopy(GRAPH)
    sampler = next(number for number, node in graph.items() if node["class_type"] == "CascadeSampleStageC")
    latent = next(number for number, node in graph.items() if node["class_type"] == "CascadeEmptyLatent")
    size = {"width": 128, "height": 128, "batch_size": 1}
    graph[latent]["inputs"] |= size
    for node in graph.values():
        if node["class_type"].startswith("CascadeSample"):
            node["inputs"] |= {"steps": 2}

    def add(number, kind, **inputs):
        graph[number] = {"class_type": kind, "inputs": inputs}

    (tmp_path / "input").mkdir()
    Image.new("RGB", (128, 128), (255, 128, 0)).save(tmp_path / "input/orange.png")
    add("101", "LoadImage", image="orange.png")
    add("102", "CascadeCannyControl", image=["101", 0], low=100, high=200, side=224)
    add("103", "CascadeLoadControlNet", file="auto (canny)")
    add("104", "CascadeLoadLoRA", stage_c=graph[sampler]["inputs"]["stage_c"], file="look.safetensors", strength=0.5)
    add(
        "105",
        "CascadeApplyControlNet",
        stage_c=["104", 0],
        controlnet=["103", 0],
        control=["102", 0],
        strength=1.0,
        start=1.0,
        end=0.2,
    )
    add("106", "CascadeLoadIPAdapter", file="auto")
    add("107", "CascadeLoadImageEncoder", file="auto")
    add(
        "108",
        "CascadeApplyIPAdapter",
        stage_c=["105", 0],
        ip_adapter=["106", 0],
        image_encoder=["107", 0],
        image=["101", 0],
        weight=0.7,
        start=1.0,
        end=0.0,
    )
    graph[sampler]["inputs"]["stage_c"] = ["108", 0]
    (picture,), entry = run_graph(tmp_path, graph)
    assert picture.size == (128, 128)
    said = entry["outputs"][sampler]["text"]
    assert [line for line in said if line.startswith("with ")] == [
        "with ControlNet custom canny (ca.safetensors) at 1 from 1 to 0.2",
        "with IP-Adapter custom (ip.safetensors) at 0.7",
    ]
