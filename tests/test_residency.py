"""Which stages keep copies on the device: decided from what is free, on a pretended device of a given size."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from nodes_kit import TestBackend, load, run, sample_b, sample_c
from streaming_kit import LateLane, run_stage_c, small_stage_b, small_stage_c

from stable_cascade_nodes.cascade_ops import memory, residency
from stable_cascade_nodes.cascade_ops.handles import StageHandle
from stable_cascade_nodes.cascade_ops.models import Previewer, StageA
from stable_cascade_nodes.cascade_ops.residency import DeviceKeeper, memory_mode, streaming_note
from stable_cascade_nodes.cascade_ops.streaming_plan import least_bytes
from stable_cascade_nodes.nodes import runtime

DEVICE = torch.device("meta")
MARGIN, SMALL = 1000, 64


def handle(stage, module):
    return StageHandle(stage, module.eval().requires_grad_(False), SimpleNamespace(title=stage, control={}), stage)


@pytest.fixture
def stages():
    return {
        "stage_c": handle("stage_c", small_stage_c()),
        "stage_b": handle("stage_b", small_stage_b()),
        "stage_a": handle("stage_a", StageA(c_hidden=8, bottleneck_blocks=1, codebook_size=16)),
        "previewer": handle("previewer", Previewer(c_hidden=8)),
    }


class Card:
    """A device of `size` bytes, of which the keeper's copies take what they take."""

    def __init__(self, size):
        self.size, self.keeper = size, DeviceKeeper(self.free, self.lane, MARGIN, SMALL)
        self.lanes = []

    def free(self, device):
        return None if self.size is None else self.size - self.keeper.kept_bytes(device)

    def lane(self, device):
        self.lanes.append(LateLane())
        self.lanes[-1].device = device
        return self.lanes[-1]

    def place(self, *handles, memory=0, mode="auto"):
        return self.keeper.placed(handles, [DEVICE] * len(handles), memory, mode)

    def kept(self, stages):
        return {name for name, each in stages.items() if each.network in self.keeper._kept}


def sizes(*handles):
    return sum(each.size_in_bytes for each in handles)


def test_copies_stay_as_long_as_everything_fits(stages):
    card = Card(sizes(*stages.values()) + MARGIN + 50)
    first = [card.place(each)[0] for each in stages.values()]
    assert all(each.device == DEVICE for each in first) and card.kept(stages) == set(stages)
    again = card.place(*stages.values(), memory=50)
    assert [one.module for one in again] == [one.module for one in first]
    assert all(each.device.type == "cpu" for each in stages.values())
    assert card.place(*again) == again


def test_the_copy_used_longest_ago_goes_first(stages):
    c, b, a, previewer = stages.values()
    card = Card(sizes(c, b, a) + MARGIN)
    card.place(b)
    card.place(c)
    card.place(a)
    card.place(b)  # c is the oldest now
    card.place(previewer)
    assert card.kept(stages) == {"stage_b", "stage_a", "previewer"}


def test_memory_to_run_in_counts_and_what_runs_is_not_dropped(stages):
    c, b, a, _ = stages.values()
    card = Card(sizes(c, b, a) + MARGIN)
    for each in (b, a, c):
        card.place(each)
    card.place(c, memory=sizes(b))
    assert card.kept(stages) == {"stage_c", "stage_a"}
    card.place(c, memory=sizes(a, b))
    assert card.kept(stages) == {"stage_c"}


def test_a_copy_lives_no_longer_than_what_it_was_made_from(stages):
    card = Card(sizes(*stages.values()) + MARGIN)
    placed = card.place(*stages.values())
    copy = weakref.ref(placed[0].network)
    del placed, stages["stage_c"]
    gc.collect()
    assert copy() is None and card.kept(stages) == set(stages) and len(card.keeper._kept) == 3


def test_two_handles_of_one_network_share_a_copy(stages):
    c = stages["stage_c"]
    card = Card(sizes(c) + MARGIN)
    one, two = card.place(c, replace(c, name="other"))
    assert one.module is two.module and two.name == "other" and card.keeper.kept_bytes(DEVICE) == c.size_in_bytes


