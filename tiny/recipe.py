"""What the tiny family is made from: datasets, the configurations of its parts and adapters, and their order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
TRAIN = ("host.cli", "train")

# The finished file of each part, in the folder of a whole recipe.
PARTS = {
    "stage_c": "stage_c_half_patterned/stage_c.safetensors",
    "stage_b": "stage_b_all_noise/stage_b.safetensors",
    "stage_a": "stage_a/stage_a.safetensors",
    "text_encoder": "text_encoder/text_encoder.safetensors",
    "image_encoder": "image_encoder_large_batches/image_encoder.safetensors",
    "latent_encoder": "latent_encoder_with_stage_b/latent_encoder.safetensors",
    "previewer": "latent_encoder_with_stage_b/latent_encoder_previewer.safetensors",
}
ADAPTERS = {
    "lora": "lora/lora.safetensors",
    "controlnet_canny": "controlnet_canny/controlnet.safetensors",
    "controlnet_inpainting": "controlnet_inpainting/controlnet.safetensors",
    "controlnet_super_resolution": "controlnet_super_resolution/controlnet.safetensors",
    "controlnet_identity": "controlnet_identity/controlnet.safetensors",
    "ip_adapter": "ip_adapter/ip_adapter.safetensors",
}


@dataclass(frozen=True)
class Step:
    """One command of the recipe: a module of this package with its arguments, and the steps that it waits for.

    ``{out}`` in an argument is the folder of the recipe.
    """

    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def dataset(kind: str, count: int) -> Step:
    return Step(("tiny.dataset", kind, "--out", f"{{out}}/data/{kind}", "--count", str(count)))


def trained(name: str, *needs: str) -> Step:
    """`cascade train` with ``configs/<name>.yaml``; its paths begin at the folder of the recipe."""
    return Step((*TRAIN, f"{{out}}/configs/{name}.yaml"), needs)


# The longest chain (latent encoder, Stage B, both together, then Stages B and C) comes first where there is a choice.
RECIPE = {
    "data_scenes": dataset("scenes", 40_000),
    "data_patterned": dataset("patterned", 20_000),
    "data_captions": dataset("captions", 12_000),
    "stage_a": trained("stage_a", "data_scenes"),
    "text_encoder": trained("text_encoder", "data_captions"),
    "latent_encoder": trained("latent_encoder", "data_scenes"),
    "stage_b": trained("stage_b", "stage_a", "latent_encoder", "text_encoder"),
    "latent_encoder_with_stage_b": trained("latent_encoder_with_stage_b", "stage_b"),
    "image_encoder": trained("image_encoder", "text_encoder", "data_scenes"),
    "image_encoder_large_batches": trained("image_encoder_large_batches", "image_encoder"),
    "stage_b_deeper": trained("stage_b_deeper", "latent_encoder_with_stage_b"),
    "stage_b_outlines": trained("stage_b_outlines", "stage_b_deeper"),
    "stage_b_white": trained("stage_b_white", "stage_b_outlines", "data_patterned"),
    "stage_b_even": trained("stage_b_even", "stage_b_white"),
    "stage_b_high_noise": trained("stage_b_high_noise", "stage_b_even"),
    "stage_b_all_noise": trained("stage_b_all_noise", "stage_b_high_noise"),
    "stage_c": trained("stage_c", "latent_encoder_with_stage_b"),
    "stage_c_patterned": trained("stage_c_patterned", "stage_c", "data_patterned"),
    "stage_c_pictures": trained("stage_c_pictures", "stage_c_patterned", "image_encoder_large_batches"),
    "stage_c_half_patterned": trained("stage_c_half_patterned", "stage_c_pictures"),
    "weights": Step(
        ("tiny.publish", "--out", "{out}", "--to", "{out}/weights"), ("stage_c_half_patterned", "stage_b_all_noise")
    ),
    "data_control": dataset("control", 8_000),
    "data_look": dataset("look", 2_000),
    **{name: trained(name, "weights", "data_look" if name == "lora" else "data_control") for name in ADAPTERS},
}


def steps_for(wanted: str | None) -> list[str]:
    """The steps that `wanted` needs, itself last, in the order of the recipe; all of them for None.

    Raises:
        ValueError: no such step.
    """
    if wanted is None:
        return list(RECIPE)
    if wanted not in RECIPE:
        raise ValueError(f"The recipe has no part {wanted!r}, expected one of {', '.join(RECIPE)}.")
    found, waiting = set(), [wanted]
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting += [need for need in RECIPE[name].needs if need not in found]
    return [name for name in RECIPE if name in found]
