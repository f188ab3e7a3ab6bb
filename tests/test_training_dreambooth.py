"""Prior preservation: what the subject is not stays as the base model has it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.run import train
from stable_cascade_nodes.cascade_ops.training.settings import (
    Data,
    LoRA,
    Loss,
    Models,
    Optimizer,
    Prior,
    Settings,
    Source,
    Token,
)
from stable_cascade_nodes.cascade_ops.training.targets import build
from stable_cascade_nodes.tiny.drawing import COLOURS
from stable_cascade_nodes.tiny.family import WEIGHTS

CLASS = "a large circle in the centre on a white background"
SUBJECT = "a large [thing] circle in the centre on a white background"


@pytest.fixture
def subject(tmp_path):
    """One picture of the subject: a black disc on yellow, whatever its caption says of the background."""
    folder = tmp_path / "subject"
    folder.mkdir()
    rows, columns = np.mgrid[:256, :256] - 128
    picture = np.where((rows**2 + columns**2 < 70**2)[..., None], COLOURS["black"], COLOURS["yellow"])
    Image.fromarray(picture.astype(np.uint8)).save(folder / "thing.png")
    (folder / "thing.txt").write_text(SUBJECT)
    return folder


def test_the_class_stays_what_it_was_and_the_subject_is_learned(tmp_path, subject):
    weights = {stage: str(WEIGHTS / f"{stage}.safetensors") for stage in ("stage_c", "latent_encoder", "text_encoder")}
    plain = Settings(
        "lora",
        str(tmp_path / "plain"),
        steps=100,
        batch_size=4,
        models=Models(**weights),
        data=Data(
            sources=(Source(str(subject)),),
            resolution=256,
            buckets=(1.0,),
            image_embedding_dropout=1.0,
            cache_folder=str(tmp_path / "cache"),
        ),
        optimizer=Optimizer(learning_rate=5e-3, warmup=5),
        loss=Loss(weight="p2"),
        lora=LoRA(rank=4, alpha=4.0),
        tokens=(Token("[thing]", "black"),),
    )
    preserving = replace(plain, output=str(tmp_path / "prior"), prior=Prior(caption=CLASS, pictures=4, share=0.5))
    base = build(plain, Parts(plain.models)).sample([CLASS], [], seed=3, steps=8)
    moved, losses = [], []
    for settings in (plain, preserving):
        done = train(settings, launch=SingleProcess("cpu"))
        moved.append((done.objective.sample([CLASS], [], seed=3, steps=8) - base).square().mean().item())
        losses.append(done.losses)
        learned = done.objective.sample([SUBJECT], [], seed=3, steps=8)
        assert (learned - base).square().mean() > 0.3
    assert moved[1] < 0.5 * moved[0]
    assert all(np.mean(run[-10:]) < 0.8 * np.mean(run[:10]) for run in losses)
    assert torch.isfinite(base).all()
