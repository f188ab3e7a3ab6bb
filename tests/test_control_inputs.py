"""What a ControlNet reads: pictures with holes, doubled latents, faces in their places."""

import json

import pytest
import torch

from stable_cascade_nodes.cascade_ops.control import (
    CONTROL_KINDS,
    Faces,
    control_picture,
    faces_of,
    identity_control,
    inpainting_control,
    random_masks,
    read_faces,
    smaller_picture,
    super_resolution_control,
    write_faces,
)
from stable_cascade_nodes.cascade_ops.models import LatentEncoder
from stable_cascade_nodes.cascade_ops.models.effnet import normalize_imagenet
from stable_cascade_nodes.cascade_ops.training.draws import Draws
from stable_cascade_nodes.cascade_ops.training.settings import CONTROL_KINDS as TRAINED_KINDS


def picture(height=64, width=96, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def vectors(count, width=8):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def test_every_kind_that_is_trained_is_described():
    assert tuple(CONTROL_KINDS) == TRAINED_KINDS
    assert [kind.channels for kind in CONTROL_KINDS.values()] == [1, 4, 16, 512]


def test_a_control_picture_has_a_cell_per_latent_cell():
    assert control_picture(picture(1024, 1024, 1), 24, 24).shape == (1, 3, 768, 768)
    same = picture()
    assert control_picture(same, 2, 3) is same
    checks = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2).float().expand(1, 3, -1, -1)
    assert (control_picture(checks, 2, 2) - 0.5).abs()[..., 4:-4, 4:-4].max() < 0.05  # smoothed, not picked


def test_a_hole_is_white_and_marked():
    image, mask = picture(), torch.zeros(1, 64, 96)
    mask[:, 10:20, 30:50] = 1
    control = inpainting_control(image, mask)
    assert control.shape == (2, 4, 64, 96)
    assert torch.equal(control[:, 3], mask.expand(2, -1, -1))
    hole = mask[0].bool()
    assert control[:, :3, hole].eq(1).all()
    assert torch.equal(control[:, :3, ~hole], image[:, :, ~hole])
    assert torch.equal(inpainting_control(image, 0.5 * mask[:, None]), control)
    assert torch.equal(inpainting_control(image, 0.49 * mask)[:, :3], image)


def test_masks_of_another_size_or_batch_are_refused():
    for mask in (torch.zeros(2, 1, 64, 64), torch.zeros(3, 64, 96)):
        with pytest.raises(ValueError, match="for 2 pictures of 96 x 64"):
            inpainting_control(picture(), mask)


def test_random_masks_belong_to_their_sample():
    whole = random_masks(Draws(3, 7, range(8)), 64, 96)
    assert torch.equal(random_masks(Draws(3, 7, range(8)), 64, 96), whole)
    assert torch.equal(random_masks(Draws(3, 7, [5, 2]), 64, 96), whole[[5, 2]])
    assert not torch.equal(random_masks(Draws(3, 8, range(8)), 64, 96), whole)
    assert len({mask.numpy().tobytes() for mask in whole}) == 8


