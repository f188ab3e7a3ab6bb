"""Weights of 8 bits as they are loaded: from every kind of file, in little memory, by every loader."""

import pytest
import torch
from memory_kit import Peak
from nodes_kit import load as load_node
from nodes_kit import run
from quantized_kit import FORMATS, FUSED, LAST, OUT, predicted, relative, saved_stage_c
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stable_cascade_nodes.cascade_ops import handles as handles_module
from stable_cascade_nodes.cascade_ops.catalog import bundled
from stable_cascade_nodes.cascade_ops.checkpoints import CheckpointError, inspect_file, load
from stable_cascade_nodes.cascade_ops.checkpoints.saving import save
from stable_cascade_nodes.cascade_ops.handles import choose_dtype, load_stage
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.quantized import eight_bit_size, matrices, quantized

EIGHT_BIT_FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2]


class RealPeak(Peak):
    """The most bytes alive at once of tensors that have memory."""

    def __init__(self):
        super().__init__(torch.nn.Module())

    def _see(self, storage):
        if storage.device.type != "meta":
            super()._see(storage)


@pytest.mark.parametrize("choice", FORMATS)
@pytest.mark.parametrize("stage", ["stage_c", "stage_b"])
def test_never_more_than_a_matrix_is_float(stage, choice):
    path = bundled(stage).path
    float_bytes = load_stage(path, stage, dtype="float32").size_in_bytes
    with RealPeak() as peak:
        handle = load_stage(path, stage, dtype=choice)
    small = handle.size_in_bytes
    assert small == eight_bit_size(inspect_file(path), torch.float32) < 0.6 * float_bytes
    largest = max(weight.numel() for weight in handle.network.parameters())
    # As stored, float32, its absolute values, divided, rounded.
    assert peak.most <= small + 5 * 4 * largest
    assert small + 5 * 4 * largest < 0.85 * float_bytes


@pytest.mark.parametrize("choice", FORMATS)
def test_the_handle_says_what_it_is(tmp_path, choice):
    path = saved_stage_c(tmp_path / "c.safetensors")
    handle = load_stage(path, "stage_c", dtype=choice)
    word = choice.removesuffix(" weights")
    assert (handle.weights, handle.dtype) == (word, torch.float32)
    assert handle.title == f"Stage C custom (c.safetensors, {word} weights)"
    plain = load_stage(path, "stage_c")
    assert plain.weights == "" and plain.title == "Stage C custom (c.safetensors)"
    stored = sum(tensor.numel() * tensor.element_size() for tensor in handle.network.state_dict().values())
    assert handle.size_in_bytes == stored < plain.size_in_bytes


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_what_the_file_holds_is_rounded_once(tmp_path, stored):
    path = saved_stage_c(tmp_path / "c.safetensors", stored)
    with safe_open(path, "pt") as file:
        values, scale = quantized(file.get_tensor(FUSED), torch.int8)
    module = load_stage(path, "stage_c", dtype="int8 weights").module
    assert torch.equal(module.get_parameter(FUSED), values)
    assert torch.equal(module.get_buffer(FUSED + "_scale"), scale)


def test_query_key_and_value_apart(tmp_path):
    weights = load_file(saved_stage_c(tmp_path / "c.safetensors"))
    whole = load_stage(tmp_path / "c.safetensors", "stage_c", dtype="int8 weights").module
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        metadata = file.metadata()
    for name in [name for name in weights if ".attn.in_proj_" in name]:
        block, leaf = name.split(".attn.in_proj_")
        thirds = zip("qkv", weights.pop(name).chunk(3), strict=True)
        weights |= {f"{block}.attn.to_{letter}.{leaf}": third.clone() for letter, third in thirds}
    save_file(weights, tmp_path / "split.safetensors", metadata)
    split = load_stage(tmp_path / "split.safetensors", "stage_c", dtype="int8 weights").module
    assert torch.equal(split.get_parameter(FUSED), whole.get_parameter(FUSED))


# Files of 8-bit floats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EIGHT_BIT_FLOATS)
def test_a_file_of_8_bit_floats_keeps_its_bits(tmp_path, kind):
    path = saved_stage_c(tmp_path / "c.safetensors", kind)
    handle = load_stage(path, "stage_c", dtype="float8 weights")
    stored = load_file(path)
    every = matrices("stage_b", stored)  # those of the last level too: nothing is lost by it
    assert LAST in every and OUT in every
    for name in every:
        assert handle.module.get_parameter(name).dtype == kind
        assert torch.equal(handle.module.get_parameter(name).view(torch.uint8), stored[name].view(torch.uint8))
        assert torch.equal(handle.module.get_buffer(name + "_scale"), torch.ones(len(stored[name])))
    assert handle.module.clf[1].weight.dtype == torch.float32
    exact = load_stage(path, "stage_c", dtype="float32")
    torch.testing.assert_close(predicted(handle.module), predicted(exact.module), rtol=1e-5, atol=1e-6)
    assert handle.size_in_bytes == eight_bit_size(inspect_file(path), torch.float32)
    assert exact.size_in_bytes - handle.size_in_bytes > 2.9 * sum(stored[name].numel() for name in every)


def test_a_file_that_is_8_bits_in_part(tmp_path):
    """As trainers advise: all but the last level."""
    path = saved_stage_c(tmp_path / "c.safetensors")
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    small = {name: tensor.to(torch.float8_e5m2) for name, tensor in weights.items() if name == OUT}
    save_file(weights | small, path, metadata)
    module = load_stage(path, "stage_c", dtype="float8 weights").module
    kinds = {name: module.get_parameter(name).dtype for name in (OUT, FUSED, LAST)}
    assert kinds == {OUT: torch.float8_e5m2, FUSED: torch.float8_e4m3fn, LAST: torch.float32}
    with pytest.raises(
        CheckpointError, match=r"^c.safetensors \(Stage C custom\) holds 8-bit floats, which int8 would"
    ):
        load_stage(path, "stage_c", dtype="int8 weights")


