"""How samplers and step counts are measured."""

import pytest
import torch

from stable_cascade_nodes.cascade_ops.adapters.dialects import write_lora
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, LoRAWeights
from stable_cascade_nodes.tiny import evaluate_steps
from stable_cascade_nodes.tiny.captions import caption_full, unplaced
from stable_cascade_nodes.tiny.drawing import render
from stable_cascade_nodes.tiny.evaluate import Family, measured_scenes


class Sampling(Family):
    """Notes how each stage is sampled."""

    def sample_c(self, prompts, seed, attached=None, **changes):
        self.seen.append((tuple(prompts), changes, self.stage_c))
        return torch.zeros(len(prompts), 16, 6, 6)

    def sample_b(self, latent, prompts, seed, **changes):
        self.seen.append(changes)
        return torch.zeros(len(prompts), 4, 64, 64)


@pytest.fixture
def family():
    loaded = Family.load()
    return Sampling(**{name: getattr(loaded, name) for name in Family.__dataclass_fields__})


def test_each_way_is_sampled_as_its_line_says(family, tmp_path, monkeypatch, capsys):
    object.__setattr__(family, "seen", [])
    Sampling.seen = family.seen
    change = {"clf.1.weight": LoRAWeights(torch.ones(1, 128, 1, 1), torch.ones(16, 1), 1.0)}
    lora = write_lora(LoRA(change), tmp_path / "lora.safetensors")
    monkeypatch.setattr(Family, "load", lambda folder: family)
    for name in ("STAGE_C", "WITH_LORA", "STAGE_B"):
        monkeypatch.setattr(evaluate_steps, name, getattr(evaluate_steps, name)[1:3])
    out = tmp_path / "steps.md"
    evaluate_steps.main(["--count", "2", "--lora", str(lora), "--out", str(out)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.read_text().splitlines() if line]
    assert out.read_text() == capsys.readouterr().out
    ways = [*evaluate_steps.STAGE_C, *evaluate_steps.WITH_LORA]
    # A sampling of Stage C for each kind of prompt.
    scenes = [measured_scenes(2, "test", objects) for objects in (1, 2)]
    prompts = [tuple(map(unplaced, scenes[0])), tuple(map(caption_full, scenes[1]))]
    for number, (sampler, steps, guided) in enumerate(ways):
        with_lora = number >= len(evaluate_steps.STAGE_C)
        runs = steps * 2 if guided else steps
        said = [sampler, str(steps), "2" if guided else "1", "yes" if with_lora else "", str(runs)]
        assert lines[2 + number][:5] == said
        for kind in (0, 1):
            asked, changes, module = family.seen[2 * number + kind]
            assert asked == prompts[kind] and (module is not family.stage_c) == with_lora
            assert changes == {"sampler": sampler, "steps": steps, "guidance": 2.0 if guided else 1.0}
    of_stage_b = [seen for seen in family.seen if isinstance(seen, dict)]
    assert [(seen["sampler"], seen["steps"]) for seen in of_stage_b] == list(evaluate_steps.STAGE_B)


def test_shares_are_those_of_the_pictures(family, monkeypatch):
    scenes = measured_scenes(3, "test", 1)
    monkeypatch.setattr(Sampling, "seen", [], raising=False)
    shown = torch.stack([torch.from_numpy(render(scene)).permute(2, 0, 1) for scene in scenes]) / 255
    monkeypatch.setattr(evaluate_steps, "previewed", lambda *_: (shown * 255).byte().permute(0, 2, 3, 1).numpy())
    right = evaluate_steps.read_stage_c(family, scenes, ["a", "b", "c"])
    assert right["all"] == 1 and evaluate_steps.read_stage_c(family, scenes[::-1], ["a", "b", "c"])["all"] < 1