def test_random_masks_cover_a_sensible_share_of_every_kind():
    masks = random_masks(Draws(0, 0, range(300)), 96, 128)
    shares = masks.mean(dim=(1, 2, 3))
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert 0.1 <= shares.min() < 0.15
    assert 0.7 < shares.max() <= 0.8
    assert 0.3 < shares.mean() < 0.5
    middle, corners = masks[:, 0, 48, 64], masks[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    outpainting = (middle == 0) & corners.all(dim=1)
    assert 20 < outpainting.sum() < 150
    assert 60 < (middle == 1).sum() < 240


def test_a_picture_too_small_for_any_drawn_mask_is_masked_in_the_middle():
    masks = random_masks(Draws(0, 0, range(40)), 2, 2)
    shares = masks.mean(dim=(1, 2, 3))
    assert masks.shape == (40, 1, 2, 2)
    assert shares.min() > 0


def test_super_resolution_repeats_each_cell_of_the_latent():
    torch.manual_seed(0)
    encoder = LatentEncoder(widths=[8] * 7 + [16], depths=[1] * 6).eval()
    image = picture()
    with torch.no_grad():
        latent = encoder(normalize_imagenet(image))
    control = super_resolution_control(encoder, image)
    assert control.shape == (2, 16, 4, 6)
    assert not control.requires_grad
    for row in (0, 1):
        for column in (0, 1):
            assert torch.equal(control[..., row::2, column::2], latent)


def test_the_smaller_picture_is_half_and_whole_cells():
    image = picture(128, 192)
    assert torch.equal(smaller_picture(image), image[..., ::2, ::2])
    assert smaller_picture(picture(96, 160)).shape[-2:] == (64, 96)


def test_faces_are_painted_where_they_are():
    boxes = torch.tensor([[0.0, 0.0, 32.0, 64.0], [64.0, 32.0, 96.0, 64.0]])
    embeddings = vectors(2)
    painted = identity_control([Faces(boxes, embeddings, 96, 64)], 64, 96, 8)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    assert painted.shape == (1, 8, 2, 3)
    assert torch.allclose(painted[0, :, :, 0], unit[0][:, None].expand(-1, 2))
    assert torch.allclose(painted[0, :, 1, 2], unit[1])
    assert painted[0, :, :, 1].abs().max() == painted[0, :, 0, 2].abs().max() == 0


def test_faces_follow_the_size_of_the_map_and_the_crop():
    whole = Faces(torch.tensor([[400.0, 0.0, 500.0, 100.0]]), vectors(1), 1000, 500)
    wide = identity_control([whole], 320, 640, 8)[0].any(dim=0)
    assert wide.nonzero().tolist() == [[row, column] for row in (0, 1) for column in range(8, 10)]
    cut = whole.cropped(256, 256)  # the middle 500 x 500, so 250 is taken from the left
    assert (cut.width, cut.height) == (256, 256)
    assert torch.allclose(cut.boxes, torch.tensor([[150.0, 0.0, 250.0, 100.0]]) * 256 / 500)
    outside = Faces(torch.tensor([[0.0, 0.0, 200.0, 100.0]]), vectors(1), 1000, 500).cropped(256, 256)
    assert not identity_control([outside], 256, 256, 8).any()


def test_small_faces_get_a_cell_and_are_seen_before_large_ones():
    boxes = torch.tensor([[40.0, 40.0, 45.0, 45.0], [0.0, 0.0, 96.0, 96.0]])
    embeddings = vectors(2)
    painted = identity_control([Faces(boxes, embeddings, 96, 96)], 96, 96, 8)[0]
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    assert torch.allclose(painted[:, 1, 1], unit[0])
    assert torch.allclose(painted[:, 0, 0], unit[1])
    assert torch.allclose(painted[:, 2, 1], unit[1])


def test_four_faces_count_and_none_gives_zeros():
    sides = [64.0, 32.0, 64.0, 64.0, 64.0]
    boxes = torch.tensor([[64.0 * i, 0.0, 64.0 * i + side, side] for i, side in enumerate(sides)])
    five = Faces(boxes, vectors(5), 320, 64)
    none = Faces(torch.zeros(0, 4), torch.zeros(0, 1), 320, 64)
    painted = identity_control([five, none], 64, 320, 8)
    assert painted[0, :, 0].any(dim=0).tolist() == [True, True, False, False, *[True] * 6]
    assert not painted[1].any()


def test_face_files_in_both_formats(tmp_path):
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0]])
    found = {"anna.jpg": Faces(boxes, vectors(1), 96, 64), "sea.v2.png": Faces(boxes[:0], vectors(1)[:0], 32, 48)}
    lines = [
        {
            "name": name,
            "width": faces.width,
            "height": faces.height,
            "faces": [
                {"box": box.tolist(), "embedding": vector.tolist()}
                for box, vector in zip(faces.boxes, faces.embeddings, strict=True)
            ],
        }
        for name, faces in found.items()
    ]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for path in (tmp_path / "f.jsonl", write_faces(tmp_path / "f.safetensors", found)):
        read = read_faces(path)
        assert read.keys() == found.keys()
        for name, faces in found.items():
            assert (read[name].width, read[name].height) == (faces.width, faces.height)
            assert torch.allclose(read[name].boxes, faces.boxes)
            assert len(read[name].embeddings) == len(faces.embeddings)
        assert torch.allclose(read["anna.jpg"].embeddings, vectors(1))
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_picture_is_found_by_its_path_or_its_name():
    one = Faces(torch.zeros(0, 4), torch.zeros(0, 1), 1, 1)
    assert faces_of({"anna.jpg": one}, "people/anna.jpg") is one
    assert faces_of({"anna": one}, "people/anna.jpg") is one
    assert faces_of({"anna.jpg": one}, "anna") is one
    with pytest.raises(ValueError, match="no entry for the picture 'anna'"):
        faces_of({"anna.jpg": one, "anna.png": one}, "anna")
    with pytest.raises(ValueError, match=r"no entry for the picture 'people/bert\.jpg'"):
        faces_of({"anna": one}, "people/bert.jpg")


def test_faces_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        read_faces(tmp_path / "none.jsonl")
    (tmp_path / "f.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected \.jsonl or \.safetensors"):
        read_faces(tmp_path / "f.npz")
    (tmp_path / "f.safetensors").write_bytes(b"not that")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_faces(tmp_path / "f.safetensors")
    entry = {"name": "a", "width": 8, "height": 8, "faces": [{"box": [1, 2, 3], "embedding": [1.0]}]}
    (tmp_path / "f.jsonl").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="line 1 cannot be read"):
        read_faces(tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match="8 numbers and the ControlNet reads 512"):
        identity_control([Faces(torch.zeros(1, 4), vectors(1), 8, 8)], 32, 32)
