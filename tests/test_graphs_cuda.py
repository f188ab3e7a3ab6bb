"""Recorded steps on a real GPU. Without one there is nothing here to collect."""

from dataclasses import replace

import torch

from stable_cascade_nodes.cascade_ops import graphs, stages
from stable_cascade_nodes.cascade_ops.acceleration import CUDA_GRAPH
from stable_cascade_nodes.cascade_ops.diffusion import draw_noise, image_generators
from stable_cascade_nodes.cascade_ops.stages import SamplingSettings

if torch.cuda.is_available():

    def test_a_run_is_the_same_and_is_replayed(handles, prompts):
        plain = handles["stage_c"].to("cuda")
        latent = stages.empty_latent(plain, 128, 96, 2)
        settings = SamplingSettings(steps=5, guidance_until=0.3)
        made = []
        for method in ("", CUDA_GRAPH, CUDA_GRAPH):
            fast = replace(plain, acceleration=method)
            made.append(stages.sample_stage_c(fast, *prompts, latent, seed=2, settings=settings).samples)
        assert graphs.graphs_of(plain.module, plain.device).failure == ""
        assert torch.equal(made[1], made[2])
        assert (made[1] - made[0]).abs().max() <= 1e-4 * made[0].abs().max()

    def test_noise_is_that_of_the_cpu():
        drawn = draw_noise(image_generators(3, 2), (2, 16, 24, 24), "cuda")
        assert torch.equal(drawn.cpu(), draw_noise(image_generators(3, 2), (2, 16, 24, 24)))

    def test_a_step_does_not_wait(handles, prompts):
        plain = handles["stage_c"].to("cuda")
        latent = stages.empty_latent(plain, 128, 96)

        def report(info):
            torch.cuda.set_sync_debug_mode("error" if info.step < 2 else "default")

        try:
            stages.sample_stage_c(plain, *prompts, latent, seed=2, settings=SamplingSettings(steps=4), callback=report)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_stage_b_too(handles, prompts):
        plain = handles["stage_b"].to("cuda")
        prior = stages.empty_latent(handles["stage_c"], 128, 96)
        made = [
            stages.sample_stage_b(
                replace(plain, acceleration=method), prior, *prompts, seed=2, settings=SamplingSettings(steps=4)
            ).samples
            for method in ("", CUDA_GRAPH)
        ]
        assert (made[1] - made[0]).abs().max() <= 1e-4 * made[0].abs().max()
