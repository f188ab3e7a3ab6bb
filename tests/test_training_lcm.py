"""A LoRA for few steps: after distillation one step ends where many guided steps of the plain model end."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora, write_lora
from stable_cascade_nodes.cascade_ops.adapters.lora import apply_lora
from stable_cascade_nodes.cascade_ops.adapters.tokens import LearnedToken
from stable_cascade_nodes.cascade_ops.denoisers import StageCDenoiser, TextCondition
from stable_cascade_nodes.cascade_ops.diffusion import (
    Guidance,
    add_noise,
    draw_noise,
    image_generators,
    log_snr_at,
    sample,
    signal_and_noise,
    step_times,
)
from stable_cascade_nodes.cascade_ops.training import targets
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.launch import SingleProcess
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.settings import LCM, Data, LoRA, Models, Optimizer, Settings
from stable_cascade_nodes.cascade_ops.training.trainer import Trainer

CAPTIONS = ("a red circle", "a blue square", "two green stars", "nothing at all")
STEPS, GUIDANCE, SIDE = 2, 3.0, 2  # guidance of the small family's Stage C
# Less noise at the first level than otherwise: random weights tell next to nothing there.
SHIFT = 0.1


def settings(folder, **changes):
    base = Settings(
        "lcm",
        str(folder),
        name="few",
        steps=80,
        batch_size=16,
        save_every=1000,
        data=Data(resolution=85, caption_dropout=0.0, image_embedding_dropout=1.0),
        optimizer=Optimizer(learning_rate=0.001, weight_decay=0.0, schedule="cosine", beta2=0.99),
        lora=LoRA(rank=8, alpha=8.0, modules=("",)),
        lcm=LCM(steps=STEPS, teacher_steps=4, shift=SHIFT),
    )
    return replace(base, **changes)


class Pictures:
    """Endless batches of random latents with captions."""

    def __init__(self, handles):
        self.text = handles["text_encoder"].module.encode_captions(CAPTIONS)

    def batches(self, first_step, last_step, global_batch, positions):
        for step in range(first_step, last_step):
            which = [position % len(CAPTIONS) for position in positions]
            yield {
                "stage_c_latent": Draws(3, step, positions).normal(16, SIDE, SIDE),
                "text": self.text.hidden[which].detach(),
                "text_pooled": self.text.pooled[which, None].detach(),
                "name": [str(position) for position in positions],
            }


def objective_of(run, handles):
    return targets.build(run, Parts(run.models, {name: handles[name] for name in ("stage_c", "text_encoder")}))


def loss_of(objective, data):
    """On always the same latents and noise."""
    with torch.no_grad():
        return objective(next(data.batches(0, 1, 64, range(64))), Draws(99, 0, range(64))).loss.item()


@pytest.fixture(scope="module")
def distilled(handles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lcm")
    run, data = settings(folder), Pictures(handles)
    objective, figures = objective_of(run, handles), []
    before = {name: tensor.clone() for name, tensor in handles["stage_c"].module.state_dict().items()}
    first = loss_of(objective, data)
    Trainer(objective, data, run, SingleProcess("cpu"), lambda step: figures.append(step)).run()
    after = handles["stage_c"].module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    (path,) = objective.export(folder, "few")
    return SimpleNamespace(objective=objective, fall=loss_of(objective, data) / first, figures=figures, path=path)


def ended(module, handles, start, x, steps, guidance):
    """The clean latents where `steps` of DDIM from the time `start` end."""
    text, empty = handles["text_encoder"].module.encode_captions(CAPTIONS), handles["text_encoder"].module.encode("")
    return sample(
        StageCDenoiser(module, TextCondition(*text), TextCondition(*empty)), x, steps=steps, sampler="ddim",
        shift=SHIFT, t_start=start, guidance=Guidance(guidance),
    ).latent  # fmt: skip


def noised(start):
    """Four latents at the level of a time, and the factors of latent and noise there."""
    level = log_snr_at(start, shift=SHIFT)
    noise = draw_noise(image_generators(8, 4), (4, 16, SIDE, SIDE))
    return add_noise(draw_noise(image_generators(9, 4), noise.shape), noise, level), *signal_and_noise(level)


def test_the_loss_falls(distilled):
    assert distilled.fall < 0.6
    assert {"clean_mse"} == distilled.figures[-1].figures.keys() and len(distilled.figures[-1].error) == 16


def test_one_step_ends_nearer_to_where_many_guided_steps_end(distilled, handles):
    plain, (x, a, b) = handles["stage_c"].module, noised(0.5)
    wanted = ended(plain, handles, 0.5, x, 20, GUIDANCE)

    def error(module):
        return ((ended(module, handles, 0.5, x, 1, 1.0) - wanted) * a / b).square().mean()

    assert error(distilled.objective.module) < 0.6 * error(plain)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_from_the_last_level_the_guided_model_itself_is_the_goal(distilled, handles, tmp_path, guidance):
    """Whatever was learned already. 0 is the model's own guidance."""
    run = settings(tmp_path, lcm=LCM(STEPS, 4, guidance, SHIFT), models=Models(init=str(distilled.path)))
    objective, (x, _, _) = objective_of(run, handles), noised(0.5)
    conditions = objective.loss.conditions(next(Pictures(handles).batches(0, 1, 4, range(4))), Draws(0, 0, range(4)))
    found = objective._wanted(x, objective.levels[-1].expand(4, -1), conditions)
    expected = ended(handles["stage_c"].module, handles, 0.5, x, 4, guidance or GUIDANCE)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_without_teacher_steps_the_guided_answer_at_the_level_itself_is_the_goal(handles, tmp_path):
    objective = objective_of(settings(tmp_path, lcm=LCM(STEPS, 0, 0.0, SHIFT)), handles)
    conditions = objective.loss.conditions(next(Pictures(handles).batches(0, 1, 4, range(4))), Draws(0, 0, range(4)))
    for start, levels in zip((1.0, 0.5), objective.levels, strict=True):
        x, _, _ = noised(start)
        expected = ended(handles["stage_c"].module, handles, start, x, 1, GUIDANCE)
        torch.testing.assert_close(
            objective._wanted(x, levels.expand(4, -1), conditions), expected, rtol=1e-3, atol=1e-3
        )


