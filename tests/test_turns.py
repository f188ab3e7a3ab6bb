"""A pipeline whose stages are all loaded, or each only for its turn: the same picture, and who decides."""

import gc
import weakref

import numpy as np
import pytest
import torch

from stable_cascade_nodes.cascade_ops import memory, turns
from stable_cascade_nodes.cascade_ops.handles import StageHandle
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.turns import StageFile, Turns, changed, in_turns

CPU = torch.device("cpu")
STAGES = ("text_encoder", "stage_c", "stage_b", "stage_a")


def generate(pipeline):
    picture = pipeline.generate("red", steps_c=2, steps_b=1, width=100, height=60)[0]
    return np.asarray(picture)


@pytest.fixture
def files(small_family):
    pipeline = CascadePipeline.load(small_family.models, device="cpu", memory="one stage")
    return {stage: getattr(pipeline, stage) for stage in STAGES}


def test_one_stage_is_loaded_at_a_time_and_the_picture_is_the_same(small_family, monkeypatch):
    alive, most, real = [], [], StageFile.load

    def load(self, resident):
        handle = real(self, resident)
        gc.collect()
        alive.append((self.stage, weakref.ref(handle.network)))
        most.append([stage for stage, network in alive if network() is not None])
        return handle

    monkeypatch.setattr(StageFile, "load", load)
    whole = CascadePipeline.load(small_family.models, device="cpu", memory="resident")
    assert [each[-1] for each in most] == list(STAGES) and len(most[-1]) == 4
    expected = generate(whole)
    del whole
    alive.clear(), most.clear()
    pipeline = CascadePipeline.load(small_family.models, device="cpu", memory="one stage")
    assert not alive and isinstance(pipeline.stage_c, StageFile)
    assert np.array_equal(generate(pipeline), expected)
    assert most == [[stage] for stage in STAGES]
    assert all(network() is None for _, network in alive)
    assert np.array_equal(generate(pipeline), expected)


@pytest.mark.parametrize("mode", ["auto", "resident"])
def test_where_there_is_room_all_stages_stay(small_family, mode):
    pipeline = CascadePipeline.load(small_family.models, device="cpu", memory=mode)
    assert all(isinstance(getattr(pipeline, stage), StageHandle) for stage in STAGES)
    assert isinstance(CascadePipeline.load(small_family.models, device="cpu").stage_c, StageHandle)


def test_auto_decides_from_what_is_free(files):
    device, total = torch.device("meta"), sum(file.size for file in files.values())
    ample, tight = 2 * total + turns.MARGIN, 2 * total + turns.MARGIN - 1

    def loaded(mode, on_device, main=None):
        free = {"meta": on_device, "cpu": main}
        _, stages = in_turns(there, device, mode, lambda device: free[device.type])
        return {stage: each.device.type if isinstance(each, StageHandle) else "file" for stage, each in stages.items()}

    there = {stage: StageFile(f.path, stage, f.name, f.dtype, device) for stage, f in files.items()}
    assert set(loaded("auto", ample, tight).values()) == {"meta"} == set(loaded("auto", None).values())
    assert set(loaded("auto", tight, ample).values()) == {"cpu"}
    assert set(loaded("auto", tight, tight).values()) == {"file"}
    assert set(loaded("resident", 0, 0).values()) == {"meta"}
    assert set(loaded("one stage", ample, ample).values()) == set(loaded("streamed", ample, ample).values()) == {"cpu"}
    assert set(loaded("streamed", ample, tight).values()) == {"file"}
    free = {"free": lambda _: tight}
    assert all(isinstance(each, StageFile) for each in in_turns(files, CPU, "auto", **free)[1].values())


def test_the_size_is_told_from_the_header(files):
    for file in files.values():
        assert file.size == pytest.approx(file.load(False).size_in_bytes, rel=0.02)


def test_streaming_on_a_cpu_and_unknown_modes_are_refused(small_family, monkeypatch):
    with pytest.raises(ValueError, match=r"'streamed', which copies weights to a GPU .* choose 'one stage'"):
        CascadePipeline.load(small_family.models, device="cpu", memory="streamed")
    with pytest.raises(ValueError, match="The memory mode is 'tight', expected one of auto, resident, one stage"):
        CascadePipeline.load(small_family.models, device="cpu", memory="tight")
    monkeypatch.setenv("CASCADE_MEMORY", "one stage")
    assert isinstance(CascadePipeline.load(small_family.models, device="cpu").stage_a, StageFile)
    assert isinstance(CascadePipeline.load(small_family.models, device="cpu", memory="resident").stage_a, StageHandle)


class Keeper:
    """Takes what it is asked for, and leaves it where it is."""

    def __init__(self):
        self.asked, self.dropped = [], 0

    def placed(self, handles, devices, memory, mode):
        self.asked.append((handles[0].stage, devices[0].type, memory, mode))
        return list(handles)

    def drop(self):
        self.dropped += 1


def test_what_waits_in_main_memory_is_placed_with_what_it_needs_to_run_in(small_family):
    waiting = CascadePipeline.load(small_family.models, device="cpu")
    expected, keeper = generate(waiting), Keeper()
    from dataclasses import replace

    placing = replace(waiting, turns=Turns(torch.device("meta"), "streamed", keeper))
    assert np.array_equal(generate(placing), expected)
    assert [asked[0] for asked in keeper.asked] == list(STAGES)
    assert {asked[1] for asked in keeper.asked} == {"meta"} and {asked[3] for asked in keeper.asked} == {"streamed"}
    needed = {stage: bytes_needed for stage, _, bytes_needed, _ in keeper.asked}
    decoding = memory.decoding_bytes(waiting.stage_a, (1, 4, 16, 26))
    assert needed["text_encoder"] == 0 and needed["stage_a"] == pytest.approx(decoding, rel=0.2)
    assert needed["stage_c"] > 0 and needed["stage_b"] > 0


def test_what_is_read_for_its_turn_goes_straight_to_the_device_if_it_fits(files, monkeypatch):
    device, read = torch.device("meta"), []
    file = files["stage_c"]
    file = StageFile(file.path, "stage_c", file.name, file.dtype, device)
    loaded = file.load(False)
    monkeypatch.setattr(StageFile, "load", lambda self, resident: read.append(resident) or loaded)
    for free, mode in ((10**12, "auto"), (10**12, "streamed"), (turns.MARGIN, "auto"), (None, "one stage")):
        keeper = Keeper()
        ran = Turns(device, mode, keeper, lambda _, free=free: free).run(file, lambda handle: handle.stage)
        assert ran == "stage_c" and keeper.dropped == 2
    assert read == [True, False, False, True]


def test_changes_are_made_when_a_stage_is_read(files):
    from dataclasses import replace

    def renamed(handle):
        return replace(handle, name=handle.name + "!")

    later = changed(changed(files["stage_a"], renamed), renamed)
    assert isinstance(later, StageFile) and later.load(False).name == files["stage_a"].name + "!!"
    assert changed(files["stage_a"].load(False), renamed).name == files["stage_a"].name + "!"
