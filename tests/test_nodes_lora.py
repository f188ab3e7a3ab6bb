"""The LoRA node's names for learned words, what it says, and what it refuses."""

import shutil

import pytest
import torch
from attachment_kit import samples
from nodes_kit import load, run, sample_c
from safetensors.torch import load_file, save_file
from test_nodes_adapters import lora_file

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_lora, write_lora
from stable_cascade_nodes.cascade_ops.adapters.tokens import LearnedToken

TOKEN = LearnedToken("[look]", "dog", vectors=torch.ones(1, 64), delta=torch.full((1, 64), 0.5))


@pytest.fixture
def loras(fuller_host, tmp_path):
    fuller_host.root = shutil.copytree(fuller_host.root, tmp_path / "models")
    return fuller_host.root / "loras"


@pytest.fixture
def reference(loras):
    """The original trainer's layout, as another tool leaves it: without a name for the word."""
    lora = read_lora(lora_file(loras / "named.safetensors", tokens=(TOKEN,)))
    path = write_lora(lora, loras / "reference.safetensors", "reference", base=load("CascadeLoadStageC").module)
    save_file(load_file(path), path)
    return path.name


def applied(file, encoder=True, **inputs):
    if encoder:
        inputs["text_encoder"] = load("CascadeLoadTextEncoder")
    return run("CascadeLoadLoRA", stage_c=load("CascadeLoadStageC"), file=file, strength=1.0, **inputs)


def encoded(answer, text):
    return run("CascadeEncodeText", text_encoder=answer["result"][1], text=text)["result"][0][0][0]


def test_words_of_the_original_trainer_are_named(reference):
    answer = applied(reference, token="[pet]", initial_word="^dog</w>")
    assert answer["ui"]["text"][-1] == "learned words: [pet]"
    plain = applied("named.safetensors")
    expected = plain["result"][1].module.with_tokens({})
    table = expected.module.text_model.embeddings.token_embedding.weight
    vectors = table[expected.tokenizer.encode("dog")] + 0.5
    for prompt in ("a {}", "a ({}:1.4) on red"):
        found = encoded(answer, prompt.format("[pet]"))
        assert torch.equal(found, expected.with_tokens({"[q]": vectors}).encode(prompt.format("[q]")).hidden)
    assert not torch.allclose(encoded(answer, "a ([pet]:1.4) on red"), encoded(answer, "a [pet] on red"))


def test_words_without_names(reference):
    with pytest.raises(ValueError, match=r"reference.safetensors learned 1 new words .* write them into 'token'"):
        applied(reference)
    alone = applied(reference, encoder=False)
    assert alone["ui"]["text"][-1].endswith("and the learned words a word without a name")
    off = applied(reference, text_strength=0.0)
    assert off["ui"]["text"] == alone["ui"]["text"][:1]
    plain = load("CascadeLoadTextEncoder")
    assert torch.equal(encoded(off, "a [pet]"), plain.module.encode("a [pet]").hidden)


def test_a_named_word_can_be_renamed(reference):
    renamed, plain = applied("named.safetensors", token="<mine>"), applied("named.safetensors")
    assert torch.equal(encoded(renamed, "a <mine>"), encoded(plain, "a [look]"))
    assert not torch.allclose(encoded(renamed, "a [look]"), encoded(plain, "a [look]"))


@pytest.mark.parametrize(
    ("file", "inputs", "problem"),
    [
        ("named", {"token": "[a]", "initial_word": "cat"}, r"says itself what its learned word \[look\] started as"),
        ("named", {"token": "[a], [b]"}, r"holds 1 learned words that are new, and 2 names were given .\[a\], \[b\]."),
        ("reference", {"initial_word": "dog"}, r"1 initial words .dog. were given for 0 learned words .none."),
        ("reference", {"token": "[a]", "initial_word": "dog, cat"}, "2 initial words .dog, cat. were given for 1"),
        ("reference", {"token": "a pet"}, "'a pet' is neither"),
        ("named", {"token": "[a]", "encoder": False}, r"token is '\[a\]' and no text encoder is connected"),
        ("wordless", {"token": "[a]"}, "holds 0 learned words that are new, and 1 names were given"),
    ],
)
def test_names_that_mean_nothing_are_refused(loras, reference, file, inputs, problem):
    lora_file(loras / "wordless.safetensors")
    with pytest.raises(ValueError, match=problem):
        applied(f"{file}.safetensors", **inputs)


def test_many_words_are_not_all_said(loras):
    words = ["cat", "dog", "red", "blue", "green", "sun", "tree"]
    lora_file(loras / "many.safetensors", tokens=[LearnedToken(word, vectors=torch.ones(1, 64)) for word in words])
    assert applied("many.safetensors")["ui"]["text"][-1] == "learned words: cat, dog, red, blue, green and 2 more"


def test_the_loras_own_guidance_is_used(fuller_host, loras):
    lora = read_lora(lora_file(loras / "plain.safetensors"))
    write_lora(lora, loras / "few.safetensors", defaults={"guidance": 1.0})
    answer = applied("few.safetensors", encoder=False)
    assert answer["ui"]["text"][1] == "samples from now on with the LoRA's own guidance 1, where these are 0"
    own = load("CascadeLoadStageC").info.defaults["guidance"]
    few, again, plain, usual = (
        samples(sample_c(fuller_host, stage_c=applied(f"{file}.safetensors", False)["result"][0], guidance=guidance)[0])
        for file, guidance in (("few", 0.0), ("plain", 1.0), ("plain", 0.0), ("few", own))
    )
    assert torch.equal(few, again) and torch.equal(plain, usual)
    assert not torch.equal(few, plain)


def test_loras_in_a_row_are_the_same_in_any_order(fuller_host, loras):
    first = read_lora(lora_file(loras / "a.safetensors"))
    write_lora(first, loras / "b.safetensors")
    stage_c = load("CascadeLoadStageC")

    def through(*steps):
        handle = stage_c
        for file, strength in steps:
            inputs = {"stage_c": handle, "file": f"{file}.safetensors", "strength": strength}
            handle = run("CascadeLoadLoRA", **inputs)["result"][0]
        return samples(sample_c(fuller_host, stage_c=handle)[0])

    assert torch.equal(through(("a", 0.3), ("b", -1.0)), through(("b", -1.0), ("a", 0.3)))
    plain = samples(sample_c(fuller_host, stage_c=stage_c)[0])
    assert torch.equal(through(("a", 1.0), ("b", -1.0)), plain) and not torch.equal(through(("a", 1.0)), plain)
