"""The training nodes: they learn, what they give can be sampled at once, and is a file that loads."""

from types import SimpleNamespace

import pytest
import torch
from host_kit import node
from PIL import Image
from safetensors.torch import load_file
from training_nodes_kit import TrainingHost, drawing, sampling, write_folder

from stable_cascade_nodes.cascade_ops import catalog
from stable_cascade_nodes.cascade_ops.checkpoints import inspect_file, load
from stable_cascade_nodes.cascade_ops.control import Faces, write_faces
from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.training.data import Encoders
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import Settings
from stable_cascade_nodes.cascade_ops.training.stage_c_loss import StageCLoss, empty_prompt

CAPTION, STEPS = "a [box] on a white background", 30


@pytest.fixture
def bench(tmp_path):
    return TrainingHost(tmp_path)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA with a new token, learned from one picture at 128 pixels; its outputs, and a sample with and without."""
    bench = TrainingHost(tmp_path_factory.mktemp("lora"))
    samples = {**sampling(("c", 0), ("t", 0), CAPTION, "before"), **sampling(("n", 0), ("n", 1), CAPTION, "after")}
    random_state = torch.get_rng_state()
    stage_c, encoder, file, curve, base, before, after = bench.trained(
        "CascadeTrainLoRA",
        (0, 1, 2, 3, ("c", 0), ("before", 0), ("after", 0)),
        samples,
        captions=CAPTION,
        steps=STEPS,
        resolution=128,
        learning_rate=4e-3,
        batch_size=2,
        rank=8,
        alpha=8.0,
        token="[box]",
        initial_words="square",
    )
    same_random_numbers = torch.equal(random_state, torch.get_rng_state())
    return SimpleNamespace(**locals())


def error(stage_c, text_encoder, caption):
    """Mean error of a Stage C on the picture that was learned, over the same noise each time."""
    given = {stage: load_stage(catalog.bundled(stage).path, stage) for stage in ("text_encoder", "latent_encoder")}
    encoders = Encoders(Parts(given=given))
    latent = encoders.stage_c_latent(drawing().permute(2, 0, 1)[None]).expand(32, -1, -1, -1)
    hidden, pooled = text_encoder.module.encode_captions([caption])
    loss = StageCLoss(Settings("stage_c", ""), empty_prompt(given["text_encoder"]), 1)
    picture = torch.zeros(32, 1, stage_c.module.clip_img_mapper.in_features)
    text = hidden.expand(32, -1, -1), pooled[:, None].expand(32, -1, -1), picture
    with torch.no_grad():
        result = loss.loss(lambda x, r: stage_c.module(x, r, *text), latent, Draws(0, 0, range(32)))
    return result.error.mean().item()


def test_a_lora_makes_the_error_on_its_picture_smaller(lora):
    before = error(lora.base, lora.encoder, CAPTION.replace("[box]", "square"))
    after = error(lora.stage_c, lora.encoder, CAPTION)
    assert after < 0.9 * before


def test_what_was_learned_is_sampled_in_the_same_graph(lora):
    assert lora.curve.shape == (1, 400, 640, 3) and 0 <= lora.curve.min() < lora.curve.max() <= 1
    before, after = lora.before["samples"], lora.after["samples"]
    assert before.shape == after.shape and after.isfinite().all()
    assert (before - after).abs().mean() > 0.05 * before.abs().mean()


def test_the_models_on_the_wires_stay_as_they_are(lora):
    fresh = load_stage(catalog.bundled("stage_c").path, "stage_c").module.state_dict()
    assert all(torch.equal(weight, fresh[name]) for name, weight in lora.base.module.state_dict().items())
    changed = lora.stage_c.module.state_dict()
    assert any(not torch.equal(weight, fresh[name]) for name, weight in changed.items())
    assert lora.same_random_numbers


def test_the_files_are_where_loaders_list_them(lora):
    assert lora.file == "mine.safetensors"
    assert lora.bench.files("loras") == ["mine.safetensors"]
    assert lora.bench.files("embeddings") == ["box.safetensors"]
    nodes = {
        "l": ("CascadeLoadLoRA", {"stage_c": ["c", 0], "text_encoder": ["t", 0], "file": lora.file, "strength": 1.0}),
        **sampling(("l", 0), ("l", 1), CAPTION),
        **sampling(("l", 0), ("t", 0), CAPTION.replace("[box]", "embedding:box"), "z"),
    }
    status, (latent, by_embedding) = lora.bench.run(nodes, [("s", 0), ("z", 0)])
    assert status["completed"]
    torch.testing.assert_close(latent["samples"], lora.after["samples"])
    torch.testing.assert_close(by_embedding["samples"], lora.after["samples"])


def test_progress_previews_and_what_the_node_says(bench):
    bench.trained("CascadeTrainLoRA", captions=CAPTION, token="[box]", initial_words="square")
    steps = [
        (data["value"], data["max"]) for kind, data in bench.messages if kind == "progress" and data["node"] == "n"
    ]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    previews = [data["image"][1].size for kind, data in bench.messages if kind == "preview"]
    assert previews == [(640, 400)] * 3
    assert len(bench.rooms) == 1
    said = " ".join(bench.shown["text"])
    assert "mine.safetensors: " in said and "changes applied" in said and "embedding:box" in said and "3 steps" in said
    (image,) = bench.shown["images"]
    with Image.open(bench.root / image["type"] / image["filename"]) as picture:
        assert picture.size == (640, 400)


def test_an_equal_run_is_cached_and_another_one_gets_a_number(bench):
    bench.trained("CascadeTrainLoRA", steps=1)
    bench.trained("CascadeTrainLoRA", steps=1)
    assert bench.files("loras") == ["mine.safetensors"]
    first = (bench.root / "models/loras/mine.safetensors").read_bytes()
    assert bench.trained("CascadeTrainLoRA", (2,), steps=1, seed=1) == ["mine_2.safetensors"]
    assert bench.files("loras") == ["mine.safetensors", "mine_2.safetensors"]
    assert (bench.root / "models/loras/mine.safetensors").read_bytes() == first
    # Nothing is left of the run but the file and the picture of its loss.
    assert not list((bench.root / "temp").glob("cascade_training_*/*"))
    assert not (bench.root / "output").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stage_c_in_another_number_format(bench, dtype):
    nodes = {"h": ("CascadeLoadStageC", {"file": "tiny (bundled)", "dtype": dtype})}
    (stage_c,) = bench.trained("CascadeTrainLoRA", (0,), nodes, stage_c=["h", 0])
    assert stage_c.dtype == getattr(torch, dtype)
    tensors = load_file(bench.root / "models/loras/mine.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_up" in name)


# Folders -------------------------------------------------------------------------------------------------------


def test_pictures_of_a_folder(bench):
    folder = write_folder(bench.root, ["an orange square", "a teal square"])
    files = [
        bench.trained("CascadeTrainLoRA", (2,), pictures=None, folder=path, captions=captions)[0]
        for path, captions in (("boxes", ""), (str(folder), "a square"))
    ]
    first, second = (load_file(bench.root / "models/loras" / name) for name in files)
    assert any(not torch.equal(first[name], second[name]) for name in first), "the caption had no effect"


def test_a_caption_for_all_pictures_or_one_for_each(bench):
    nodes = {"p": ("Pictures", {"count": 2})}
    same = bench.trained("CascadeTrainLoRA", (2,), nodes, captions="a square\n\n a square ")[0]
    all_of_them = bench.trained("CascadeTrainLoRA", (2,), nodes, captions="a square")[0]
    first, second = (load_file(bench.root / "models/loras" / name) for name in (same, all_of_them))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ControlNets and IP-Adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["canny", "inpainting", "super_resolution"])
def test_a_controlnet_steers_at_once(bench, kind):
    control = {
        "canny": ("CascadeCannyControl", {"image": ["p", 0], "low": 100, "high": 200, "side": 0}),
        "inpainting": ("CascadeInpaintControl", {"image": ["p", 0], "mask": ["m", 0]}),
        "super_resolution": ("CascadeSuperResolutionControl", {"latent_encoder": ["e", 0], "image": ["p", 0]}),
    }
    mask = node(lambda self: (torch.ones(1, 128, 128),), returns=("MASK",))
    bench.host.registry.add({"Mask": mask})
    apply = {
        "stage_c": ["c", 0],
        "controlnet": ["n", 0],
        "control": ["x", 0],
        "strength": 1.0,
        "start": 1.0,
        "end": 0.0,
    }
    nodes = {
        "m": ("Mask", {}),
        "x": control[kind],
        "a": ("CascadeApplyControlNet", apply),
        **sampling(("a", 0), ("t", 0), "a square", "with"),
        **sampling(("c", 0), ("t", 0), "a square", "without"),
    }
    keep = (0, 1, ("with", 0), ("without", 0))
    controlnet, file, steered, free = bench.trained("CascadeTrainControlNet", keep, nodes, kind=kind, resolution=128)
    assert steered["samples"].isfinite().all()
    assert not torch.equal(steered["samples"], free["samples"])
    assert file == "mine.safetensors" and controlnet.name == file
    path = bench.root / "models/controlnet" / file
    assert inspect_file(path).control["kind"] == controlnet.info.control["kind"] == kind
    saved = load(path, "controlnet")[0].state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in controlnet.module.state_dict().items())


def test_a_controlnet_for_faces_of_a_folder(bench):
    folder = write_folder(bench.root, ["", ""])
    face = Faces(torch.tensor([[10.0, 10.0, 60.0, 60.0]]), torch.ones(1, 8), 96, 96)
    write_faces(folder / "faces.safetensors", {"boxes/0.png": face, "boxes/1.png": face})
    run = {"kind": "identity", "pictures": None, "folder": "boxes", "faces": "boxes/faces.safetensors"}
    (controlnet,) = bench.trained("CascadeTrainControlNet", (0,), captions="a face", resolution=128, **run)
    assert controlnet.info.control["kind"] == "identity" and controlnet.info.config["c_in"] == 8


def test_an_ip_adapter_reads_a_picture_at_once(bench):
    applied = {
        "stage_c": ["c", 0],
        "ip_adapter": ["n", 0],
        "image_encoder": ["i", 0],
        "image": ["p", 0],
        "weight": 1.0,
        "start": 1.0,
        "end": 0.0,
    }
    nodes = {
        "a": ("CascadeApplyIPAdapter", applied),
        **sampling(("a", 0), ("t", 0), "a square", "with"),
        **sampling(("c", 0), ("t", 0), "a square", "without"),
    }
    keep = (0, 1, ("with", 0), ("without", 0))
    adapter, file, shown, free = bench.trained("CascadeTrainIPAdapter", keep, nodes, tokens=2, resolution=128)
    assert shown["samples"].isfinite().all() and not torch.equal(shown["samples"], free["samples"])
    assert bench.files("controlnet") == [file] and adapter.info.config["tokens"] == 2
    assert load(bench.root / "models/controlnet" / file, "ip_adapter")[1].stage == "ip_adapter"
