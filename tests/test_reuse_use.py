"""Reused inner blocks where people meet them: the node, the pipeline, pictures that were finished before, messages."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from nodes_kit import load, run, sample_b, sample_c

from stable_cascade_nodes import NODE_CLASS_MAPPINGS
from stable_cascade_nodes.cascade_ops import reuse, stages
from stable_cascade_nodes.cascade_ops.adapters.merging import Applied, adapted
from stable_cascade_nodes.cascade_ops.finished import FinishedPictures, StageBRun
from stable_cascade_nodes.cascade_ops.pipeline import CascadePipeline
from stable_cascade_nodes.cascade_ops.reuse import InnerReuse, reuse_inner
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings
from stable_cascade_nodes.cascade_ops.wires import Latent
from stable_cascade_nodes.nodes import comfyui_bridge

# The small Stage B has two levels, so one outer level is the most.
REUSE = InnerReuse(2, 1)


def node(stage_b, **changes):
    return run(
        "CascadeReuseInnerBlocks",
        stage_b=stage_b,
        **{"every": 2, "outer_levels": 1, "start": 1.0, "end": 0.0} | changes,
    )


# The node ------------------------------------------------------------------------------------------------------------


def test_the_node_gives_a_new_handle_and_says_what_it_is(host):
    stage_b = load("CascadeLoadStageB")
    answer = node(stage_b, every=3, start=0.8, end=0.1)
    (applied,) = answer["result"]
    assert applied.reuse == InnerReuse(3, 1, 0.8, 0.1) and stage_b.reuse is None
    assert applied.module is stage_b.module
    assert answer["ui"]["text"] == [
        "approximation: Stage B custom (b.safetensors) computes the outermost level in every step and the others every "
        "3 steps, reused from time 0.8 to 0.1"
    ]
    declared = NODE_CLASS_MAPPINGS["CascadeReuseInnerBlocks"]
    assert declared.DESCRIPTION.startswith("An approximation") and declared.CATEGORY == "cascade/speed"


def test_the_sampling_node_follows_it_and_reserves_its_memory(host):
    plain, inputs = sample_b(host, steps=4)
    stage_b = node(load("CascadeLoadStageB"))["result"][0]
    reused = run("CascadeSampleStageB", **inputs | {"stage_b": stage_b, "steps": 4})
    assert reused["ui"]["text"][1:] == ["approximation: inner blocks computed in 2 of 4 steps"]
    assert not torch.allclose(reused["result"][0]["samples"], plain["result"][0]["samples"], rtol=1e-3)
    (_, before), (_, after) = (placing for placing in host.placings[-2:])
    # Two halves of 13 x 8 tokens, halved, of 64 channels in float32.
    assert after - before == 2 * 7 * 4 * 64 * 4


def test_it_stays_when_a_stage_moves_or_gets_a_lora(handles):
    applied = reuse_inner(handles["stage_b"], REUSE)
    assert applied.to("meta").reuse == REUSE
    assert adapted(applied, Applied("a", {}, 1.0), {}).reuse == REUSE
    assert replace(applied, runs_on=torch.device("cpu")).with_attached([]).reuse == REUSE


# What cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"every": 1}, "computed every 1 steps, expected 2 or more"),
        ({"outer": 0}, "compute 0 outer levels, expected 1 or more"),
        ({"start": 0.3, "end": 0.6}, "reused from 0.3 to 0.6, expected 1 >= start > end >= 0"),
        ({"start": 0.5, "end": 0.5}, "reused from 0.5 to 0.5"),
        ({"start": 1.5}, "reused from 1.5 to 0"),
    ],
)
def test_settings_without_sense_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        InnerReuse(**setting)


def test_models_that_have_nothing_to_reuse_are_refused(handles):
    with pytest.raises(ValueError, match=r"compute 2 levels and Stage B custom .* has 2, expected 1 to 1: none would"):
        reuse_inner(handles["stage_b"], InnerReuse(2, 2))
    with pytest.raises(ValueError, match=r"Stage C .* was given where a Stage B is read"):
        reuse_inner(handles["stage_c"], REUSE)
    with pytest.raises(ValueError, match=r"already computes the outermost level.*expected one that does not reuse"):
        reuse_inner(reuse_inner(handles["stage_b"], REUSE), REUSE)


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        (REUSE, {"steps": 1}),
        (InnerReuse(2, 1, 0.2, 0.1), {"steps": 4}),
        # Guided in every other of two steps only.
        (REUSE, {"steps": 2, "guidance_until": 0.8}),
    ],
)
def test_runs_in_which_nothing_can_be_reused_are_refused(handles, texts, setting, settings):
    handle = reuse_inner(handles["stage_b"], setting)
    message = f"none of the {settings['steps']} steps of this run can reuse them, expected two steps in a row"
    with pytest.raises(ValueError, match=message):
        sampled(handle, texts, **settings)


def test_comfyuis_own_nodes_are_not_given_one_silently(handles):
    with pytest.raises(ValueError, match="reuses its inner blocks, which ComfyUI's own nodes cannot follow"):
        comfyui_bridge.to_model(reuse_inner(handles["stage_b"], REUSE))


# Finished pictures, pipeline -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(handles):
    return [stages.encode_text(handles["text_encoder"], text) for text in ("a red circle", "")]


def latent():
    return Latent(torch.randn(1, 16, 2, 3, generator=torch.Generator().manual_seed(1)), 100, 60)


def sampled(handle, texts, **settings):
    chosen = replace(SamplingSettings(steps=4), **settings)
    return stages.sample_stage_b(handle, latent(), *texts, seed=5, settings=chosen).samples


def test_a_finished_picture_is_not_taken_for_one_with_another_setting(handles, texts):
    plain, other = handles["stage_b"], InnerReuse(3, 1)
    kept, asked = FinishedPictures(), StageBRun(latent(), *texts, 5, SamplingSettings(steps=4))
    versions = [plain, reuse_inner(plain, REUSE), reuse_inner(plain, other), plain]
    made = []
    for handle in versions:
        plan = kept.plan(handle, asked)
        assert plan.missing == [0]
        made.append(plan.sample(handle).samples)
        assert torch.equal(made[-1], sampled(handle, texts))
        assert kept.plan(handle, asked).missing == []
    assert torch.equal(made[0], made[3])
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


def test_the_sampling_node_does_not_show_the_exact_picture_again(host):
    """Its object lives from run to run and keeps what it finished."""
    _, inputs = sample_b(host)
    sampler, exact = NODE_CLASS_MAPPINGS["CascadeSampleStageB"](), inputs["stage_b"]
    changed = node(exact)["result"][0]
    pictures = [
        sampler.sample(**inputs | {"stage_b": handle, "steps": 4})["result"][0]["samples"]
        for handle in (exact, changed)
    ]
    assert not torch.equal(*pictures)


def test_the_pipeline_gives_the_picture_of_the_graph(small_family, host):
    pipeline = CascadePipeline.load(small_family.models, device="cpu")
    settings = {"width": 100, "height": 60, "seed": 1, "steps_c": 2, "steps_b": 4}
    picture = pipeline.generate("red", reuse_b=REUSE, **settings)[0]
    first, inputs = sample_c(host)
    inputs = inputs | {
        "latent": first["result"][0],
        "stage_b": node(load("CascadeLoadStageB"))["result"][0],
        "steps": 4,
    }
    inputs.pop("stage_c")
    detail = run("CascadeSampleStageB", **inputs)["result"][0]
    shown = run("CascadeDecodeStageA", stage_a=load("CascadeLoadStageA"), latent=detail)["result"][0]
    assert np.array_equal(np.asarray(picture), np.asarray(stages.to_picture(shown[0])))
    assert not np.array_equal(np.asarray(picture), np.asarray(pipeline.generate("red", **settings)[0]))
    assert pipeline.stage_b.reuse is None


def test_words_name_levels_and_steps():
    assert re.fullmatch(
        r"computes the 2 outermost levels in every step and the others every 2 steps", InnerReuse().describe()
    )
    steps = reuse.ReusedSteps(1, (False, True, True))
    assert steps.describe() == "approximation: inner blocks computed in 1 of 3 steps"
