"""Small encoders and small sets of pictures, for tests of the training data."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from stable_cascade_nodes.cascade_ops.training.settings import Data, Models, Settings, Source

LATENTS = frozenset({"stage_c_latent", "stage_a_latent"})
TEXTS = frozenset({"text", "text_pooled"})
EVERYTHING = LATENTS | TEXTS | {"image_embedding", "image"}
SQUARE = (128, 128)


def noise(size=SQUARE, seed=0):
    """A picture of random pixels, ``(width, height)`` in size."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG", **options):
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def fill_folder(folder, sizes, caption="picture {}"):
    """Pictures 0.png, 1.png, ... of these sizes with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        noise(size, number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption.format(number))
    return folder


def write_metadata(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tar(path, members):
    """A tar of ``(name, bytes)``."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def cut_short(path, share=0.5):
    """Leave only the first part of a file: its header can still be read, its pixels cannot."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def settings_for(folder, output, *, target="stage_c", models=None, prior=None, seed=0, batch_size=2, **data):
    data.setdefault("sources", (Source(str(folder)),))
    data.setdefault("resolution", 128)
    more = {} if prior is None else {"prior": prior}
    return Settings(
        target=target,
        output=str(output),
        seed=seed,
        batch_size=batch_size,
        models=models or Models(),
        data=Data(**data),
        **more,
    )


def small_models(family, folder, seed=0):
    """Files of small random encoders beside those of the small family (`conftest`)."""
    import torch
    from conftest import normalised, randomised
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from stable_cascade_nodes.cascade_ops.checkpoints import save
    from stable_cascade_nodes.cascade_ops.models import LatentEncoder

    latents = {"widths": [8, 8, 8, 8, 8, 8, 8, 16], "depths": [1, 1, 1, 1, 1, 1]}
    vision = {
        "image_size": 28,
        "patch_size": 14,
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "hidden_act": "gelu",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules = {
            "latent_encoder": (normalised(randomised(LatentEncoder(**latents), seed)), latents),
            "image_encoder": (randomised(CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)), seed + 1), vision),
        }
    paths = {stage: family.paths[stage] for stage in ("stage_a", "stage_c", "text_encoder")}
    for stage, (module, config) in modules.items():
        paths[stage] = save(module, folder / f"{stage}.safetensors", stage=stage, config=config)
    return Models(**{stage: str(path) for stage, path in paths.items()})


def same_batches(first, second, tolerance=0.0):
    """Whether two runs of batches are equal in every entry."""
    import torch

    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)
            else:
                assert value == other[name]
    return True
