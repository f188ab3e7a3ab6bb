"""Loaded stages: where they are, and what they run in."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stable_cascade_nodes.cascade_ops.handles import choose_dtype, load_stage


def test_a_handle_moves_as_a_copy(handles):
    for stage in ("stage_c", "previewer", "text_encoder"):
        handle = handles[stage]
        assert handle.to("cpu") is handle
        moved = handle.to("meta")
        assert moved is not handle and moved.device.type == "meta" and handle.device.type == "cpu"
        assert moved.name == handle.name and moved.info is handle.info
        module = moved.module if stage != "text_encoder" else moved.module.module
        assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def info_of(stage, parameters):
    return SimpleNamespace(
        stage=stage, parameters=parameters, path=SimpleNamespace(name="big.safetensors"), title="3.6B"
    )


def test_a_dtype_that_is_asked_for_is_used():
    cpu = torch.device("cpu")
    full, lite = info_of("stage_c", 3_589_103_632), info_of("stage_c", 1_030_785_040)
    for model in (full, lite):
        assert choose_dtype("float16 (fixed weights)", model, cpu) == torch.float16
        assert choose_dtype("float16", model, cpu) == torch.float16
    with pytest.raises(ValueError, match="dtype 'half' is unknown"):
        choose_dtype("half", lite, cpu)


def test_auto_dtype(monkeypatch):
    from stable_cascade_nodes.cascade_ops import handles

    full, small = info_of("stage_c", 3_589_103_632), info_of("stage_c", 1_000_000)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for memory, expected in ((64e9, torch.float32), (16e9, torch.bfloat16), (None, torch.float32)):
        monkeypatch.setattr(handles, "_main_memory", lambda memory=memory: memory)
        assert choose_dtype("auto", full, cpu) == expected
    assert choose_dtype("auto", small, cpu) == torch.float32
    for capability, expected in (((8, 0), torch.bfloat16), ((7, 5), torch.float32)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        assert choose_dtype("auto", full, cuda) == expected
        assert choose_dtype("auto", small, cuda) == torch.float32


def test_dtype_is_that_of_the_weights(small_family):
    for stage in ("stage_c", "text_encoder"):
        assert load_stage(small_family.paths[stage], stage, dtype="bfloat16").dtype == torch.bfloat16


def test_small_models_run_on_one_thread_and_the_number_comes_back(handles):
    from stable_cascade_nodes.cascade_ops.threads import threads_for

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(RuntimeError, match="stop"), threads_for(handles["stage_c"]):
            assert torch.get_num_threads() == 1
            raise RuntimeError("stop")
        assert torch.get_num_threads() == 3
        large = replace(handles["stage_c"], info=replace(handles["stage_c"].info, parameters=10**9))
        with threads_for(large):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
