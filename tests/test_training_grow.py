"""A deeper network that starts as the shallower one."""

import pytest
import torch

from stable_cascade_nodes.cascade_ops.models import StageB, StageC
from stable_cascade_nodes.cascade_ops.training.grow import start_from

B = {"c_r": 16, "c_cond": 16, "c_hidden": [16, 16], "nhead": [-1, 2], "c_clip": 8, "level_config": ["CT", "CTA"]}
B |= {"blocks": [[1, 1], [1, 1]], "block_repeat": [[1, 1], [2, 1]], "dropout": 0.0}
C = {"c_r": 16, "c_cond": 16, "c_hidden": [16, 16], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]], "dropout": 0.0}
C |= {"c_clip_text": 8, "c_clip_text_pooled": 8, "c_clip_img": 6, "level_config": ["CTA", "CTAF"]}


def lively(module):
    """Weights everywhere, so that a block that was not the identity would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def inputs_of(module):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    if isinstance(module, StageB):
        return draw(2, 4, 8, 8), torch.tensor([0.2, 0.9]), draw(2, 16, 3, 3), draw(2, 1, 8)
    return draw(2, 16, 4, 4), torch.tensor([0.2, 0.9]), draw(2, 5, 8), draw(2, 1, 8), draw(2, 1, 6)


@pytest.mark.parametrize(("kind", "config"), [(StageB, B), (StageC, C)])
@torch.no_grad()
def test_a_deeper_network_gives_the_same_to_the_bit(kind, config):
    shallow = lively(kind(**config))
    torch.manual_seed(3)
    deep = kind(**{**config, "blocks": [[2, 3], [1, 3]]}).eval()
    inputs = inputs_of(shallow)
    assert not torch.equal(deep(*inputs), shallow(*inputs))
    new = start_from(deep, shallow.state_dict())
    assert torch.equal(deep(*inputs), shallow(*inputs))
    assert len(list(deep.parameters())) > len(list(shallow.parameters()))
    letters = [len(level) for level in config["level_config"]]
    assert len(new) == letters[0] * (1 + 2) + letters[1] * (2 + 0)
    assert any(name.startswith("up_blocks.1.") for name in new)
    assert not any(name.startswith("up_blocks.0.") for name in new)


def test_new_blocks_can_learn():
    shallow = lively(StageC(**C))
    deep = StageC(**{**C, "blocks": [[2, 1], [1, 1]]})
    (first, *_) = start_from(deep, shallow.state_dict())
    deep(*inputs_of(deep)).square().mean().backward()
    gradient = deep.get_submodule(first).channelwise[-1].weight.grad
    assert gradient.abs().sum() > 0
    # What lies before the zeros gets its gradient once they have moved: it must not be zero itself.
    assert deep.get_submodule(first).channelwise[0].weight.abs().sum() > 0


def test_what_does_not_fit_is_refused():
    state = StageC(**C).state_dict()
    with pytest.raises(ValueError, match="no place for"):
        start_from(StageC(**C), StageC(**{**C, "blocks": [[2, 1], [1, 1]]}).state_dict())
    with pytest.raises(ValueError, match=r"shape \[16.*only grow in depth"):
        start_from(StageC(**{**C, "c_hidden": [32, 32]}), state)
    partial = {name: tensor for name, tensor in state.items() if name != "clf.1.weight"}
    with pytest.raises(ValueError, match=r"lacks 'clf.1.weight'"):
        start_from(StageC(**C), partial)
    half = {name: tensor for name, tensor in state.items() if name != "down_blocks.0.0.depthwise.weight"}
    with pytest.raises(ValueError, match=r"lacks 'down_blocks.0.0.depthwise.weight'"):
        start_from(StageC(**C), half)
