"""Pictures chosen out of a batch by number, and the numbers to choose by."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from nodes_kit import run

from stable_cascade_nodes.cascade_ops.denoisers import TextCondition
from stable_cascade_nodes.cascade_ops.numbering import numbered
from stable_cascade_nodes.cascade_ops.selection import read_indexes, select, select_text
from stable_cascade_nodes.cascade_ops.wires import Latent, read_latent


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0", [0]),
        ("0, 3, 5-7", [0, 3, 5, 6, 7]),
        ("7 2\n5;0,", [7, 2, 5, 0]),
        (" 4 - 6 , 1", [4, 5, 6, 1]),
        ("3-3", [3]),
        ("007", [7]),
        ("0-19", list(range(20))),
    ],
)
def test_numbers_and_ranges_in_their_order(text, found):
    assert read_indexes(text, 20) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "indexes names no picture and the latent holds 8 pictures, 0 to 7: write which"),
        (" ,; ", "indexes names no picture"),
        ("8", "indexes asks for picture 8 and the latent holds 8 pictures, 0 to 7: numbers count from 0"),
        ("5-99999999999", "indexes asks for picture 99999999999 and"),
        ("-1", "indexes holds '-1', expected numbers and ranges such as 0, 3, 5-7: the latent holds 8 pictures"),
        ("1.5", "indexes holds '1.5'"),
        ("1, two", "indexes holds 'two'"),
        ("5-3", "indexes holds the range 5-3, which runs backwards: write 3-5."),
        ("0-2-4", "indexes holds '0-2-4'"),
        ("2, 0-4", "indexes names picture 2 twice"),
        ("²", "indexes holds '²'"),
    ],
)
def test_what_is_not_there_or_no_number_is_refused(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_indexes(text, 8)


def test_a_single_picture_is_called_so():
    with pytest.raises(ValueError, match="picture 1 and the latent holds 1 picture, 0:"):
        read_indexes("1", 1)


@given(some.lists(some.integers(0, 40), min_size=1, unique=True), some.data())
def test_any_list_is_read_back_however_it_is_written(numbers, data):
    """Runs of consecutive numbers may be written as ranges."""
    parts, rest = [], list(numbers)
    while rest:
        length = 1
        while length < len(rest) and rest[length] == rest[0] + length:
            length += 1
        taken = data.draw(some.integers(1, length))
        parts.append(str(rest[0]) if taken == 1 else f"{rest[0]}-{rest[taken - 1]}")
        rest = rest[taken:]
    text = parts[0] + "".join(data.draw(some.sampled_from([",", ", ", " ", ";", "\n"])) + part for part in parts[1:])
    assert read_indexes(text, 41) == numbers


@given(some.integers(0, 5), some.text("0123456789-,; ", max_size=12))
def test_whatever_is_written_gives_numbers_that_are_there_or_a_sentence(count, text):
    count += 1
    try:
        found = read_indexes(text, count)
    except ValueError as error:
        assert str(error).startswith("indexes ") and str(error).endswith(".")
    else:
        assert found and all(0 <= number < count for number in found) and len(set(found)) == len(found)


# Latents -------------------------------------------------------------------------------------------------------


def batch(**fields):
    samples = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 16, 2, 3)
    return Latent(samples, 100, 60, family="tiny", compression=40.0, **fields)


def test_everything_that_belongs_to_a_picture_comes_along():
    mask = torch.rand(4, 1, 16, 16)
    latent = batch(mask=mask)
    chosen = select(latent, [3, 1])
    assert chosen.samples[:, 0, 0, 0].tolist() == [3, 1] and chosen.samples.shape == (2, 16, 2, 3)
    assert torch.equal(chosen.mask, mask[[3, 1]])
    assert (chosen.width, chosen.height, chosen.family, chosen.compression) == (100, 60, "tiny", 40.0)
    assert chosen.batch_index == (3, 1)
    assert latent.batch_index is None and latent.mask is mask and len(latent.samples) == 4


def test_a_selection_of_a_selection_keeps_the_first_numbers():
    assert select(select(batch(), [3, 1, 0]), [2, 0]).batch_index == (0, 3)
    assert select(batch(batch_index=(9, 8, 7, 6)), [1]).batch_index == (8,)


@pytest.mark.parametrize("shape", [(4, 5), (1, 16, 16), (1, 1, 16, 16)])
def test_a_mask_for_all_stays(shape):
    mask = torch.rand(shape)
    assert torch.equal(select(batch(mask=mask), [2, 0]).mask, mask)


def test_a_mask_without_channels_is_one_of_each():
    mask = torch.rand(4, 16, 16)
    assert torch.equal(select(batch(mask=mask), [2]).mask, mask[2:3])


def test_a_latent_with_too_few_numbers_is_refused():
    with pytest.raises(ValueError, match="holds 4 pictures and its batch_index 2 numbers"):
        select(batch(batch_index=(0, 1)), [0])


def test_the_same_noise_as_in_the_whole_batch():
    whole, chosen = batch(), select(batch(), [2, 0])
    noise = [torch.randn(3, generator=generator) for generator in whole.generators(11)]
    again = [torch.randn(3, generator=generator) for generator in chosen.generators(11)]
    assert torch.equal(torch.stack(again), torch.stack([noise[2], noise[0]]))


def test_texts_of_each_picture_are_chosen_and_one_for_all_stays():
    each = TextCondition(torch.rand(4, 7, 8), torch.rand(4, 8))
    chosen = select_text(each, [3, 0], 4)
    assert torch.equal(chosen.hidden, each.hidden[[3, 0]]) and torch.equal(chosen.pooled, each.pooled[[3, 0]])
    shared = TextCondition(torch.rand(1, 7, 8), torch.rand(1, 8))
    assert select_text(shared, [3, 0], 4) == shared


def test_the_node_says_what_it_took():
    answer = run("CascadeSelectLatents", latent=batch().to_wire(), indexes="2-3, 0")
    assert answer["ui"] == {"text": ["3 of 4: 2, 3, 0"]}
    assert read_latent(answer["result"][0]).batch_index == (2, 3, 0)
    with pytest.raises(ValueError, match="0 to 3"):
        run("CascadeSelectLatents", latent=batch().to_wire(), indexes="4")


def test_latents_of_stage_b_go_through_the_node_unchanged():
    wire = Latent(torch.randn(3, 4, 16, 26), 100, 60, family="tiny").to_wire("stage_b")
    chosen = run("CascadeSelectLatents", latent=wire, indexes="1")["result"][0]
    assert torch.equal(chosen["samples"], wire["samples"][1:2])
    assert read_latent(chosen, "stage_b").stage_b_pixels() == (60, 100)


# Numbers on pictures -------------------------------------------------------------------------------------------

SEVEN = """
 .....
 .###.
 ...#.
 ...#.
 ...#.
 ...#.
 .....
