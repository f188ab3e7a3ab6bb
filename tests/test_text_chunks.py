"""Prompts cut into words and chunks; lengths of chunks as ComfyUI 0.3.64 gave them for single words and embeddings."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stable_cascade_nodes.cascade_ops.prompt_chunks import Position, read_prompt, split_chunks
from stable_cascade_nodes.cascade_ops.text_embeddings import load_embedding
from stable_cascade_nodes.cascade_ops.tokenizer import default_tokenizer

CAT, DOG, COMMA = 2368, 1929, 267
WIDTH = 8


def read(prompt, find=None):
    return read_prompt(prompt, default_tokenizer(), WIDTH, find)


def chunk_lengths(prompt, find=None):
    return [len(chunk) for chunk in split_chunks(read(prompt, find))]


@pytest.fixture
def embedding(tmp_path):
    """Writes an embedding of n vectors called `name`; gives the function that finds it."""

    def write(name, n, key="clip_g", width=WIDTH):
        save_file(
            {key: torch.arange(n * width, dtype=torch.float32).reshape(n, width)}, tmp_path / f"{name}.safetensors"
        )
        return lambda wanted: path if (path := tmp_path / f"{wanted}.safetensors").exists() else None

    return write


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        ("", [0]),
        ("()", [0]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 151, [75, 75, 1]),
        ("rcxfkxcxxq " * 21, [70, 70, 7]),  # 7 tokens: whole words only
        ("qbstsqtxjqd " * 20, [75, 75, 10]),  # 8 tokens: cut
        ("cat " * 74 + "cat, cat", [74, 3]),
        ("cat " * 70 + "(rcxfkxcxxq:1.2)", [70, 7]),
        ("(" + "cat " * 76 + ":1.2)", [75, 1]),
    ],
)
def test_chunks(prompt, lengths):
    assert chunk_lengths(prompt) == lengths


@pytest.mark.parametrize(("vectors", "lengths"), [(7, [70, 8]), (8, [75, 4]), (76, [75, 72]), (80, [75, 75, 1])])
def test_chunks_of_embeddings(embedding, vectors, lengths):
    assert chunk_lengths("cat " * 70 + "embedding:e dog", embedding("e", vectors)) == lengths


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 30))
def test_chunks_keep_everything_in_order(sizes, capacity):
    numbers = iter(range(10**6))
    groups = [[Position(next(numbers), 1.0) for _ in range(size)] for size in sizes]
    chunks = split_chunks(groups, capacity)
    assert list(chain(*chunks)) == list(chain(*groups))
    assert all(0 < len(chunk) <= capacity for chunk in chunks) or chunks == [[]]


def test_weights_reach_every_token():
    assert read("a (cat, dog:1.5)") == [[(320, 1.0)], [(CAT, 1.5), (COMMA, 1.5)], [(DOG, 1.5)]]


def contents(groups):
    return [content if isinstance(content, int) else content[0].item() for group in groups for content, _ in group]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("embedding:foo cat", [0, 8, CAT]),
        ("cat embedding:foo, dog", [CAT, 0, 8, COMMA, DOG]),
        ("embedding:foo\ncat", [0, 8, CAT]),
        ("embedding: foo", [0, 8]),
        ("embedding:foo embedding:foo", [0, 8, 0, 8]),
        ("cat (embedding:foo, dog:1.3)", [CAT, 0, 8, COMMA, DOG]),
        ("a,embedding", [320, COMMA, *default_tokenizer().encode("embedding")]),
    ],
)
def test_embeddings_in_a_prompt(embedding, prompt, expected):
    assert contents(read(prompt, embedding("foo", 2))) == expected


def test_embedding_inside_weights(embedding):
    assert [weight for group in read("(embedding:foo:1.2) cat", embedding("foo", 2)) for _, weight in group] == [
        1.2,
        1.2,
        1.0,
    ]


def test_a_comma_may_belong_to_the_name(embedding):
    embedding("foo", 2)
    assert contents(read("embedding:foo, cat", embedding("foo,", 1))) == [0, CAT]


def test_missing_embeddings_are_errors(embedding):
    find = embedding("foo", 1)
    with pytest.raises(ValueError, match=r"'nope', which was not found; put the file nope\.safetensors"):
        read("a cat, embedding:nope, dog", find)
    with pytest.raises(ValueError, match="without a name"):
        read("a cat embedding:", find)
    with pytest.raises(ValueError, match="no place to look"):
        read("embedding:foo")


@pytest.mark.parametrize("key", ["clip_g", "emb_params", "anything"])
def test_embedding_files(embedding, key):
    path = embedding("e", 3, key)("e")
    assert torch.equal(load_embedding(path, WIDTH), torch.arange(24.0).reshape(3, WIDTH))


def test_embedding_file_with_several_tensors(tmp_path):
    path = tmp_path / "e.safetensors"
    save_file({"clip_l": torch.zeros(1, 6), "clip_g": torch.ones(2, 8).half(), "clip_g_out": torch.zeros(2, 8)}, path)
    vectors = load_embedding(path, WIDTH)
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, torch.ones(2, 8))
    save_file({"x": torch.ones(8)}, path)
    assert load_embedding(path, WIDTH).shape == (1, 8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"clip_l": torch.zeros(2, 6)}, r"clip_l of shape \[2, 6\].*width 8"),
        ({"clip_g": torch.zeros(0, 8)}, r"shape \[0, 8\]"),
        ({"clip_g": torch.zeros(1, 2, 8)}, r"shape \[1, 2, 8\]"),
        ({"clip_g": torch.zeros(1, 8, dtype=torch.int64)}, "floating-point"),
        ({"a": torch.zeros(1, 8), "b": torch.zeros(1, 8)}, "holds the tensors a, b; expected one tensor called clip_g"),
        ({"clip_g_out": torch.zeros(1, 8)}, "no tensor"),
    ],
)
def test_wrong_embedding_files(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=message):
        load_embedding(tmp_path / "e.safetensors", WIDTH)


def test_pickled_embedding_is_refused(tmp_path):
    torch.save({"clip_g": torch.zeros(1, 8)}, tmp_path / "e.pt")
    with pytest.raises(ValueError, match=r"e\.pt could not be read as safetensors.*saved again as \.safetensors"):
        load_embedding(tmp_path / "e.pt", WIDTH)