def test_each_level_is_one_at_which_the_sampler_calls_the_model(distilled, handles, tmp_path):
    called = log_snr_at(step_times(STEPS), shift=SHIFT)
    assert torch.equal(distilled.objective.levels[:, 0], called[:-1])
    assert torch.equal(distilled.objective.levels[:, -1], called[1:])
    own = objective_of(settings(tmp_path, lcm=LCM(4)), handles)  # the shift of the model
    assert torch.equal(own.levels[:, 0], log_snr_at(step_times(4), shift=1.5)[:-1])


def test_from_an_earlier_level_the_goal_is_what_the_lora_says_at_the_next(distilled, handles):
    objective, (x, _, _) = distilled.objective, noised(1.0)
    conditions = objective.loss.conditions(next(Pictures(handles).batches(0, 1, 4, range(4))), Draws(0, 0, range(4)))
    with torch.no_grad():
        found = objective._wanted(x, objective.levels[0].expand(4, -1), conditions)
    text, empty = handles["text_encoder"].module.encode_captions(CAPTIONS), handles["text_encoder"].module.encode("")
    between = sample(
        StageCDenoiser(handles["stage_c"].module, TextCondition(*text), TextCondition(*empty)), x, steps=4,
        sampler="ddim", shift=SHIFT, t_end=0.5, guidance=Guidance(GUIDANCE),
    ).noisy  # fmt: skip
    expected = ended(objective.module, handles, 0.5, between, 1, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_file_says_how_it_is_to_be_sampled(distilled, handles):
    lora = read_lora(distilled.path)
    assert lora.defaults == {"guidance": 1.0, "steps": STEPS, "shift": SHIFT, "sampler": "lcm"}
    assert lora.config["distilled"] == {"steps": STEPS, "guidance": GUIDANCE}
    changed, report = apply_lora(handles["stage_c"], lora)
    assert not report.unmatched and changed.info.defaults["guidance"] == 1
    x, _, _ = noised(0.5)
    made = [ended(module, handles, 0.5, x, 1, 1.0) for module in (changed.module, distilled.objective.module)]
    torch.testing.assert_close(*made, rtol=1e-3, atol=1e-3)


def test_samples_are_made_as_it_is_meant(distilled, handles):
    text, generators = handles["text_encoder"].module.encode(CAPTIONS[0]), image_generators(4, 1)
    shape = distilled.objective.sample([CAPTIONS[0]], [], seed=4, steps=20).shape
    expected = sample(
        StageCDenoiser(distilled.objective.module, TextCondition(*text)), draw_noise(generators, shape), steps=STEPS,
        sampler="lcm", shift=SHIFT, generators=generators,
    ).latent  # fmt: skip
    torch.testing.assert_close(distilled.objective.sample([CAPTIONS[0]], [], seed=4, steps=20), expected)


def test_a_lora_with_words_is_not_gone_on_with(distilled, handles, tmp_path):
    lora = read_lora(distilled.path)
    token = LearnedToken("[cat]", vectors=torch.zeros(1, 64))
    path = write_lora(replace(lora, tokens=(token,)), tmp_path / "words.safetensors")
    with pytest.raises(ValueError, match=r"learned the token '\[cat\]'"):
        objective_of(settings(tmp_path, models=Models(init=str(path))), handles)
