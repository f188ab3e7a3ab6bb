"""The choice of a method, what each refuses, and compiled blocks. Recorded steps are tested in `test_graphs.py`."""

import copy
from dataclasses import replace

import pytest
import torch
from attachment_kit import near, noise
from nodes_kit import TestBackend, load, run

from stable_cascade_nodes.cascade_ops import acceleration, compiling, stages
from stable_cascade_nodes.cascade_ops.acceleration import AUTO, COMPILE, CUDA_GRAPH, METHODS, accelerated, methods_for
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.reuse import InnerReuse, reuse_inner
from stable_cascade_nodes.nodes import runtime

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STAGES = ["stage_c", "stage_b", "stage_a"]
SETTINGS = stages.SamplingSettings(steps=3)


@pytest.fixture
def graphs_compiled(monkeypatch):
    """Compiles without a compiler: each graph that is found is kept here and run as it is."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "_compiled", compiling.WeakKeyDictionary())
    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def made(handles, prompts, stage, method=""):
    """Decoded or sampled by one stage, and after each step."""
    fast = replace(handles[stage], acceleration=method)
    trail = []

    def report(info):
        trail.append(info.latent)

    latent = stages.empty_latent(handles["stage_c"], 128, 96, 2)
    if stage == "stage_c":
        result = stages.sample_stage_c(fast, *prompts, latent, seed=1, settings=SETTINGS, callback=report)
    elif stage == "stage_b":
        prior = replace(latent, samples=noise(*latent.samples.shape))
        result = stages.sample_stage_b(fast, prior, *prompts, seed=1, settings=SETTINGS, callback=report)
    else:
        detail = replace(latent, samples=noise(2, 4, 32, 24))
        return [stages.decode_stage_a(fast, replace(detail, width=96, height=128), tile=64)]
    return [*trail, result.samples]


# The choice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["stage_c", "stage_b"])
def test_auto_records_steps_on_a_gpu_and_nothing_elsewhere(handles, stage):
    fast, words = accelerated(handles[stage], AUTO, CUDA)
    assert fast.acceleration == AUTO
    assert "CUDA graph" in words
    assert fast.module is handles[stage].module
    assert handles[stage].acceleration == ""
    slow, words = accelerated(fast, AUTO, CPU)
    assert slow.acceleration == ""
    assert "CUDA graphs need a GPU and it runs on the cpu" in words


def test_auto_leaves_stage_a_as_it_is(handles):
    for device in (CPU, CUDA):
        fast, words = accelerated(handles["stage_a"], AUTO, device)
        assert fast.acceleration == ""
        assert "has no steps" in words


def test_a_graph_is_refused_where_there_is_no_gpu(handles):
    with pytest.raises(ValueError, match=r"CUDA graphs were asked for Stage C.*runs on the cpu.*choose auto or torch"):
        accelerated(handles["stage_c"], CUDA_GRAPH, CPU)


@pytest.mark.parametrize(("stage", "method"), [("stage_a", CUDA_GRAPH), ("stage_c", "faster")])
def test_a_method_that_a_stage_does_not_have_is_refused(handles, stage, method):
    with pytest.raises(ValueError, match=f"by '{method}', expected .* or torch.compile: choose"):
        accelerated(handles[stage], method, CUDA)


def test_other_stages_are_refused(handles):
    with pytest.raises(ValueError, match="cannot be accelerated, expected a Stage C, B or A"):
        accelerated(handles["previewer"], AUTO, CUDA)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_without_a_compiler_the_sentence_says_what_to_install(handles, monkeypatch, device):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    missing = {"cpu": "a C\\+\\+ compiler", "cuda": "the package triton"}[device.type]
    with pytest.raises(ValueError, match=f"lacks {missing}.*install it, or choose auto"):
        accelerated(handles["stage_b"], COMPILE, device)


def test_old_pytorch_is_too_old(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    assert compiling.compiler_missing(CPU) == "PyTorch 2.5 or newer (this is 2.4.1+cpu)"


@pytest.mark.parametrize("stage", STAGES)
def test_the_nodes(host, stage, monkeypatch):
    handle = load(f"CascadeLoad{stage.title().replace('_', '')}")
    name = f"CascadeAccelerate{stage.title().replace('_', '')}"
    answer = run(name, method=AUTO, **{stage: handle})
    assert "runs as it always does" in answer["ui"]["text"][0]
    assert answer["result"][0].acceleration == ""
    monkeypatch.setattr(compiling, "compiler_missing", lambda device: "")
    answer = run(name, method=COMPILE, **{stage: handle})
    assert answer["result"][0].acceleration == COMPILE
    assert answer["result"][0].module is handle.module
    other = load("CascadeLoadPreviewer")
    with pytest.raises(ValueError, match="connect the loader of that stage"):
        run(name, method=AUTO, **{stage: other})


def test_the_node_on_a_gpu(small_family):
    with runtime.using(TestBackend(small_family.models)):
        handle = load("CascadeLoadStageC")
    with runtime.using(TestBackend(small_family.models, "cuda")):
        answer = run("CascadeAccelerateStageC", stage_c=handle, method=CUDA_GRAPH)
    assert "records a step" in answer["ui"]["text"][0]
    assert answer["result"][0].acceleration == CUDA_GRAPH


def test_the_sampler_says_how_it_ran(host, handles, prompts, monkeypatch):
    monkeypatch.setattr(acceleration, "graphs_of", lambda model, device: None)
    fast = replace(handles["stage_c"], acceleration=AUTO)
    assert acceleration.notes(fast) == ["without CUDA graphs: it runs on the cpu"]
    assert acceleration.notes(handles["stage_c"]) == []


def test_the_pipeline_accelerates_the_stages_that_can(small_family, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "stable_cascade_nodes.cascade_ops.pipeline.accelerated",
        lambda handle, method, device: (asked.append((handle.stage, method)) or handle, ""),
    )
    source = {stage: small_family.paths[stage] for stage in (*STAGES, "text_encoder")}
    for method in METHODS:
        CascadePipeline.load(source, "cpu", acceleration=method)
    assert asked == [(stage, method) for method in METHODS for stage in STAGES if method in methods_for(stage)]
    CascadePipeline.load(source, "cpu")
    assert len(asked) == 8


# What cannot act -----------------------------------------------------------------------------------------------


def moved(handle):
    """A stage whose host left a bias elsewhere."""
    module = copy.deepcopy(handle.module)
    module.clf[1].bias = torch.nn.Parameter(module.clf[1].bias.to("meta"), requires_grad=False)
    return replace(handle, module=module, runs_on=CPU)


def lent(handle):
    """A stage with a layer of ComfyUI's that fetches its weights."""
    module = copy.deepcopy(handle.module)
    module.clf[1].comfy_cast_weights = True
    return replace(handle, module=module, runs_on=CPU)


