"""Learned tokens in prompts: those of our files, of the original trainer's, and of several files together."""

import re

import pytest
import torch
from lora_kit import random_change
from safetensors.torch import save_file

from stable_cascade_nodes.cascade_ops.adapters.dialects import read_tokens
from stable_cascade_nodes.cascade_ops.adapters.lora import LoRA, LoRAWeights, apply_lora
from stable_cascade_nodes.cascade_ops.adapters.tokens import (
    LearnedToken,
    given_names,
    start_vectors,
    with_tokens,
    write_embedding,
)

TEXT = "text_model.encoder.layers.0.mlp.fc1.weight"


def table_of(encoder):
    return encoder.module.text_model.embeddings.token_embedding.weight


def hidden(handle, prompt):
    return handle.module.encode(prompt).hidden


def test_brackets_name_the_token(handles, tmp_path):
    """`[fernando]` in a prompt is what `embedding:fernando` is, weights and neighbours included."""
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    handle = handles["text_encoder"]
    token = LearnedToken("[fernando]", "dog", vectors)
    path = write_embedding(tmp_path / "fernando.safetensors", token)
    learned = with_tokens(handle, [token]).module
    for prompt in ("a picture of {}", "({}:1.4) and {}", "{}", "the {} dog" + " cat" * 74):
        expected = handle.module.encode(prompt.format(*["embedding:fernando"] * 2), lambda name: path)
        found = learned.encode(prompt.format("[fernando]", "[Fernando]"))
        assert torch.equal(found.hidden, expected.hidden) and torch.equal(found.pooled, expected.pooled)
    without = handle.module.encode("a picture of [fernando]")
    assert not torch.allclose(without.hidden, learned.encode("a picture of [fernando]").hidden)
    assert torch.equal(learned.encode("a fernando").hidden, handle.module.encode("a fernando").hidden)


def test_punctuation_beside_a_token_stays(handles):
    vectors = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    learned = with_tokens(handles["text_encoder"], [LearnedToken("<x>", "", vectors)]).module
    apart, joined = learned.encode("a <x> , red"), learned.encode("a <x>, red")
    assert torch.equal(apart.hidden, joined.hidden)


def test_an_existing_word_is_replaced(handles):
    handle = handles["text_encoder"]
    delta = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    learned = with_tokens(handle, [LearnedToken("cat", delta=delta)]).module
    table = handle.network.text_model.embeddings.token_embedding.weight
    new = LearnedToken("[n]", vectors=table[handle.module.tokenizer.encode("cat")] + delta)
    other = with_tokens(handle, [new]).module
    assert torch.equal(learned.encode("a cat").hidden, other.encode("a [n]").hidden)
    assert torch.equal(learned.encode("a dog").hidden, handle.module.encode("a dog").hidden)


def test_captions_are_plain_text(handles):
    """No weights, one sequence, the same states as a prompt's otherwise."""
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    encoder = with_tokens(handles["text_encoder"], [LearnedToken("[x]", vectors=vectors)]).module
    captions = ["a [x] dog", "cat " * 100, "(a:2)"]
    hidden, pooled = encoder.encode_captions(captions)
    assert hidden.shape == (3, 77, 64) and pooled.shape == (3, 32)
    torch.testing.assert_close(hidden[:1], encoder.encode("a [x] dog").hidden)
    torch.testing.assert_close(pooled[1:2], encoder.encode("cat " * 75).pooled)
    torch.testing.assert_close(hidden[2:], encoder.encode(r"\(a:2\)").hidden)


def test_a_token_learned_again_is_replaced(handles):
    first, second = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1)).unbind()
    once = with_tokens(handles["text_encoder"], [LearnedToken("[x]", vectors=first)])
    twice = with_tokens(once, [LearnedToken("[X]", vectors=second), LearnedToken("[y]", vectors=first)]).module
    assert torch.equal(twice.encode("[y]").hidden, once.module.encode("[x]").hidden)
    assert not torch.allclose(twice.encode("[x]").hidden, once.module.encode("[x]").hidden)


def test_tokens_stay_when_weights_change(handles):
    learned = with_tokens(handles["text_encoder"], [LearnedToken("[x]", vectors=torch.ones(1, 64))])
    change = random_change(tuple(learned.network.state_dict()[TEXT].shape))
    changed, _ = apply_lora(learned, LoRA({TEXT: change}))
    assert not torch.allclose(changed.module.encode("[x]").hidden, changed.module.encode("[y]").hidden)
    assert changed.module.tokenizer.added_tokens == ("[x]",)


