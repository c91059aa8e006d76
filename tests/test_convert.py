"""The article's network, as its readers have it, is compared with the converted pipeline."""

import math

import pytest
import torch
from torch import nn

from ddpm_faces.hub.convert import convert_checkpoint


class Embedding(nn.Module):
    def forward(self, t):
        frequencies = torch.exp(torch.arange(16) * -(math.log(10000) / 15))
        angles = t[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class Block(nn.Module):
    def __init__(self, width_in, width_out, up):
        super().__init__()
        self.time_mlp = nn.Linear(32, width_out)
        self.conv1 = nn.Conv2d(2 * width_in if up else width_in, width_out, 3, padding=1)
        self.transform = (nn.ConvTranspose2d if up else nn.Conv2d)(width_out, width_out, 4, 2, 1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.bnorm1, self.bnorm2 = nn.BatchNorm2d(width_out), nn.BatchNorm2d(width_out)

    def forward(self, x, t):
        h = self.bnorm1(torch.relu(self.conv1(x)))
        h = h + torch.relu(self.time_mlp(t))[..., None, None]
        return self.transform(self.bnorm2(torch.relu(self.conv2(h))))


class ArticleUNet(nn.Module):
    def __init__(self, widths=(8, 16, 32, 64)):
        super().__init__()
        self.time_mlp = nn.Sequential(Embedding(), nn.Linear(32, 32), nn.ReLU())
        self.conv0 = nn.Conv2d(3, widths[0], 3, padding=1)
        self.downs = nn.ModuleList(Block(a, b, False) for a, b in zip(widths, widths[1:], strict=False))
        up = widths[::-1]
        self.ups = nn.ModuleList(Block(a, b, True) for a, b in zip(up, up[1:], strict=False))
        self.output = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x, t):
        t, x, skips = self.time_mlp(t), self.conv0(x), []
        for down in self.downs:
            x = down(x, t)
            skips.append(x)
        for up in self.ups:
            x = up(torch.cat((x, skips.pop()), dim=1), t)
        return self.output(x)


@pytest.fixture
def article() -> ArticleUNet:
    network = ArticleUNet()
    for _ in range(3):  # statistics other than the initial ones
        network(torch.randn(4, 3, 16, 16), torch.randint(300, (4,)))
    return network.eval()


def other_names(state: dict) -> dict:
    names = {"time_mlp.1": "time.lin", "conv0": "first", "downs.": "down", "ups.": "up", "bnorm": "bn"}
    renamed = {}
    for name, value in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def other_order(state: dict) -> dict:
    return dict(sorted(state.items(), reverse=True))


@pytest.mark.parametrize("rename", [dict, other_names, other_order])
@torch.no_grad()
def test_outputs_are_equal(article, tmp_path, rename):
    torch.save(rename(article.state_dict()), tmp_path / "article.pt")
    pipeline = convert_checkpoint(tmp_path / "article.pt", sample_size=32)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0, 299])
    torch.testing.assert_close(pipeline.unet(x, t).sample, article(x, t), atol=1e-5, rtol=1e-4)
    assert pipeline.unet.config.sample_size == 32
    assert (len(pipeline.scheduler), pipeline.scheduler.config.clip_sample) == (300, False)
    assert pipeline(num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_other_checkpoints_are_refused(article, tmp_path):
    path, state = tmp_path / "file.pt", article.state_dict()
    cases = [
        (article, "contain only tensors"),
        ({"model": state}, "must contain a state dict of names and tensors, got a dict of model"),
        ([1, 2], "got a list"),
        ({}, "contains an empty state dict"),
        ({**state, "extra.weight": torch.ones(3)}, "it has extra"),
        ({k: v for k, v in state.items() if not k.startswith("ups.2")}, "it has 5 such blocks"),
        (nn.Linear(2, 2).state_dict(), "it has 0 such blocks and, beside them, linear"),
        ({**state, "output.bias": torch.tensor([math.nan, 0, 0])}, "not finite: output.bias"),
        ({**state, "conv0.bias": torch.ones(5)}, "size mismatch"),
    ]
    for content, says in cases:
        torch.save(content, path)
        with pytest.raises(ValueError, match=says):
            convert_checkpoint(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="must be a file written by torch.save"):
        convert_checkpoint(path)
    with pytest.raises(ValueError, match="must be a file, got"):
        convert_checkpoint(tmp_path / "none.pt")