def test_a_stage_that_does_not_fit_is_streamed_and_says_so(stages):
    c, b, _, previewer = stages.values()
    card = Card(sizes(c, previewer) + MARGIN)
    card.place(b)
    running, shower = card.place(c, previewer, memory=sizes(c) * 7 // 10)
    plan = running.module.streaming
    assert running.device == DEVICE and shower.device == DEVICE and card.kept(stages) == {"previewer"}
    assert plan.needed <= sizes(c) * 3 / 10 and plan.per_step > 0
    assert streaming_note(running) == [plan.describe()] and streaming_note(shower) == streaming_note(c) == []
    assert plan.describe() == f"streamed: {plan.streamed / 1e6:.1f} MB of {c.size_in_bytes / 1e6:.1f} MB of its weights"
    # Its own whole copy from a smaller picture makes way too.
    card.place(c)
    assert card.kept(stages) == {"stage_c", "previewer"}
    card.place(c, memory=sizes(c))
    assert card.kept(stages) == set()


def test_of_two_the_larger_one_is_streamed_and_results_are_the_same():
    c = handle("stage_c", small_stage_c())
    expected = run_stage_c(c.module)
    lane = LateLane()
    keeper = DeviceKeeper(lambda device: 10**9, lambda device: lane, MARGIN, SMALL)
    # Pretend that the weights are elsewhere: the stand-in device is the CPU itself.
    elsewhere = StageHandle("stage_c", c.module, c.info, "c", runs_on=DEVICE)
    (running,) = keeper.placed([elsewhere], [lane.device], mode="streamed")
    assert running.module is not c.module and running.module.streaming.per_step == 0
    assert torch.equal(run_stage_c(running.module), expected)


def test_what_a_run_needs_is_rounded_up_so_too_much_of_it_only_streams_more(stages):
    c = stages["stage_c"]
    least = least_bytes(c.module, SMALL)
    card = Card(least + MARGIN)
    (running,) = card.place(c, memory=10**9)
    assert running.module.streaming.needed == least
    with pytest.raises(ValueError, match=r"^stage_c .* does not fit on meta\. Streaming .* needs at least"):
        Card(least + MARGIN - 1).place(c)


def test_what_cannot_be_streamed_is_tried_and_refused_in_a_sentence(stages, monkeypatch):
    a = stages["stage_a"]
    card = Card(10)
    assert card.place(a)[0].device == DEVICE  # the estimate was wrong: it fitted
    card.keeper.drop()

    def fail(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StageHandle, "to", fail)
    with pytest.raises(ValueError, match=r"stage_a .* could not be copied to meta: .* of weights .* Close other"):
        card.place(a)


def test_a_failed_copy_drops_the_others_and_is_tried_once_more_then_streamed(stages, monkeypatch):
    c, b, _, _ = stages.values()
    card, tried, real = Card(10**9), [], StageHandle.to
    card.place(b)

    def failing(times):
        def to(self, device):
            tried.append(card.kept(stages))
            if len(tried) <= times:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, device)

        return to

    monkeypatch.setattr(StageHandle, "to", failing(1))
    assert streaming_note(card.place(c)[0]) == []
    assert tried == [{"stage_b"}, set()] and card.kept(stages) == {"stage_c"}
    card.keeper.drop()
    tried.clear()
    monkeypatch.setattr(StageHandle, "to", failing(2))
    assert streaming_note(card.place(c)[0]) and len(tried) == 2


def test_where_nobody_knows_what_is_free_copies_are_for_one_run(stages):
    card = Card(None)
    (one,), (two,) = card.place(stages["stage_c"]), card.place(stages["stage_c"])
    assert one.device == DEVICE and one.module is not two.module and card.kept(stages) == set()


def test_modes(stages, monkeypatch):
    c, b, _, _ = stages.values()
    card = Card(10**9)
    card.place(b)
    card.place(c, mode="one stage")
    assert card.kept(stages) == {"stage_c"}
    assert streaming_note(card.place(c, mode="streamed")[0]) and card.kept(stages) == set()
    assert streaming_note(Card(10).place(c, mode="resident")[0]) == []
    monkeypatch.setenv("CASCADE_MEMORY", "streamed")
    assert streaming_note(card.place(c)[0]) and streaming_note(card.place(c, mode="resident")[0]) == []
    assert memory_mode() == "streamed" and memory_mode("one_stage") == "one stage"
    monkeypatch.setenv("CASCADE_MEMORY", "much")
    with pytest.raises(ValueError, match="mode in CASCADE_MEMORY is 'much', expected one of auto, resident"):
        memory_mode()
    with pytest.raises(ValueError, match="The memory mode is 'little'"):
        memory_mode("little")


