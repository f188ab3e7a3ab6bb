"""Pictures made while training."""

import pytest
import torch
from PIL import Image
from torch import nn

from stable_cascade_nodes.cascade_ops.training.objective import Objective
from stable_cascade_nodes.cascade_ops.training.parts import Parts
from stable_cascade_nodes.cascade_ops.training.samples import Sampler, undisturbed
from stable_cascade_nodes.cascade_ops.training.settings import Samples, Settings

PROMPTS = ("a red circle", "ein grüner Stern (1.2)")


class Shows(Objective):
    """Shows what it is told to, and remembers how it was asked."""

    def __init__(self, shown):
        super().__init__()
        self.shown = shown
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        self.body[0].eval()  # a part whose mode differs from the rest's

    def forward(self, batch, draws):
        raise AssertionError("sampling is no training step")

    def export(self, folder, name):
        return []

    def sample(self, prompts, pictures, seed, steps):
        self.asked = prompts, [picture.shape for picture in pictures], seed, steps
        self.modes = [part.training for part in self.modules()]
        torch.randn(7)  # what a careless sampler draws from the program's generator
        return None if self.shown is None else self.shown(torch.Generator().manual_seed(seed))


def latents(generator):
    return torch.randn(2, 16, 3, 4, generator=generator)


def pictures(generator):
    return torch.rand(2, 3, 8, 12, generator=generator)


@pytest.fixture
def sampler(tmp_path, handles):
    def make(**changes):
        samples = Samples(every=5, prompts=PROMPTS, seed=3, steps=2, **changes)
        parts = Parts(given=handles)
        return Sampler(Settings("stage_c", str(tmp_path), samples=samples), parts, tmp_path)

    return make


def test_samples_are_due_every_few_steps(sampler, tmp_path):
    assert [step for step in range(12) if sampler().due(step)] == [5, 10]
    never = Sampler(Settings("stage_c", str(tmp_path)), Parts(), tmp_path)
    assert not any(never.due(step) for step in range(12))


def test_latents_become_previews_with_their_prompt(sampler, tmp_path):
    objective = Shows(latents)
    paths = sampler().write(objective, 500)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "samples/step-000500_00.png",
        "samples/step-000500_01.png",
    ]
    with Image.open(paths[1]) as picture:
        assert picture.size == (8 * 4, 8 * 3)
        assert picture.text == {"prompt": PROMPTS[1], "step": "500", "seed": "3", "steps": "2"}
    assert objective.asked == (list(PROMPTS), [], 3, 2)
    assert {path.name for path in paths[0].parent.iterdir()} == {path.name for path in paths}


def test_latents_go_through_the_whole_chain(sampler):
    first, second = sampler(chain="full").write(Shows(latents), 5)
    with Image.open(first) as one, Image.open(second) as two:
        assert one.size == (168, 128), "pixels of a Stage C latent of 4 x 3"
        assert one.tobytes() != two.tobytes()


@pytest.mark.parametrize("chain", ["preview", "full"])
def test_the_same_weights_give_the_same_pictures_at_every_step(sampler, chain):
    before = [path.read_bytes() for path in sampler(chain=chain).write(Shows(latents), 5)]
    torch.randn(3)
    after = sampler(chain=chain).write(Shows(latents), 5)
    assert [path.read_bytes() for path in after] == before


def test_finished_pictures_are_written_as_they_are(sampler):
    path = sampler().write(Shows(pictures), 10)[0]
    expected = pictures(torch.Generator().manual_seed(3))[0].mul(255).round().byte().permute(1, 2, 0)
    with Image.open(path) as picture:
        assert picture.size == (12, 8)
        assert list(picture.tobytes()) == expected.flatten().tolist()


def test_an_objective_that_shows_nothing_writes_nothing(sampler, tmp_path):
    assert sampler().write(Shows(None), 5) == []
    assert not (tmp_path / "samples").exists()


def test_modes_and_random_numbers_are_as_before(sampler):
    objective = Shows(latents).train()
    objective.body[0].eval()
    modes = [part.training for part in objective.modules()]
    state = torch.get_rng_state()
    sampler(chain="full").write(objective, 5)
    assert objective.modes == [False] * len(modes), "sampled in evaluation mode"
    assert [part.training for part in objective.modules()] == modes and True in modes and False in modes
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_come_back_after_a_failure_and_gradients_are_off():
    module = nn.Dropout().train()
    with pytest.raises(RuntimeError, match="no"), undisturbed(module):
        assert not module.training and not torch.is_grad_enabled()
        raise RuntimeError("no")
    assert module.training and torch.is_grad_enabled()


def test_pictures_that_steer_are_read_once(sampler, tmp_path):
    path = tmp_path / "edges.png"
    Image.new("L", (6, 4), 255).save(path)
    made = sampler(pictures=(str(path), str(path)))
    path.unlink()
    objective = Shows(latents)
    made.write(objective, 5)
    assert objective.asked[1] == [(3, 4, 6), (3, 4, 6)]


def test_a_file_that_is_no_picture_is_refused_before_the_run(sampler, tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(ValueError, match=r"`samples.pictures` names x.png, which cannot be read as a picture"):
        sampler(pictures=(str(tmp_path / "x.png"),))


def test_a_failed_write_leaves_no_file(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **_: (path.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        sampler().write(Shows(pictures), 5)
    assert list((tmp_path / "samples").iterdir()) == []