"""


def test_a_number_is_drawn_in_the_corner_of_each_picture():
    pictures = torch.full((12, 64, 96, 3), 0.5)
    drawn = numbered(pictures)
    assert torch.equal(pictures, torch.full_like(pictures, 0.5))
    # Two pixels for each of a digit, with a margin: one digit is 10 wide, two are 18, and all are 14 high.
    for place, picture in enumerate(drawn):
        changed = (picture != 0.5).all(-1)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        assert (rows.min(), rows.max(), columns.min()) == (0, 13, 0)
        assert columns.max() == (9 if place < 10 else 17)
        assert changed[:14, : columns.max() + 1].all()
        assert set(picture[changed].flatten().tolist()) == {0.0, 1.0}
    labels = [picture[:14, :18].numpy().tobytes() for picture in drawn]
    assert len(set(labels)) == len(labels)


def test_digits_look_like_digits():
    drawn = numbered(torch.zeros(8, 32, 32, 3))[7, 1:14:2, 1:10:2, 0]
    assert ["".join(".#"[int(value)] for value in row) for row in drawn] == SEVEN.split()


def test_numbers_grow_with_the_picture_and_are_cut_where_it_is_too_small():
    large = numbered(torch.full((1, 320, 400, 3), 0.5))
    assert (large != 0.5).any(-1).any(2).sum() == 70
    assert numbered(torch.full((1, 8, 8, 3), 0.5)).shape == (1, 8, 8, 3)


def test_the_previewer_numbers_pictures_only_when_asked(handles, host):
    wire = Latent(torch.randn(2, 16, 4, 4), 170, 170).to_wire()
    plain, counted = (
        run("CascadePreviewLatent", previewer=handles["previewer"], latent=wire, **more)["result"][0]
        for more in ({}, {"numbered": True})
    )
    assert torch.equal(counted, numbered(plain)) and not torch.equal(plain, counted)
