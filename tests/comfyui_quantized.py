"""Checks inside ComfyUI: weights of 8 bits in its hands."""

import torch
from comfyui_inside import check, differ, near, refused, sampled_c
from comfyui_wires import sampled_b

CHOICES = ("int8 weights", "float8 weights")


def chain(inside, stage_c, stage_b, conditions):
    latent = sampled_c(inside, stage_c, *conditions)
    return latent["samples"], sampled_b(inside, stage_b, latent, *conditions)["samples"]


@check
def weights_of_8_bits_are_loaded_and_streamed(inside):
    models, runtime = inside.pack("nodes.comfyui_models"), inside.pack("nodes.runtime")
    conditions, load = inside.conditions(), inside.management.load_models_gpu
    for choice in CHOICES:
        stage_c, stage_b = (inside.run(f"CascadeLoad{s}", file="auto", dtype=choice)[0] for s in ("StageC", "StageB"))
        with runtime.using(runtime.PlainBackend()):
            plain = chain(inside, stage_c, stage_b, conditions)
        differ(plain[0], sampled_c(inside, inside.load("StageC"), *conditions)["samples"])
        entries = [models.managed(handle) for handle in (stage_c, stage_b)]
        for share in (None, 0.0, 0.5):
            for entry in entries:
                entry.patcher.detach()
                if share is None:
                    continue
                size = entry.patcher.model_size()
                entry.patcher.partially_load(torch.device("cpu"), extra_memory=max(1, int(share * size)))
                assert entry.patcher.loaded_size() <= share * size
            inside.management.load_models_gpu = load if share is None else lambda *a, **k: None
            try:
                for ours, theirs in zip(chain(inside, stage_c, stage_b, conditions), plain, strict=True):
                    near(ours, theirs)
            finally:
                inside.management.load_models_gpu = load
        for handle, entry in zip((stage_c, stage_b), entries, strict=True):
            assert abs(entry.patcher.model_size() / handle.size_in_bytes - 1) < 0.01
            entry.patcher.load(torch.device("meta"), lowvram_model_memory=0.1)
            large = [weight for weight in entry.network.parameters() if weight.element_size() == 1]
            # They wait in main memory, and the results are where the input is.
            assert large and {weight.device.type for weight in large} == {"cpu"}
            entry.patcher.detach()
        refused("expected float weights", inside.run, "CascadeToModel", stage=stage_c)