def test_where_tokens_start(handles):
    encoder = handles["text_encoder"].module
    table = encoder.module.text_model.embeddings.token_embedding.weight
    red, dog = encoder.tokenizer.encode("red dog")
    torch.testing.assert_close(
        start_vectors("[x]", "red dog", 2, encoder), ((table[red] + table[dog]) / 2).repeat(2, 1)
    )
    assert torch.equal(start_vectors("dog", "", 1, encoder), table[dog][None])
    assert not start_vectors("[x]", "", 1, encoder).any()


@pytest.mark.parametrize(
    ("token", "init", "problem"),
    [
        ("[a b]", "", "neither .name. or <name> nor a word"),
        ("[(a)]", "", "neither .name. or <name> nor a word"),
        ("../up", "", "neither .name. or <name> nor a word"),
        ("unlearnable", "", r"'unlearnable' is \d tokens"),
        ("dog", "cat", "starts as itself, and was given the initial words 'cat'"),
    ],
)
def test_tokens_that_cannot_be_learned(handles, token, init, problem):
    with pytest.raises(ValueError, match=problem):
        start_vectors(token, init, 1, handles["text_encoder"].module)


def test_a_token_of_another_encoder_is_refused(handles):
    with pytest.raises(ValueError, match="12 numbers wide, this text encoder 64"):
        with_tokens(handles["text_encoder"], [LearnedToken("[x]", vectors=torch.ones(1, 12))])
    with pytest.raises(ValueError, match="does not say which word its learned token is"):
        with_tokens(handles["text_encoder"], [LearnedToken("", delta=torch.ones(1, 64))])


def reference_file(path, rows):
    """The original trainer's tokens: `rows` is id -> what is added to the row of the table."""
    tensors = {
        "weights.0.lora_down": torch.zeros(4, 8),
        "embeddings.embeddings": torch.stack(list(rows.values())),
        "embeddings.indices": torch.tensor(list(rows)),
    }
    save_file(tensors, path)
    return path


def test_a_word_of_the_original_trainer(handles, tmp_path):
    """Its vector is what the file adds to the mean of the rows that its initial words' expression finds."""
    handle = handles["text_encoder"]
    table = table_of(handle.module)
    delta = torch.randn(64, generator=torch.Generator().manual_seed(1))
    path = reference_file(tmp_path / "a.safetensors", {49408: delta})
    ids = handle.module.tokenizer.encode("dog")
    assert len(ids) == 1
    learned = with_tokens(handle, read_tokens(path, [("[fernando]", "^dog</w>")]))
    same = with_tokens(handle, [LearnedToken("[n]", vectors=table[ids] + delta)])
    assert torch.equal(hidden(learned, "a [fernando]"), hidden(same, "a [n]"))
    assert torch.equal(hidden(learned, "a (fernando:1.3) [fernando]"), hidden(same, "a (fernando:1.3) [n]"))
    weighted = hidden(learned, "a ([fernando]:1.5)")
    assert torch.equal(weighted, hidden(same, "a ([n]:1.5)")) and not torch.allclose(weighted, hidden(same, "a [n]"))
    word = with_tokens(handle, read_tokens(path, [("[fernando]", "dog")]))
    assert torch.equal(hidden(word, "a [fernando]"), hidden(learned, "a [fernando]"))
    zeros = with_tokens(handle, read_tokens(path, [("[fernando]", "")]))
    bare = with_tokens(handle, [LearnedToken("[n]", vectors=delta[None])])
    assert torch.equal(hidden(zeros, "a [fernando]"), hidden(bare, "a [n]"))


def test_initial_words_as_an_expression(handles):
    """It is looked for in the tokens as they are stored, as the original trainer does."""
    encoder = handles["text_encoder"].module
    vocabulary = encoder.tokenizer._backend.get_vocab()
    for pattern in ("^dogs?</w>", "^(red|blue)", "^cat$"):
        ids = [number for piece, number in vocabulary.items() if re.search(pattern, piece)]
        expected = table_of(encoder)[ids].double().mean(0)
        torch.testing.assert_close(start_vectors("[x]", pattern, 1, encoder)[0].double(), expected, rtol=0, atol=1e-6)
        assert len(ids) >= 1
    with pytest.raises(ValueError, match=r"'\^zzqqxx</w>' is a regular expression that is found in no token"):
        start_vectors("[x]", "^zzqqxx</w>", 1, encoder)
    with pytest.raises(ValueError, match=r"'\(dog' is no regular expression .*: write words, or correct it"):
        start_vectors("[x]", "(dog", 1, encoder)