# Refused -------------------------------------------------------------------------------------------------------


def test_other_stages_have_none(small_family):
    for stage in ("stage_a", "text_encoder", "previewer"):
        with pytest.raises(CheckpointError, match="weights of 8 bits were asked for, expected Stage C and Stage B"):
            load_stage(small_family.paths[stage], stage, dtype="int8 weights")


def test_what_is_no_number_is_refused(tmp_path):
    def spoil(model):
        model.get_parameter(OUT)[3, 2] = float("nan")

    path = saved_stage_c(tmp_path / "c.safetensors", change=spoil)
    with pytest.raises(CheckpointError, match=rf"^c.safetensors .*8 bits at '{OUT}': it holds values that are no fin"):
        load_stage(path, "stage_c", dtype="int8 weights")


def test_they_are_not_saved_as_a_checkpoint(tmp_path):
    handle = load_stage(saved_stage_c(tmp_path / "c.safetensors"), "stage_c", dtype="int8 weights")
    with pytest.raises(CheckpointError, match=r"Stage C to be written to d.safetensors has weights of 8 bits"):
        save(handle.module, tmp_path / "d.safetensors", stage="stage_c", config=handle.info.config)
    assert not (tmp_path / "d.safetensors").exists()


# Loaders -------------------------------------------------------------------------------------------------------


def test_what_they_are_computed_in(monkeypatch, tmp_path):
    info = inspect_file(saved_stage_c(tmp_path / "c.safetensors"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(handles_module, "_SMALL_PARAMETERS", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for choice in FORMATS:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert choose_dtype(choice, info, cuda) == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert choose_dtype(choice, info, cuda) == torch.float32
        assert choose_dtype(choice, info, cuda, torch.float16) == torch.float16
        small = eight_bit_size(info, torch.float32)
        # float32 on a CPU as long as the small weights fit.
        for memory, expected in ((2 * small, torch.float32), (2 * small - 1, torch.bfloat16)):
            monkeypatch.setattr(handles_module, "_main_memory", lambda memory=memory: memory)
            assert choose_dtype(choice, info, cpu) == expected
            assert choose_dtype("auto", info, cpu) == torch.bfloat16


def test_a_host_is_asked_what_they_are_computed_in(tmp_path):
    path = saved_stage_c(tmp_path / "c.safetensors")
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handles_module, "_SMALL_PARAMETERS", 0)
        answer = lambda stage, parameters: asked.append(stage) or torch.bfloat16  # noqa: E731
        handle = load_stage(path, "stage_c", dtype="int8 weights", host_dtype=answer)
        load_stage(path, "stage_c", dtype="float32", host_dtype=answer)
    assert asked == ["stage_c"] and handle.dtype == torch.bfloat16
    assert handle.module.get_parameter(LAST).dtype == torch.bfloat16
    assert relative(predicted(handle.module).float(), predicted(load(path, "stage_c")[0])) < 0.05


@pytest.mark.parametrize("choice", FORMATS)
def test_loaders_of_one_stage(host, choice):
    word = choice.removesuffix(" weights")
    for node in ("CascadeLoadStageC", "CascadeLoadStageB"):
        answer = run(node, file="auto", dtype=choice)
        assert answer["result"][0].weights == word
        assert f", {word} weights), float32" in answer["ui"]["text"][0]


def test_the_text_encoder_does_not_offer_them():
    from stable_cascade_nodes import NODE_CLASS_MAPPINGS

    def choices(node):
        return NODE_CLASS_MAPPINGS[node].INPUT_TYPES()["optional"]["dtype"][0]

    for node in ("CascadeLoadStageC", "CascadeLoadStageB", "CascadeLoadCheckpoint"):
        assert choices(node)[-2:] == list(FORMATS)[::-1]
    assert choices("CascadeLoadTextEncoder") == choices("CascadeLoadStageC")[:-2]


def test_a_combined_checkpoint_has_them_where_there_are_any(combined, host, tmp_path, monkeypatch):
    for name, path in combined.items():
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).write_bytes(path.read_bytes())
    monkeypatch.setattr(host, "root", tmp_path)
    answer = run(
        "CascadeLoadCheckpoint", stage_c_file="c.safetensors", stage_b_file="b.safetensors", dtype="int8 weights"
    )
    found = {handle.stage: handle.weights for handle in answer["result"][:5]}
    assert found == {"stage_c": "int8", "text_encoder": "", "stage_b": "int8", "stage_a": "", "previewer": ""}


def test_the_pipeline_has_them_where_there_are_any():
    pipeline = CascadePipeline.load("tiny", device="cpu", dtype="float8 weights")
    assert (pipeline.stage_c.weights, pipeline.stage_b.weights) == ("float8", "float8")
    assert pipeline.text_encoder.weights == pipeline.stage_a.weights == ""


def test_a_host_that_keeps_weights_on_the_device_is_told_their_size(tmp_path):
    path = saved_stage_c(tmp_path / "c.safetensors")
    asked = []
    handle = load_stage(path, "stage_c", dtype="int8 weights", resident=lambda size: bool(asked.append(size)))
    assert asked == [handle.size_in_bytes]


def test_default_loading_is_float(host):
    assert load_node("CascadeLoadStageC").weights == ""