@pytest.mark.parametrize("change", [moved, lent])
@pytest.mark.parametrize("method", [CUDA_GRAPH, COMPILE])
def test_weights_that_a_host_moves_are_not_recorded(handles, recorder, change, method):
    handle = replace(change(handles["stage_c"]), acceleration=method)
    with pytest.raises(ValueError, match=f"accelerated by {method} .*fetched to the device.*choose auto"):
        acceleration.acceleration_of(handle)
    plain = acceleration.acceleration_of(replace(handle, acceleration=AUTO))
    assert plain.step is None
    assert plain.model is handle.module
    assert "fetched" in plain.words


@pytest.mark.parametrize("method", [CUDA_GRAPH, COMPILE])
def test_streamed_blocks_are_not_recorded(handles, recorder, method):
    module = copy.deepcopy(handles["stage_b"].module)
    module.streaming = object()  # as `streaming.streamed` marks what it makes
    handle = replace(handles["stage_b"], acceleration=method, module=module)
    with pytest.raises(ValueError, match="its blocks are streamed from main memory: choose auto"):
        acceleration.acceleration_of(handle)
    assert "streamed" in acceleration.acceleration_of(replace(handle, acceleration=AUTO)).words


def test_reused_inner_blocks_are_not_recorded(handles, recorder, prompts):
    reusing = reuse_inner(handles["stage_b"], InnerReuse(outer=1))
    with pytest.raises(ValueError, match="reused from step to step"):
        acceleration.acceleration_of(replace(reusing, acceleration=CUDA_GRAPH))
    exact = made(handles, prompts, "stage_b")
    fast = {"stage_c": handles["stage_c"], "stage_b": reusing}
    plain, auto = made(fast, prompts, "stage_b"), made(fast, prompts, "stage_b", AUTO)
    assert all(torch.equal(one, other) for one, other in zip(plain, auto, strict=True))
    assert not torch.equal(plain[-1], exact[-1])
    assert recorder.counts == (0, 0, 0)


# Compiled blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_compiled_blocks_give_the_same_up_to_rounding(handles, prompts, graphs_compiled, stage):
    plain = made(handles, prompts, stage)
    assert not graphs_compiled
    fast = made(handles, prompts, stage, COMPILE)
    assert graphs_compiled
    for one, other in zip(fast, plain, strict=True):
        near(one, other, 1e-4)
    before = len(graphs_compiled)
    again = made(handles, prompts, stage, COMPILE)
    assert len(graphs_compiled) == before
    assert all(torch.equal(one, other) for one, other in zip(fast, again, strict=True))


def test_the_model_that_came_in_is_not_compiled(handles, prompts, graphs_compiled):
    made(handles, prompts, "stage_c", COMPILE)
    count = len(graphs_compiled)
    assert all(module._compiled_call_impl is None for module in handles["stage_c"].module.modules())
    made(handles, prompts, "stage_c")
    assert len(graphs_compiled) == count
    twin = compiling.compiled(handles["stage_c"].module)
    ours, its = (dict(module.named_parameters()) for module in (handles["stage_c"].module, twin))
    assert ours.keys() == its.keys()
    assert all(ours[name] is its[name] for name in ours)


def test_one_compilation_serves_all_blocks_of_a_kind(graphs_compiled):
    from conftest import randomised

    from stable_cascade_nodes.cascade_ops.models import StageC

    def graphs_of(depth):
        before = len(graphs_compiled)
        blocks = [[depth, depth], [depth, depth]]
        model = randomised(StageC(c_cond=8, c_hidden=[64, 64], nhead=[1, 1], blocks=blocks, dropout=0.0), 1)
        with torch.no_grad(), compiling.compiling("Stage C"):
            prepared = model.prepare(torch.tensor([0.5]), noise(1, 3, 1280))
            compiling.compiled(model).step(noise(1, 16, 8, 8), prepared, 0)
        return len(graphs_compiled) - before

    shallow = graphs_of(1)
    torch._dynamo.reset()
    # Residual blocks without and with a skip, and attention, each as a whole and nothing in it written over.
    assert shallow == graphs_of(3) == 3
    assert not any("gelu_" in str(graph.graph) for graph in graphs_compiled)


def test_a_failing_compiler_gives_one_sentence(handles, prompts, monkeypatch, graphs_compiled):
    def backend(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiling, "BACKEND", backend)
    with pytest.raises(ValueError, match=r"could not compile Stage C.*choose another method") as raised:
        made(handles, prompts, "stage_c", COMPILE)
    assert "\n" not in str(raised.value)
