"""Videos through an image tower: CLIP4Clip's mean of frames, for each method as for images alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sidestep as ss
from dual_encoders import END, clip
from sidestep.methods import MethodConfig
from sidestep.model.frames import embed_videos

VIDEOS, FRAMES = 3, 4
METHODS: list[MethodConfig] = [
    ss.ReadConfig(rank=4),
    ss.ProbeConfig(),
    ss.SherlConfig(dropout=0.0),
    ss.SherlConfig(pool_tokens=True, hidden=8, level_gates=True),
    ss.UniPTConfig(variant="clip4clip", hidden=8),
    ss.LoraConfig(),
]


def names(config: MethodConfig) -> str:
    plain = {"pool_tokens": " clip4clip", "variant": " clip4clip"}
    return type(config).__name__ + "".join(text for name, text in plain.items() if getattr(config, name, None))


def batch(side: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 38, (VIDEOS, 7), generator=generator)
    ids[:, -1] = END
    videos = torch.randn(VIDEOS, FRAMES, 3, side, side, generator=generator)
    return {"pixel_values": videos, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def moved(method: MethodConfig) -> ss.PairModel:
    """A model that is not as it began."""
    torch.manual_seed(4)
    model = ss.attach(clip(), method, head=ss.Retrieve()).eval()
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method", METHODS, ids=names)
def test_a_video_is_the_mean_of_its_frames(method: MethodConfig) -> None:
    model, inputs = moved(method), batch()
    keep = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    found = model(**inputs, frame_mask=keep, labels=torch.arange(VIDEOS))
    rows = []
    for video, kept in zip(inputs["pixel_values"], keep, strict=True):
        frames = torch.stack([model(pixel_values=frame[None]).image_embeds[0] for frame in video[kept]])
        rows.append(F.normalize(frames.mean(0), dim=0))
    torch.testing.assert_close(found.image_embeds, torch.stack(rows))
    assert found.loss.isfinite()
    found.loss.backward()
    # a level whose scores are all below zero has no gradient in CLIP4Clip's form of SHERL
    assert any(parameter.grad is not None for name, parameter in model.trained_parameters() if name.startswith("image"))


def test_what_stands_in_the_place_of_frames_changes_nothing() -> None:
    model, inputs = moved(ss.ReadConfig(rank=4)), batch()
    keep = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])
    with torch.no_grad():
        expected = model(**inputs, frame_mask=keep).image_embeds
        inputs["pixel_values"][~keep] = 9.0
        assert torch.equal(model(**inputs, frame_mask=keep).image_embeds, expected)


def test_one_frame_is_an_image() -> None:
    model, inputs = moved(ss.ReadConfig(rank=4)), batch()
    with torch.no_grad():
        video = model(pixel_values=inputs["pixel_values"][:, :1]).image_embeds
        torch.testing.assert_close(video, model(pixel_values=inputs["pixel_values"][:, 0]).image_embeds)


def test_lengths_of_frames_do_not_weigh() -> None:
    """Each frame has length one before the mean, whatever its own length was."""
    frames = torch.randn(2, 3, 5)
    scaled = frames * torch.tensor([1.0, 5.0, 0.2])[:, None]
    found = [embed_videos(lambda x: F.normalize(x, dim=-1), each, None) for each in (frames, scaled)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0].norm(dim=-1), torch.ones(2))


def test_gradients_equal_finite_differences() -> None:
    model = ss.attach(clip().double(), ss.SherlConfig(pool_tokens=True, hidden=4), head=ss.Retrieve()).double().eval()
    inputs, labels = batch(), torch.arange(VIDEOS)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    keep = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    model(**inputs, frame_mask=keep, labels=labels).loss.backward()
    generator, step = torch.Generator().manual_seed(3), 1e-6
    for name, parameter in model.image.trained_parameters():
        if parameter.grad is None:
            continue
        way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * way
                losses.append(model(**inputs, frame_mask=keep, labels=labels).loss)
                parameter -= sign * step * way
        expected = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close((parameter.grad * way).sum(), expected, rtol=1e-4, atol=1e-7, msg=name)


def test_the_mean_is_in_full_precision_under_autocast() -> None:
    model, inputs = moved(ss.ReadConfig(rank=4)), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs, frame_mask=torch.ones(VIDEOS, FRAMES, dtype=torch.bool)).image_embeds
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(VIDEOS))
