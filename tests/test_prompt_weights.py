"""Prompt weights; the expected values are what ComfyUI 0.3.64 gave for the same strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_cascade_nodes.cascade_ops.prompt_weights import parse_prompt

TABLE = {
    "": [],
    "a cat": [("a cat", 1.0)],
    "a (b) c": [("a ", 1.0), ("b", 1.1), (" c", 1.0)],
    "(a:1.2)": [("a", 1.2)],
    "(a: 1.3 )": [("a", 1.3)],
    "(a:-1)": [("a", -1.0)],
    "(a:0)": [("a", 0.0)],
    "(a:1e1)": [("a", 10.0)],
    "((a))": [("a", 1.21)],
    "((a):1.3)": [("a", 1.43)],
    "((a:1.2):1.3)": [("a", 1.2)],
    "((a b:1.5) c:0.5)": [("a b", 1.5), (" c", 0.5)],
    "(a (b) c:1.5)": [("a ", 1.5), ("b", 1.65), (" c", 1.5)],
    "(a:1.2)(b)": [("a", 1.2), ("b", 1.1)],
    # Not a weight: kept as text.
    "a:1.2": [("a:1.2", 1.0)],
    "(a:b)": [("a:b", 1.1)],
    "(a:)": [("a:", 1.1)],
    "(:1.2)": [(":1.2", 1.1)],
    "(a:1.2:1.3)": [("a:1.2", 1.3)],
    "(a:1.2 )b": [("a", 1.2), ("b", 1.0)],
    "()": [],
    "(())": [],
    # Square brackets are text.
    "[a]": [("[a]", 1.0)],
    "[a:1.2]": [("[a:1.2]", 1.0)],
    "([fernando]:1.2)": [("[fernando]", 1.2)],
    # Escapes.
    r"\(a\)": [("(a)", 1.0)],
    r"(\(a\):1.2)": [("(a)", 1.2)],
    r"\(a:1.2)": [("(a:1.2)", 1.0)],
    r"a\\(b)": [(r"a\(b)", 1.0)],
    r"a\b": [(r"a\b", 1.0)],
    # Parentheses that do not match.
    "(a": [("(a", 1.0)],
    "a)": [("a)", 1.0)],
    "a)b(c": [("a)b(c", 1.0)],
    "(a)b)": [("a", 1.1), ("b)", 1.0)],
    "((a)": [("(a", 1.1)],
    "(a (b:2) c": [("(a (b:2) c", 1.0)],
    "(a)(": [("a", 1.1), ("(", 1.0)],
    ")(a)": [(")(a)", 1.0)],
    ")((a))": [(")(", 1.0), ("a", 1.1), (")", 1.0)],
}


@pytest.mark.parametrize("prompt", TABLE)
def test_table(prompt):
    pieces = parse_prompt(prompt)
    assert [text for text, _ in pieces] == [text for text, _ in TABLE[prompt]]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in TABLE[prompt]])


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_a_weight_is_finite(number):
    [(text, weight)] = parse_prompt(f"(a:{number})")
    assert (text, weight) == (f"a:{number}", pytest.approx(1.1))


@settings(deadline=None)
@given(st.text())
def test_text_without_parentheses_is_unchanged(text):
    text = text.replace("(", "").replace(")", "")
    assert parse_prompt(text) == ([(text, 1.0)] if text else [])


@settings(deadline=None)
@given(st.text())
def test_escaped_text_is_unchanged(text):
    text = text.replace("\\", "")
    escaped = text.replace("(", r"\(").replace(")", r"\)")
    assert parse_prompt(escaped) == ([(text, 1.0)] if text else [])


def test_nesting_as_deep_as_one_likes():
    [(text, weight)] = parse_prompt("(" * 1500 + "a:0.5" + ")" * 1500)
    assert (text, weight) == ("a", 0.5)