def test_existing_words_and_pieces_of_words_by_their_rows(handles, tmp_path):
    """What an expression over the vocabulary trained: words by name, pieces by row, and new ones beside them."""
    handle = handles["text_encoder"]
    tokenizer, table = handle.module.tokenizer, table_of(handle.module)
    (cat,) = tokenizer.encode("cat")
    pieces = tokenizer.encode("unlearnable")
    assert len(pieces) > 1 and tokenizer.word(pieces[0]) == ""
    rows = {cat: torch.ones(64), 49408: torch.full((64,), 0.5), pieces[0]: -torch.ones(64)}
    tokens = read_tokens(reference_file(tmp_path / "a.safetensors", rows), [("[x]", "dog")])
    assert [(token.token, token.is_new) for token in tokens] == [("cat", False), ("[x]", True), ("", False)]
    learned = with_tokens(handle, tokens)
    edited = {"[a]": table[cat] + 1, "[b]": table[tokenizer.encode("dog")[0]] + 0.5}
    plain = with_tokens(handle, [LearnedToken(name, vectors=row[None]) for name, row in edited.items()])
    assert torch.equal(hidden(learned, "a cat and [x]"), hidden(plain, "a [a] and [b]"))
    assert torch.equal(hidden(learned, "a dog"), hidden(handle, "a dog"))
    assert torch.equal(tokens[2].completed(handle.module).vectors, table[pieces[:1]] - 1)
    assert torch.equal(learned.module.learned[pieces[0]], table[pieces[:1]] - 1)
    assert not torch.allclose(hidden(learned, "unlearnable"), hidden(handle, "unlearnable"))


def test_several_new_words(handles, tmp_path):
    handle = handles["text_encoder"]
    rows = {49409: torch.ones(64), 49408: -torch.ones(64)}
    path = reference_file(tmp_path / "a.safetensors", rows)
    names = given_names("[one] , <two>", "red, ^blue</w>")
    assert names == [("[one]", "red"), ("<two>", "^blue</w>")]
    learned = with_tokens(handle, read_tokens(path, names))
    # The first one that was configured has the lower number, wherever it stands in the file.
    one = with_tokens(handle, [LearnedToken("[one]", "red", delta=-torch.ones(1, 64))])
    assert torch.equal(hidden(learned, "[one]"), hidden(one, "[one]"))
    assert not torch.allclose(hidden(learned, "<two>"), hidden(one, "<two>"))
    assert given_names("", " ") == [] and given_names("[a],[b]", "") == [("[a]", ""), ("[b]", "")]
    assert given_names("[a], [b]", ",dog") == [("[a]", ""), ("[b]", "dog")]
    for tokens, initial in (("[a], [b]", "dog"), ("", "dog"), ("[a]", "dog, cat")):
        with pytest.raises(ValueError, match=r"initial words .* expected one for each"):
            given_names(tokens, initial)
    with pytest.raises(ValueError, match="holds 2 learned words that are new, and 1 names were given"):
        read_tokens(path, [("[one]", "red")])


def test_a_named_word_gets_another_name(handles, tmp_path):
    """So that two files that learned the same word can be used together."""
    handle = handles["text_encoder"]
    token = LearnedToken("[x]", "dog", torch.ones(1, 64))
    path = write_embedding(tmp_path / "x.safetensors", token)
    (other,) = read_tokens(path, [("[y]", "")])
    assert torch.equal(hidden(with_tokens(handle, [other]), "[y]"), hidden(with_tokens(handle, [token]), "[x]"))
    with pytest.raises(ValueError, match=r"says itself what its learned word \[x\] started as, and was given .* 'cat'"):
        read_tokens(path, [("[y]", "cat")])


def test_a_text_encoder_keeps_words_and_changes(handles):
    handle = handles["text_encoder"]
    change = LoRA({TEXT: LoRAWeights(torch.ones(1, 64), torch.ones(96, 1), 0.1)}, name="a")
    words = [LearnedToken("[x]", vectors=torch.ones(1, 64))], [LearnedToken("[y]", vectors=-torch.ones(1, 64))]

    def encoded(*steps):
        at = handle
        for step in steps:
            at = apply_lora(at, step)[0] if isinstance(step, LoRA) else with_tokens(at, step)
        return at.module.encode("a [x] and a [y]").hidden

    expected = encoded(*words, change, change)
    for order in ((change, *words, change), (words[0], change, change, words[1]), (change, change, *words)):
        assert torch.equal(encoded(*order), expected)
    for fewer in ((*words, change), (words[0], change, change), (change, change)):
        assert not torch.allclose(encoded(*fewer), expected, atol=1e-4)
