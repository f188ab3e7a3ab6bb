"""Convolutions' weights in the order that a GPU reads them in."""

import copy

import pytest
import torch
from attachment_kit import near, noise

from stable_cascade_nodes.cascade_ops import handles as handles_module
from stable_cascade_nodes.cascade_ops.memory_format import channels_last_convolutions


def several_taps(module):
    """Weights that do not lie in both orders at once."""
    return [p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p[0, 0].numel() > 1]


@pytest.mark.parametrize("stage", ["stage_a", "stage_b"])
def test_only_the_order_in_memory_changes(handles, stage):
    module = copy.deepcopy(handles[stage].module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    addresses = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    assert several_taps(module)
    assert channels_last_convolutions(module) is module
    for weight in several_taps(module):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
        # All others are where they were.
        assert tensor.is_contiguous() == (tensor.data_ptr() == addresses[name])


def test_stage_a_decodes_the_same(handles):
    module = handles["stage_a"].module
    latent = noise(1, 4, 8, 8)
    with torch.no_grad():
        near(channels_last_convolutions(copy.deepcopy(module)).decode(latent), module.decode(latent))


def test_a_copy_for_a_gpu_has_them_and_the_original_does_not(handles, monkeypatch):
    """Without a GPU, what would be copied to one stays here."""

    class Here:
        type = "cuda"

    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())
    module = handles["stage_b"].module
    copied = handles_module._copied(module, Here())
    assert all(weight.is_contiguous() for weight in several_taps(module))
    assert not any(weight.is_contiguous() for weight in several_taps(copied))


def test_a_copy_for_a_cpu_is_as_it_was(handles):
    copied = handles_module._copied(handles["stage_b"].module, torch.device("cpu"))
    assert all(weight.is_contiguous() for weight in several_taps(copied))
