"""Stage B and C with their blocks streamed: the same bits, within the budget, every copy waited for."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_kit import LateLane, run_stage_b, run_stage_c, small_stage_b, small_stage_c

from stable_cascade_nodes.cascade_ops.handles import load_stage
from stable_cascade_nodes.cascade_ops.quantized import FORMATS
from stable_cascade_nodes.cascade_ops.reuse import Kept, ReusedSteps
from stable_cascade_nodes.cascade_ops.streaming import pin, same_structure, streamed, streaming_plan
from stable_cascade_nodes.cascade_ops.streaming_plan import BUFFERS, blocks_of, least_bytes, make_plan

SMALL = 64
KINDS = {"stage_c": (small_stage_c, run_stage_c), "stage_b": (small_stage_b, run_stage_b)}


def size_of(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_streamed_is_the_same_to_the_bit_and_within_its_budget(kind, share, dtype):
    build, run = KINDS[kind]
    model = build(dtype)
    expected, before = run(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    least, whole = least_bytes(model, SMALL), size_of(model)
    budget = int(least + share * (whole - least))
    lane = LateLane()
    network = streamed(model, lane, budget, SMALL)
    assert torch.equal(run(network), expected)
    plan = streaming_plan(network)
    assert lane.on_device == BUFFERS * plan.buffer and plan.needed <= budget
    stay = sum(tensor.nbytes for tensor in network.state_dict().values() if tensor.device.type != "meta")
    assert stay == plan.resident
    # What came in is as it was, and a second network of it computes the same.
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(run(model), expected) and streaming_plan(model) is None
    assert torch.equal(run(streamed(model, lane, budget, SMALL)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_copies_what_the_plan_says_and_one_block_ahead(kind):
    build, run = KINDS[kind]
    model, lane, steps = build(), LateLane(), 4
    network = streamed(model, lane, least_bytes(model, SMALL), SMALL)
    plan = streaming_plan(network)
    run(network, steps)
    waited = sum(size for what, size in lane.log if what == "wait")
    assert waited == plan.once + steps * plan.per_step
    # While a block computes, the copy for the next one is under way, and none is made for nothing.
    waits = copies = 0
    for what, _ in lane.log:
        copies += what == "copy"
        waits += what == "wait"
        assert what != "wait" or copies - waits >= BUFFERS - 1
    assert copies - waits == BUFFERS


def test_weights_are_pinned_in_place_of_the_pageable_ones_and_once():
    model, lane = small_stage_c(), LateLane()
    weight = model.down_blocks[0][0].channelwise[0].weight
    values, storage = weight.clone(), weakref.ref(weight.untyped_storage())
    first = streamed(model, lane, least_bytes(model, SMALL), SMALL)
    assert lane.is_pinned(weight) and torch.equal(weight, values)
    assert model.down_blocks[0][0].channelwise[0].weight is weight and storage() is not weight.untyped_storage()
    pieces = len(lane.pieces)
    second = streamed(model, lane, least_bytes(model, SMALL), SMALL)
    assert len(lane.pieces) == pieces and torch.equal(run_stage_c(first), run_stage_c(second))


def test_without_more_pinned_memory_the_rest_is_copied_from_where_it_is():
    model = small_stage_c()
    expected = run_stage_c(model)
    network = streamed(model, LateLane(pinned_limit=0), least_bytes(model, SMALL), SMALL)
    assert torch.equal(run_stage_c(network), expected)


def test_large_pieces_are_not_exceeded(monkeypatch):
    from stable_cascade_nodes.cascade_ops import streaming

    monkeypatch.setattr(streaming, "_PINNED_PIECE", 2048)
    lane, tensors = LateLane(), [torch.randn(size) for size in (100, 300, 700, 3, 200, 50)]
    copies = [tensor.clone() for tensor in tensors]
    pin(tensors, lane)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
    assert all(map(lane.is_pinned, tensors)) and sorted(map(len, lane.pieces)) == [1536, 1792, 2816]


def test_a_network_that_is_dropped_leaves_the_device_at_once():
    model, lane = small_stage_c(), LateLane()
    gc.collect()
    gc.disable()
    try:
        network = streamed(model, lane, least_bytes(model, SMALL), SMALL)
        run_stage_c(network)
        alive = weakref.ref(network)
        del network
        assert alive() is None and lane.on_device == 0
    finally:
        gc.enable()


def test_an_interrupted_step_can_be_followed_by_another():
    model, lane = small_stage_c(), LateLane()
    expected = run_stage_c(model)
    network = streamed(model, lane, least_bytes(model, SMALL), SMALL)

    def stop(*_):
        raise KeyboardInterrupt

    hook = network.up_blocks[0][0].depthwise.register_forward_hook(stop)
    for _ in range(BUFFERS + 1):
        with pytest.raises(KeyboardInterrupt):
            run_stage_c(network)
    hook.remove()
    assert torch.equal(run_stage_c(network), expected)


def test_blocks_out_of_the_foreseen_order_are_right_too():
    model, lane = small_stage_c(), LateLane()
    network = streamed(model, lane, least_bytes(model, SMALL), SMALL)
    x = torch.randn(1, 4, 4, 16)
    resblocks = [number for number, block in enumerate(model.down_blocks[1]) if type(block).__name__ == "ResBlock"]
    for number in (*reversed(resblocks), *resblocks, resblocks[0]):
        assert torch.equal(network.down_blocks[1][number](x), model.down_blocks[1][number](x))


def test_blocks_that_are_reused_are_left_out_of_their_turn():
    model, lane = small_stage_b(), LateLane()
    network = streamed(model, lane, least_bytes(model, SMALL), SMALL)

    def run(network):
        generator = torch.Generator().manual_seed(6)
        shapes = (1, 16, 3, 3), (1, 1, 20), (1, 4, 8, 8)
        latent, pooled, x = (torch.randn(*shape, generator=generator) for shape in shapes)
        kept = Kept(ReusedSteps(1, (False, True, True, False)))
        with torch.no_grad():
            prepared = network.prepare(torch.linspace(1, 0.1, 4), latent, pooled, (8, 8))
            return torch.stack([network.step(x, prepared, index, inner=kept.at(index)) for index in range(4)])

    assert torch.equal(run(network), run(model))
    plan = streaming_plan(network)
    assert sum(size for what, size in lane.log if what == "wait") < plan.once + 3 * plan.per_step


@pytest.mark.parametrize("weights", FORMATS)
def test_weights_of_8_bits_are_streamed_as_they_are(small_family, weights):
    handle = load_stage(small_family.models / "diffusion_models/b.safetensors", "stage_b", dtype=weights)
    model, lane = handle.module, LateLane()
    generator = torch.Generator().manual_seed(6)
    latent = torch.randn(1, model.effnet_mapper[0].in_channels, 3, 3, generator=generator)
    pooled = torch.randn(1, 1, model.clip_mapper.in_features, generator=generator)
    x = torch.randn(1, model.embedding[1].in_channels // model.patch_size**2, 16, 16, generator=generator)

    def run(network):
        with torch.no_grad():
            prepared = network.prepare(torch.linspace(1, 0.1, 2), latent, pooled, (16, 16))
            return torch.stack([network.step(x, prepared, index) for index in range(2)])

    network = streamed(model, lane, least_bytes(model, SMALL), SMALL)
    assert torch.equal(run(network), run(model))
    assert any(weight.tensor.element_size() == 1 for block in blocks_of(model, SMALL) for weight in block.each_step)


if torch.cuda.is_available():

    @pytest.mark.parametrize("kind", KINDS)
    def test_on_a_gpu_streamed_is_resident_to_the_bit(kind):
        from stable_cascade_nodes.cascade_ops.streaming import CudaLane

        build, run = KINDS[kind]
        device = torch.device("cuda", torch.cuda.current_device())
        resident, model = build().to(device), build()

        network = streamed(model, CudaLane(device), least_bytes(model, SMALL), SMALL)
        for _ in range(3):
            assert torch.equal(run(network, device=device), run(resident, device=device))


def test_what_shares_the_structure_shares_no_tables():
    model = small_stage_c()
    copy = same_structure(model)
    copy.clf[1].weight = torch.nn.Parameter(torch.zeros_like(model.clf[1].weight))
    copy.clf[1].register_forward_hook(lambda *_: None)
    assert copy.clf[1].bias is model.clf[1].bias and model.clf[1].weight.abs().sum() > 0
    assert not model.clf[1]._forward_hooks and copy.down_blocks[0][0] is not model.down_blocks[0][0]


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1.2))
def test_a_plan_keeps_to_its_budget_and_wastes_no_room(kind, share):
    model = MODELS[kind]
    least, whole = least_bytes(model, SMALL), size_of(model)
    budget = int(least + share * (whole - least))
    plan, blocks = make_plan(model, budget, SMALL), blocks_of(model, SMALL)
    assert plan.needed <= budget and plan.total == whole
    away = [block for block, stays in zip(blocks, plan.stays, strict=True) if not stays]
    assert plan.per_step == sum(block.times * block.step_size for block in away)
    assert plan.buffer >= max([block.step_room for block in away] + [block.prepare_room for block in blocks])
    assert plan.streamed == whole - plan.resident
    # None of those that go would fit in what is left.
    assert all(block.step_size > budget - plan.needed for block in away)
    # Whoever runs more often stays before others of its size.
    free_to_go = [(block, stays) for block, stays in zip(blocks, plan.stays, strict=True) if block.each_step]
    for block, stays in free_to_go:
        if stays and block.step_room <= plan.buffer:
            assert not any(one.times > block.times and one.step_size <= block.step_size for one in away)
    # Less memory never copies less.
    if budget > least:
        assert make_plan(model, (budget + least) // 2, SMALL).per_step >= plan.per_step


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_as_good_as_any_to_a_block(kind):
    """Against all choices of which blocks stay, at several budgets."""
    import itertools

    model = MODELS[kind]
    blocks = blocks_of(model, SMALL)
    whole, least = size_of(model), least_bytes(model, SMALL)
    moving = [number for number, block in enumerate(blocks) if block.step_size]
    always = whole - sum(weight.size for block in blocks for weight in (*block.once, *block.each_step))
    floor = max(block.prepare_room for block in blocks)
    slack = max(block.times * block.step_size for block in blocks)
    for share in (0.1, 0.5, 0.8):
        budget, best = int(least + share * (whole - least)), None
        groups = {}
        for number in moving:
            block = blocks[number]
            groups.setdefault((block.times, block.step_size, block.step_room), []).append(number)
        for counts in itertools.product(*(range(len(group) + 1) for group in groups.values())):
            kept = sum(count * size for count, (_, size, _) in zip(counts, groups, strict=True))
            gone = [(*key, len(group) - n) for n, (key, group) in zip(counts, groups.items(), strict=True)]
            gone = [each for each in gone if each[-1]]
            buffer = max([floor] + [room for _, _, room, _ in gone])
            if always + kept + BUFFERS * buffer <= budget:
                cost = sum(times * size * number for times, size, _, number in gone)
                best = cost if best is None else min(best, cost)
        assert make_plan(model, budget, SMALL).per_step <= best + slack


def test_too_small_a_budget_is_refused_in_a_sentence():
    model = small_stage_c()
    least = least_bytes(model, SMALL)
    assert make_plan(model, least, SMALL).needed <= least
    with pytest.raises(ValueError, match=r"needs at least .* of free memory on the device and .*: close other"):
        make_plan(model, least - 1, SMALL)


MODELS = {kind: build() for kind, (build, _) in KINDS.items()}