def test_the_hosts_ask_the_keeper_and_make_room_drops_all(stages, monkeypatch, tmp_path):
    from stable_cascade_nodes.host.backend import HostBackend
    from stable_cascade_nodes.host.folders import DataFolders

    for backend in (runtime.PlainBackend(), HostBackend(DataFolders(tmp_path))):
        card = Card(10**9)
        monkeypatch.setattr(residency, "DEVICE_KEEPER", card.keeper)
        monkeypatch.setattr(type(backend), "device", lambda self, stage: DEVICE)
        with runtime.using(backend):
            (one,) = runtime.placed([stages["stage_c"]], 100)
            assert runtime.placed([stages["stage_c"]], 100)[0].module is one.module
            card.size = one.size_in_bytes // 2 + MARGIN
            assert streaming_note(runtime.placed([stages["stage_c"]], 1)[0])
            card.size = 10**9
            runtime.placed(list(stages.values()))
            assert card.kept(stages) == set(stages)
            runtime.make_room()
            assert card.kept(stages) == set()
            assert runtime.keep_on_device("stage_c", 1) is False


def test_loading_straight_to_the_device_wants_room_for_the_whole_family(monkeypatch):
    device = torch.device("cuda")
    total = SimpleNamespace(total_memory=32 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    keeper = DeviceKeeper(lambda _: 23 * 10**9, LateLane, MARGIN, SMALL)
    monkeypatch.delenv("CASCADE_MEMORY", raising=False)
    assert keeper.fits_whole_family(device, 7 * 10**9)
    assert not keeper.fits_whole_family(device, 20 * 10**9)
    total.total_memory = 24 * 10**9
    assert not keeper.fits_whole_family(device, 10**9)
    monkeypatch.setenv("CASCADE_MEMORY", "resident")
    assert keeper.fits_whole_family(device, 10**9)
    monkeypatch.setenv("CASCADE_MEMORY", "one stage")
    total.total_memory = 80 * 10**9
    assert not keeper.fits_whole_family(device, 10**9)
    assert not keeper.fits_whole_family(torch.device("cpu"), 1)


def test_nodes_stream_and_say_so_and_give_the_same(small_family, monkeypatch):
    plain, lanes = {}, []

    def lane(device):
        lanes.append(LateLane())
        return lanes[-1]

    with runtime.using(TestBackend(small_family.models)):
        given = {"stage_c": load("CascadeLoadStageC"), "stage_b": load("CascadeLoadStageB")}
        for stage, sample in (("stage_c", sample_c), ("stage_b", sample_b)):
            plain[stage], _ = sample(None, **{stage: given[stage]})
        monkeypatch.setattr(residency, "DEVICE_KEEPER", DeviceKeeper(lambda device: 10**9, lane, MARGIN, SMALL))
        monkeypatch.setenv("CASCADE_MEMORY", "streamed")
        for stage, sample in (("stage_c", sample_c), ("stage_b", sample_b)):
            # Pretend that the weights are elsewhere: the stand-in device is the CPU itself.
            away = replace(given[stage], runs_on=DEVICE)
            answer, _ = sample(None, **{stage: away})
            assert torch.equal(answer["result"][0]["samples"], plain[stage]["result"][0]["samples"])
            (note,) = set(answer["ui"]["text"]) - set(plain[stage]["ui"]["text"])
            assert note.startswith("streamed: ") and note.endswith(" of its weights")
    assert len(lanes) == 2 and all(lane.copied() for lane in lanes)


def test_nodes_take_tiles_where_a_whole_picture_does_not_fit_and_say_so(small_family, monkeypatch):
    latent = {"samples": 300 * torch.randn(1, 4, 80, 72, generator=torch.Generator().manual_seed(1))}
    with runtime.using(TestBackend(small_family.models)):
        stage_a = load("CascadeLoadStageA")
        whole = run("CascadeDecodeStageA", stage_a=stage_a, latent=latent)
        picture = whole["result"][0]
        encoded = run("CascadeEncodeStageA", stage_a=stage_a, image=picture)
        monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
        tiled = run("CascadeDecodeStageA", stage_a=stage_a, latent=latent)
        encoded_in_tiles = run("CascadeEncodeStageA", stage_a=stage_a, image=picture)
    assert whole["ui"] == {}
    (note,) = tiled["ui"]["text"]
    assert note.startswith("in tiles of 256 pixels, since the whole picture would need ") and "1.0 MB are free" in note
    assert torch.allclose(tiled["result"][0], picture, atol=1e-4) and picture.std() > 0.01
    assert any(text.startswith("in tiles of 256") for text in encoded_in_tiles["ui"]["text"])
    assert not any("tiles" in text for text in encoded["ui"]["text"])
    samples = [answer["result"][0]["samples"] for answer in (encoded, encoded_in_tiles)]
    assert torch.allclose(*samples, atol=1e-4)
