"""Changes that are no plain LoRA: LoHa, LoKr, Tucker kernels, DoRA on all of them, against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_kit import ATTENTION, handle_of, random_change, small_stage_c
from safetensors.torch import save_file

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora, write_lora
from stable_cascade_nodes.cascade_ops.adapters.loha import LoHaWeights
from stable_cascade_nodes.cascade_ops.adapters.lokr import LoKrWeights
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, apply_lora

OUT = ATTENTION + "out_proj"
CONV = "down_blocks.0.0.depthwise"
POINT = "embedding.1"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + shape[0]))


def stem_of(layer, prefix="lora_unet_"):
    return prefix + layer.replace(".", "_") if prefix.endswith("_") else prefix + layer


def changed_by(tensors, tmp_path, layer, prefix="lora_unet_", strength=1.0, like=torch.float32):
    """What a file of these tensors adds to a weight, and the weight, as float64 arrays."""
    stem = stem_of(layer, prefix)
    path = tmp_path / "a.safetensors"
    save_file({f"{stem}.{leaf}": tensor.to(like).contiguous() for leaf, tensor in tensors.items()}, path)
    handle = handle_of(small_stage_c())
    lora = read_lora(path)
    assert not lora.unread
    changed, report = apply_lora(handle, lora, strength)
    assert report.matched == (f"{layer}.weight",) and not report.unmatched
    before = handle.module.get_parameter(f"{layer}.weight").detach().double().numpy()
    return changed.module.get_parameter(f"{layer}.weight").detach().double().numpy() - before, before


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def numbers(**tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "prefix", ["lora_unet_", "lora_prior_unet_", "lora_prior_prior_", "prior.", "diffusion_model."]
)
def test_loha_is_a_product_of_two_low_rank_matrices(tmp_path, prefix):
    parts = {"hada_w1_a": random(8, 2), "hada_w1_b": random(2, 8), "hada_w2_a": random(8, 2, seed=1)}
    parts |= {"hada_w2_b": random(2, 8, seed=1), "alpha": torch.tensor(3.0)}
    found, _ = changed_by(parts, tmp_path, OUT, prefix, strength=0.7)
    n = numbers(**parts)
    expected = np.zeros((8, 8))
    for row in range(8):
        for column in range(8):
            first = sum(n["hada_w1_a"][row, r] * n["hada_w1_b"][r, column] for r in range(2))
            second = sum(n["hada_w2_a"][row, r] * n["hada_w2_b"][r, column] for r in range(2))
            expected[row, column] = 0.7 * 3.0 / 2 * first * second
    close(found, expected)


def tucker(core, a, b):
    """Element by element: core [r, s, k, k], a [r, out], b [s, in]."""
    result = np.zeros((a.shape[1], b.shape[1], *core.shape[2:]))
    for r in range(core.shape[0]):
        for s in range(core.shape[1]):
            result += np.multiply.outer(np.outer(a[r], b[s]), core[r, s])
    return result


def test_loha_of_a_kernel_in_tucker_form(tmp_path):
    parts = {"hada_w1_a": random(3, 8), "hada_w1_b": random(3, 1), "hada_w2_a": random(3, 8, seed=1)}
    parts |= {"hada_w2_b": random(3, 1, seed=1), "hada_t1": random(3, 3, 3, 3), "hada_t2": random(3, 3, 3, 3, seed=1)}
    found, _ = changed_by(parts, tmp_path, CONV)
    n = numbers(**parts)
    first = tucker(n["hada_t1"], n["hada_w1_a"], n["hada_w1_b"])
    second = tucker(n["hada_t2"], n["hada_w2_a"], n["hada_w2_b"])
    close(found, first * second)


def test_loha_of_a_kernel_written_flat(tmp_path):
    parts = {"hada_w1_a": random(8, 2), "hada_w1_b": random(2, 9), "hada_w2_a": random(8, 2, seed=1)}
    parts |= {"hada_w2_b": random(2, 9, seed=1), "alpha": torch.tensor(2.0)}
    found, _ = changed_by(parts, tmp_path, CONV)
    n = numbers(**parts)
    expected = (n["hada_w1_a"] @ n["hada_w1_b"]) * (n["hada_w2_a"] @ n["hada_w2_b"])
    close(found, expected.reshape(8, 1, 3, 3))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 4, 8]), columns=st.sampled_from([1, 2, 4, 8]), low=st.sampled_from(["", "1", "2", "12"])
)
def test_lokr_is_a_kronecker_product(tmp_path_factory, rows, columns, low):
    """Every element of the first times the whole of the second; alpha counts where one of them has a rank."""
    parts = {"alpha": torch.tensor(5.0)}
    factors = {}
    for number, shape in (("1", (rows, columns)), ("2", (8 // rows, 8 // columns))):
        if number in low:
            a, b = random(shape[0], 2, seed=int(number)), random(2, shape[1], seed=int(number))
            parts |= {f"lokr_w{number}_a": a, f"lokr_w{number}_b": b}
            factors[number] = (a.double() @ b.double()).numpy()
        else:
            parts[f"lokr_w{number}"] = random(*shape, seed=int(number))
            factors[number] = parts[f"lokr_w{number}"].double().numpy()
    found, _ = changed_by(parts, tmp_path_factory.mktemp("lokr"), OUT, "lora_prior_unet_")
    expected = np.block([[element * factors["2"] for element in row] for row in factors["1"]])
    close(found, expected * (5.0 / 2 if low else 1.0))


def test_lokr_of_kernels(tmp_path):
    whole = {"lokr_w1": random(4, 1), "lokr_w2": random(2, 1, 3, 3)}
    n = numbers(**whole)
    expected = np.concatenate([n["lokr_w1"][row, 0] * n["lokr_w2"] for row in range(4)])
    close(changed_by(whole, tmp_path, CONV)[0], expected)
    flat = {"lokr_w1": random(4, 1), "lokr_w2_a": random(2, 3), "lokr_w2_b": random(3, 9), "alpha": torch.tensor(3.0)}
    n = numbers(**flat)
    second = (n["lokr_w2_a"] @ n["lokr_w2_b"]).reshape(2, 1, 3, 3)
    expected = np.concatenate([n["lokr_w1"][row, 0] * second for row in range(4)])
    close(changed_by(flat, tmp_path, CONV)[0], expected)
    kept = {**flat, "lokr_w2_b": flat["lokr_w2_b"].reshape(3, 1, 3, 3)}
    close(changed_by(kept, tmp_path, CONV)[0], expected)
    core = {
        "lokr_w1": random(4, 1),
        "lokr_w2_a": random(3, 2),
        "lokr_w2_b": random(3, 1),
        "lokr_t2": random(3, 3, 3, 3),
    }
    n = numbers(**core)
    second = tucker(n["lokr_t2"], n["lokr_w2_a"], n["lokr_w2_b"])
    close(changed_by(core, tmp_path, CONV)[0], np.concatenate([n["lokr_w1"][row, 0] * second for row in range(4)]))


def test_lora_of_a_kernel_in_tucker_form(tmp_path):
    parts = {"lora_up.weight": random(8, 3, 1, 1), "lora_down.weight": random(2, 1, 1, 1), "alpha": torch.tensor(1.5)}
    parts["lora_mid.weight"] = random(3, 2, 3, 3)
    n = numbers(**parts)
    expected = tucker(n["lora_mid.weight"], n["lora_up.weight"][:, :, 0, 0].T, n["lora_down.weight"][:, :, 0, 0])
    close(changed_by(parts, tmp_path, CONV)[0], expected * 1.5 / 3)


def test_a_pointwise_kernel_may_be_written_as_a_matrix(tmp_path):
    parts = {"lora_up.weight": random(8, 2), "lora_down.weight": random(2, 16)}
    expected = (parts["lora_up.weight"].double() @ parts["lora_down.weight"].double()).numpy()
    close(changed_by(parts, tmp_path, POINT)[0], expected[..., None, None])


def test_dora_on_every_kind(tmp_path):
    """Each column (or row) of the changed weight has the learned size."""
    hada = {"hada_w1_a": random(8, 2), "hada_w1_b": random(2, 8), "hada_w2_a": random(8, 2, seed=1)}
    kinds = ({**hada, "hada_w2_b": random(2, 8, seed=1)}, {"lokr_w1": random(2, 4), "lokr_w2": random(4, 2)})
    for parts in kinds:
        for shape, axis in (((1, 8), 0), ((8, 1), 1)):
            scale = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(3))
            added, before = changed_by({**parts, "dora_scale": scale}, tmp_path, OUT)
            close(np.linalg.norm(before + added, axis=axis), scale.flatten().numpy())
            plain, _ = changed_by(parts, tmp_path, OUT)
            direction = (before + plain) / np.linalg.norm(before + plain, axis=axis, keepdims=True)
            close(before + added, direction * scale.double().numpy())
    with pytest.raises(ValueError, match=r"its DoRA sizes are of shape \[2, 8\], the weight of \[8, 8\]"):
        changed_by({**kinds[1], "dora_scale": torch.ones(2, 8)}, tmp_path, OUT)


def test_sixteen_bit_files_are_read_in_float32(tmp_path):
    parts = {"lokr_w1": random(2, 4), "lokr_w2": random(4, 2)}
    n = numbers(**{name: tensor.bfloat16() for name, tensor in parts.items()})
    close(changed_by(parts, tmp_path, OUT, like=torch.bfloat16)[0], np.kron(n["lokr_w1"], n["lokr_w2"]))


def test_damaged_ones_are_refused():
    with pytest.raises(ValueError, match=r"factors \[8, 2\] and \[3, 8\], whose ranks differ"):
        LoHaWeights(random(8, 2), random(3, 8), random(8, 2), random(2, 8), 1.0)
    with pytest.raises(ValueError, match=r"\[8, 2\] and \[2, 8\], \[8, 2\] and \[2, 4\], expected two pairs"):
        LoHaWeights(random(8, 2), random(2, 8), random(8, 2), random(2, 4), 1.0)
    with pytest.raises(ValueError, match=r"the core \[3, 3, 3, 3\], whose ranks differ"):
        LoHaWeights(*[random(2, 8)] * 4, 1.0, random(3, 3, 3, 3), random(3, 3, 3, 3))
    with pytest.raises(ValueError, match=r"A LoKr has the factors \[4\] and \[2, 2\]"):
        LoKrWeights(random(4), random(2, 2))


def test_half_a_change_is_not_read(tmp_path):
    """And does not spoil the rest; a file of nothing else is refused."""
    halves = {f"lora_unet_clf_1.{leaf}": random(2, 2) for leaf in ("hada_w1_a", "hada_w1_b", "lokr_w1", "lokr_w2_a")}
    save_file(halves, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA of Stable Cascade in a known dialect"):
        read_lora(tmp_path / "a.safetensors")
    whole = {f"lora_unet_embedding_1.lokr_{leaf}": random(2, 2) for leaf in ("w1", "w2")}
    save_file(halves | whole, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert list(lora.weights) == ["embedding.1.weight"] and set(lora.unread) == set(halves)


def test_only_a_lora_is_written(tmp_path):
    loha = LoHaWeights(random(8, 2), random(2, 8), random(8, 2), random(2, 8), 1.0)
    for dialect in ("comfyui", "reference"):
        with pytest.raises(
            ValueError, match=r"out_proj.weight' is changed by a LoHa, which can be applied but neither"
        ):
            write_lora(LoRA({OUT + ".weight": loha}), tmp_path / "a.safetensors", dialect, base=small_stage_c())
    assert not list(tmp_path.iterdir())
    assert random_change((8, 8)).misfit((8, 8)) == ""
