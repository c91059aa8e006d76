"""Tests of the network: the article's network, the residual network, and their use with diffusers and torch."""

import inspect
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_faces import DDPMFacesObjective, DDPMFacesScheduler, DDPMFacesUNet, DrawnFaces
from ddpm_faces.unet_ddpm_faces import AttentionLayer


RESNET = {
    "out_block_type": "norm_conv",
    "time_embedding_dim": 24,
    "time_embedding_layers": 2,
    "act_fn": "silu",
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
CONFIGS = {
    "article": {"block_out_channels": (8, 16, 32), "block_types": ("conv", "conv")},
    "resnet": {"block_out_channels": (8, 16), "block_types": ("resnet",), "layers_per_block": 2, **RESNET},
    "attention": {
        "block_out_channels": (8, 16, 24),
        "block_types": ("resnet", "resnet_attn"),
        "mid_block_type": "resnet_attn",
        "num_class_embeds": 5,
        "dropout": 0.1,
        **RESNET,
    },
    "grey": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16, 16),
        "block_types": ("conv", "resnet"),
        "mid_block_type": "resnet",
        **RESNET,
    },
    "patches": {
        "block_out_channels": (8, 16),
        "block_types": ("resnet",),
        "patch_size": 4,
        **RESNET,
    },
    "rgba_oblong": {
        "sample_size": (32, 48),
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 8, 16),
        "block_types": ("resnet", "resnet_attn"),
        **RESNET,
    },
}


def make_unet(**config):
    """A network without zero-initialised branches or initial running statistics."""
    torch.manual_seed(0)
    unet = DDPMFacesUNet(**{"sample_size": 16, **config})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in unet.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return unet.eval()


def make_inputs(unet, batch_size=2):
    generator = torch.Generator().manual_seed(1)
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = {
        "sample": torch.randn(batch_size, unet.config.in_channels, height, width, generator=generator),
        "timestep": torch.randint(300, (batch_size,), generator=generator),
    }
    if unet.config.num_class_embeds is not None:
        inputs["class_labels"] = torch.randint(unet.config.num_class_embeds, (batch_size,), generator=generator)
    return inputs


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=CONFIGS)
def unet(request):
    return make_unet(**CONFIGS[request.param])


# Patches


def test_a_patch_is_one_position():
    """The network on patches is the network on the pixels of each patch as channels."""
    unet = make_unet(**{**CONFIGS["patches"], "patch_size": 2})
    plain = make_unet(
        **{**CONFIGS["patches"], "patch_size": 1, "sample_size": 8, "in_channels": 12, "out_channels": 12}
    )
    plain.load_state_dict(unet.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 40])
    # channels in the order (color, row, column), as in PixelUnshuffle
    patches = x.reshape(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
    expected = plain(patches, t).sample.reshape(2, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    torch.testing.assert_close(unet(x, t).sample, expected)
    with pytest.raises(ValueError, match=r"must be a side or \(height, width\), each a multiple of 4 \(`patch_size`"):
        make_unet(**{**CONFIGS["patches"], "patch_size": 2, "sample_size": 18})


# The article's network, implemented independently


class SimpleBlock(nn.Module):
    def __init__(self, in_channels, out_channels, time_dim, resample):
        super().__init__()
        self.time = nn.Linear(time_dim, out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.resample = resample(out_channels, out_channels, 4, 2, 1)

    def forward(self, x, t):
        x = self.bn1(torch.relu(self.conv1(x)))
        t = torch.relu(self.time(t))
        x = x + t.view(*t.shape, 1, 1)
        x = self.bn2(torch.relu(self.conv2(x)))
        return self.resample(x)


class SimpleUnet(nn.Module):
    def __init__(self, widths=(64, 128, 256, 512, 1024), time_dim=32):
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.time_dim = time_dim
        self.time = nn.Linear(time_dim, time_dim)
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.downs = nn.ModuleList(SimpleBlock(a, b, time_dim, nn.Conv2d) for a, b in pairs)
        self.ups = nn.ModuleList(SimpleBlock(2 * b, a, time_dim, nn.ConvTranspose2d) for a, b in reversed(pairs))
        self.last = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x, t):
        half = self.time_dim // 2
        frequencies = torch.tensor([math.exp(-math.log(10000) * i / (half - 1)) for i in range(half)])
        angles = t[:, None] * frequencies
        t = torch.relu(self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)))
        x = self.first(x)
        residuals = []
        for down in self.downs:
            x = down(x, t)
            residuals.append(x)
        for up in self.ups:
            x = up(torch.cat([x, residuals.pop()], dim=1), t)
        return self.last(x)


def article_weights(unet):
    """Return the state of `unet` with the names of `SimpleUnet`."""
    renames = {
        r"^time_embedding\.0": "time",
        r"^conv_in": "first",
        r"^conv_out": "last",
        r"^(down|up)_blocks\.(\d+)\.block": r"\1s.\2",
        r"time_emb_proj": "time",
        r"norm(\d)": r"bn\1",
    }
    state_dict = {}
    for name, tensor in unet.state_dict().items():
        for pattern, replacement in renames.items():
            name = re.sub(pattern, replacement, name)
        state_dict[name] = tensor
    return state_dict


@pytest.mark.parametrize(
    ("widths", "sample_size"), [((64, 128, 256, 512, 1024), 64), ((8, 16, 24), 16)], ids=["full", "narrow"]
)
@pytest.mark.parametrize("training", [True, False])
def test_article_network(widths, sample_size, training):
    unet = make_unet(sample_size=sample_size, block_out_channels=widths, block_types=("conv",) * (len(widths) - 1))
    article = SimpleUnet(widths)
    article.load_state_dict(article_weights(unet))
    inputs = make_inputs(unet)
    with torch.no_grad():
        expected = article.train(training)(inputs["sample"], inputs["timestep"])
        actual = unet.train(training)(**inputs).sample
    assert relative_error(actual, expected) < 1e-5
    # Training changes the running statistics by the same amount.
    article_state = article.state_dict()
    for name, tensor in article_weights(unet).items():
        torch.testing.assert_close(tensor, article_state[name], rtol=1e-4, atol=1e-4)


def test_defaults_are_the_article_network():
    with torch.device("meta"):
        unet = DDPMFacesUNet()
    assert unet.num_parameters() == sum(p.numel() for p in SimpleUnet().parameters()) == 62_438_883
    with FlopCounterMode(display=False) as counter:
        unet(torch.empty(1, 3, 64, 64, device="meta"), 0)
    assert counter.get_total_flops() == pytest.approx(11.5e9, abs=0.05e9)


# The residual network, implemented independently in float64


def residual_network(unet, sample, timestep):
    """Compute a network of residual blocks from its weights, with hand-written norm, attention and time embedding."""
    config, weights = unet.config, {name: tensor.double() for name, tensor in unet.state_dict().items()}
    last = len(config.block_types)

    def affine(name, x):
        return x @ weights[f"{name}.weight"].flatten(start_dim=1).T + weights[f"{name}.bias"]

    def conv(name, x, stride=1):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def norm(name, x):
        groups = x.reshape(x.shape[0], config.norm_num_groups, -1)
        groups = groups - groups.mean(dim=-1, keepdim=True)
        groups = groups / (groups.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        weight, bias = (weights[f"{name}.{which}"].view(-1, 1, 1) for which in ("weight", "bias"))
        return groups.reshape(x.shape) * weight + bias

    def silu(x):
        return x / (1 + torch.exp(-x))

    def resnet(name, x):
        scale, shift = affine(f"{name}.time_emb_proj", temb)[:, :, None, None].chunk(2, dim=1)
        h = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", h) * (1 + scale) + shift))
        return h + (conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in weights else x)

    def attention(name, x):
        if f"{name}.to_qkv.weight" not in weights:
            return x
        tokens = norm(f"{name}.norm", x).flatten(start_dim=2).transpose(1, 2)  # (batch, positions, channels)
        attended = torch.empty_like(tokens)
        query, key, value = affine(f"{name}.to_qkv", tokens).chunk(3, dim=-1)
        for start in range(0, x.shape[1], config.attention_head_dim):
            head = slice(start, start + config.attention_head_dim)
            scores = query[..., head] @ key[..., head].transpose(1, 2) / math.sqrt(query[..., head].shape[-1])
            scores = scores.exp()
            attended[..., head] = scores / scores.sum(dim=-1, keepdim=True) @ value[..., head]
        return x + affine(f"{name}.to_out", attended).transpose(1, 2).reshape(x.shape)

    half = config.time_proj_dim // 2
    angles = timestep[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    temb = torch.cat([angles.sin(), angles.cos()], dim=-1)
    for i in range(config.time_embedding_layers):
        temb = silu(affine(f"time_embedding.{2 * i}", temb))

    x = conv("conv_in", sample.double())
    skips = []
    for level in range(last):
        for layer in range(config.layers_per_block):
            name = f"down_blocks.{level}"
            x = attention(f"{name}.attentions.{layer}", resnet(f"{name}.resnets.{layer}", x))
            skips.append(x)
        x = conv(f"down_blocks.{level}.downsample", x, stride=2)
    if config.mid_block_type is not None:
        x = resnet("mid_block.resnet2", attention("mid_block.attention", resnet("mid_block.resnet1", x)))
    for level in range(last):
        x = conv(f"up_blocks.{level}.upsample", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        for layer in range(config.layers_per_block):
            name = f"up_blocks.{level}"
            x = resnet(f"{name}.resnets.{layer}", torch.cat([x, skips.pop()], dim=1))
            x = attention(f"{name}.attentions.{layer}", x)
    return conv("conv_out", silu(norm("conv_norm_out", x)))


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["resnet"],
        CONFIGS["rgba_oblong"],
        {**CONFIGS["attention"], "num_class_embeds": None, "layers_per_block": 2},
        {
            **CONFIGS["attention"],
            "num_class_embeds": None,
            "attention_head_dim": 64,
        },  # one head with the width of its level
    ],
    ids=["resnet", "attention", "mid attention", "one head"],
)
def test_residual_network(config):
    unet = make_unet(**config)
    inputs = make_inputs(unet)
    expected = residual_network(unet, **inputs)
    with torch.no_grad():
        assert relative_error(unet(**inputs).sample, expected) < 1e-5
        inputs["sample"] = inputs["sample"].double()
        assert relative_error(unet.double()(**inputs).sample, expected) < 1e-6  # the embedding of t stays float32


# Interface


@torch.no_grad()
def test_output(unet):
    inputs = make_inputs(unet)
    output = unet(**inputs).sample
    assert output.shape == inputs["sample"].shape
    assert output.std() > 0.01
    as_tuple = unet(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1
    assert torch.equal(as_tuple[0], output)  # this also checks that equal inputs give equal outputs


@torch.no_grad()
def test_timestep_forms(unet):
    inputs = make_inputs(unet)
    expected = unet(**{**inputs, "timestep": torch.tensor([7, 7])}).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        assert torch.equal(unet(**{**inputs, "timestep": timestep}).sample, expected)
    assert not torch.allclose(unet(**{**inputs, "timestep": 8}).sample, expected)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix(unet):
    inputs = make_inputs(unet, batch_size=3)
    together = unet(**inputs).sample
    for i in range(3):
        alone = unet(**{name: value[i : i + 1] for name, value in inputs.items()}).sample
        assert relative_error(alone[0], together[i]) < 1e-5


@torch.no_grad()
def test_other_sizes(unet):
    inputs = make_inputs(unet)
    inputs["sample"] = torch.randn(2, unet.config.in_channels, unet.size_multiple, 5 * unet.size_multiple)
    assert unet(**inputs).sample.shape == inputs["sample"].shape


@torch.no_grad()
def test_save_and_load(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    names = {"config.json", "diffusion_pytorch_model.safetensors", "unet_ddpm_faces.py"}
    assert {path.name for path in Path(tmp_path).iterdir()} == names
    loaded = DDPMFacesUNet.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(**make_inputs(unet)).sample, unet(**make_inputs(unet)).sample)


@torch.no_grad()
def test_classes():
    unet = make_unet(**CONFIGS["attention"])
    inputs = make_inputs(unet)
    outputs = [unet(**{**inputs, "class_labels": torch.tensor([0, label])}).sample for label in range(5)]
    for a in range(5):
        assert relative_error(outputs[a][0], outputs[0][0]) < 1e-5
        for b in range(a):
            assert relative_error(outputs[a][1], outputs[b][1]) > 1e-3


@torch.no_grad()
def test_dropout_acts_in_training_only():
    unet = make_unet(**CONFIGS["attention"])
    inputs = make_inputs(unet)
    assert torch.equal(unet(**inputs).sample, unet(**inputs).sample)
    unet.train()
    assert relative_error(unet(**inputs).sample, unet(**inputs).sample) > 1e-3


@torch.no_grad()
def test_new_residual_network_predicts_zero():
    unet = DDPMFacesUNet(sample_size=16, **CONFIGS["attention"])
    assert not unet(**make_inputs(unet)).sample.any()


@pytest.mark.parametrize("name", ["article", "resnet", "grey", "rgba_oblong"])
def test_in_diffusers_pipeline(name):
    unet = make_unet(**CONFIGS[name])
    pipeline = DDPMPipeline(unet=unet, scheduler=DDIMScheduler(num_train_timesteps=300))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert images.shape == (2, *make_inputs(unet)["sample"].permute(0, 2, 3, 1).shape[1:])
    assert np.isfinite(images).all()
    assert images.std() > 0.01


# Training


def loss_and_gradients(unet, inputs):
    unet.zero_grad()
    torch.manual_seed(2)  # because of dropout
    output = unet(**inputs).sample
    (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {name: parameter.grad for name, parameter in unet.named_parameters()}


def test_every_parameter_gets_a_gradient(unet):
    _, gradients = loss_and_gradients(unet.train(), make_inputs(unet))
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_gradient_checkpointing(unet):
    inputs = make_inputs(unet)
    output, gradients = loss_and_gradients(unet.train(), inputs)
    unet.enable_gradient_checkpointing()
    calls = []
    unet.down_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed_output, checkpointed_gradients = loss_and_gradients(unet, inputs)
    assert len(calls) == 2
    torch.testing.assert_close(checkpointed_output, output)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing_does_not_change_batch_norm(compiled):
    # The blocks run a second time in the backward pass, and BatchNorm must not count that batch twice.
    plain, checkpointed = (make_unet(**CONFIGS["article"]).train() for _ in range(2))
    checkpointed.enable_gradient_checkpointing()
    if compiled:
        torch.compiler.reset()
        checkpointed.compile(backend="aot_eager", fullgraph=True)
    for unet in (plain, checkpointed):
        loss_and_gradients(unet, make_inputs(unet))
    expected = dict(plain.named_buffers())
    for name, buffer in checkpointed.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, expected[name], msg=name)


def test_gradient_checkpointing_supports_a_second_backward_pass():
    unet = make_unet(**CONFIGS["article"]).train()
    unet.enable_gradient_checkpointing()
    loss = unet(**make_inputs(unet)).sample.square().mean()
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}
    loss.backward()
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], msg=name)


def test_one_batch_is_learned():
    faces = np.stack([np.asarray(face["image"]) for face in DrawnFaces(8, resolution=16)])
    faces = torch.from_numpy(faces).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(0)
    unet = DDPMFacesUNet(
        sample_size=16,
        block_out_channels=(16, 32),
        block_types=("resnet",),
        mid_block_type="resnet",
        **{**RESNET, "norm_num_groups": 8, "time_embedding_dim": 64},
    )
    objective = DDPMFacesObjective(DDPMFacesScheduler())

    @torch.no_grad()
    def evaluate():
        unet.eval()
        return objective(unet, faces.repeat(16, 1, 1, 1), generator=torch.Generator().manual_seed(0)).losses.mean()

    start = evaluate()
    unet.train()
    optimizer = torch.optim.Adam(unet.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        loss = objective(unet, faces.repeat(2, 1, 1, 1), generator=generator).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert start == pytest.approx(1, abs=0.05)  # a new network predicts zero
    assert evaluate() < 0.1 * start


# Compilation, memory formats and precision


@torch.no_grad()
def test_compile(unet):
    torch.compiler.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")  # fullgraph: a graph break is an error
    inputs = make_inputs(unet)
    for timestep in (inputs["timestep"], 7):
        inputs["timestep"] = timestep
        torch.testing.assert_close(compiled(**inputs).sample, unet(**inputs).sample)


@torch.no_grad()
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_compiles_once_for_all_timesteps(kind):
    unet = make_unet(**CONFIGS["article"])
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    sample = make_inputs(unet)["sample"]
    for timestep in range(2, 8):
        torch.testing.assert_close(
            compiled(sample, kind(timestep)).sample, unet(sample, timestep).sample, msg=f"t = {timestep}"
        )
    assert len(graphs) <= 2  # the first value is compiled as a constant, the second as a variable


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_gradients_in_bfloat16_are_those_of_the_eager_network():
    torch.manual_seed(0)
    unet = DDPMFacesUNet(
        sample_size=32,
        block_out_channels=(16, 32),
        block_types="resnet",
        out_block_type="norm_conv",
        norm_num_groups=8,
        act_fn="silu",
    )
    for parameter in unet.parameters():
        if not parameter.any():  # layers that start with zeros would have gradients of zero
            torch.nn.init.normal_(parameter, std=0.05)
    unet.to(memory_format=torch.channels_last)
    sample = torch.randn(4, 3, 32, 32)

    def gradients(network) -> dict[str, torch.Tensor]:
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            prediction = network(sample, 5).sample
        prediction.float().square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}

    torch.compiler.reset()
    expected, actual = gradients(unet), gradients(torch.compile(unet))
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / (gradient.norm() + 1e-6)
        assert error < 0.1, (name, error)


@torch.no_grad()
def test_compile_repeated_blocks(unet):
    torch.compiler.reset()
    inputs, graphs = make_inputs(unet), []
    expected = unet(**inputs).sample

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(unet(**inputs).sample, expected)
    assert graphs
    num_graphs = len(graphs)
    unet(**{**inputs, "timestep": 7})
    assert len(graphs) == num_graphs  # the timestep reaches the blocks as an embedding


@pytest.mark.slow
@torch.no_grad()
def test_compile_repeated_blocks_with_the_default_backend():
    unet = make_unet(**CONFIGS["attention"])
    inputs = make_inputs(unet)
    expected = unet(**inputs).sample
    torch.compiler.reset()
    unet.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(unet(**inputs).sample, expected, atol=1e-5, rtol=1e-5)


def test_attention_backend_is_pytorchs(unet):
    unet.set_attention_backend("native")
    with pytest.raises(ValueError, match="`backend` must be 'native', got 'flash'"):
        unet.set_attention_backend("flash")


def test_channels_last(unet):
    inputs = make_inputs(unet)
    output, gradients = loss_and_gradients(unet, inputs)
    unet.to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    channels_last_output, channels_last_gradients = loss_and_gradients(unet, inputs)
    assert relative_error(channels_last_output, output) < 1e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(channels_last_gradients[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(unet, dtype):
    inputs = make_inputs(unet)
    expected = unet(**inputs).sample
    inputs["sample"] = inputs["sample"].to(dtype)
    output = unet.to(dtype)(**inputs).sample
    assert output.dtype == dtype
    assert relative_error(output, expected) < (0.05 if dtype == torch.bfloat16 else 0.005)


def test_gradients_of_focused_attention_in_bfloat16():
    """Attention that differs from an average has the gradients of float32, too."""
    torch.manual_seed(0)
    layer = AttentionLayer(32, num_groups=8, head_dim=16)
    nn.init.normal_(layer.to_qkv.weight, std=0.5)
    nn.init.normal_(layer.to_out.weight)
    sample, direction = torch.randn(2, 2, 32, 8, 8)
    gradients = []
    for is_autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            output = layer(sample)
        gradients.append(torch.autograd.grad(output.float(), layer.parameters(), direction))
    for (name, _), expected, actual in zip(layer.named_parameters(), *gradients, strict=True):
        assert relative_error(actual, expected) < 0.1, name


@pytest.mark.parametrize("is_autocast", [True, False])
def test_gradients_in_bfloat16(unet, is_autocast):
    inputs = make_inputs(unet)
    expected, expected_gradients = loss_and_gradients(unet, inputs)
    if not is_autocast:
        unet.to(torch.bfloat16)
        inputs["sample"] = inputs["sample"].to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        output, gradients = loss_and_gradients(unet, inputs)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, expected) < 0.05
    gradient, expected_gradient = (
        torch.cat([gradient.flatten().float() for gradient in every.values()])
        for every in (gradients, expected_gradients)
    )
    assert relative_error(gradient, expected_gradient) < 0.1


def test_half_precision_distinguishes_timesteps():
    # 256 and 257 are one number in bfloat16: the embedding is computed in float32.
    unet = make_unet(**CONFIGS["article"]).to(torch.bfloat16)
    sample = make_inputs(unet)["sample"].to(torch.bfloat16)
    with torch.no_grad():
        assert not torch.equal(unet(sample, 256).sample, unet(sample, 257).sample)


# Bad input


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, 1, 16, 16), r"\(batch, 3, height, width\), got \(2, 1, 16, 16\)"),
        ((3, 16, 16), r"\(batch, 3, height, width\), got \(3, 16, 16\)"),
        ((1, 2, 3, 16, 16), r"\(batch, 3, height, width\), got"),
        ((2, 3, 18, 16), "multiples of 4, got 18 x 16"),
        ((2, 3, 16, 2), "multiples of 4, got 16 x 2"),
    ],
)
def test_bad_sample(shape, match):
    unet = make_unet(**CONFIGS["article"])
    with pytest.raises(ValueError, match=match):
        unet(torch.zeros(shape), 0)


def test_missing_and_unexpected_class_labels():
    with pytest.raises(ValueError, match="`class_labels` must be given.*`num_class_embeds` is 5"):
        make_unet(**CONFIGS["attention"])(torch.zeros(1, 3, 16, 16), 0)
    with pytest.raises(ValueError, match="`class_labels` must be None"):
        make_unet(**CONFIGS["article"])(torch.zeros(1, 3, 16, 16), 0, torch.tensor([0]))


@pytest.mark.parametrize("block_type", ["conv", "resnet"])
def test_one_block_type_for_all_levels(block_type, tmp_path):
    config = {"sample_size": 32, "block_out_channels": (32, 64, 96)}
    unet = make_unet(**config, block_types=block_type)
    listed = make_unet(**config, block_types=(block_type, block_type))
    assert list(unet.config.block_types) == [block_type, block_type]
    assert unet.state_dict().keys() == listed.state_dict().keys()
    # The form that earlier versions read: one name per pair of levels.
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["block_types"] == [block_type, block_type]
    assert list(DDPMFacesUNet.from_pretrained(tmp_path).config.block_types) == [block_type, block_type]


def test_default_block_type_fits_any_number_of_levels():
    for widths in ((8, 16), (8, 8, 8), (8, 8, 8, 8, 8, 8)):
        unet = DDPMFacesUNet(sample_size=32, block_out_channels=widths)
        assert list(unet.config.block_types) == ["conv"] * (len(widths) - 1)
    with pytest.raises(ValueError, match="`block_types` must be one of 'conv', 'resnet'.*'dense'"):
        DDPMFacesUNet(block_types="dense")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"block_types": ("conv",)}, r"5 `block_out_channels` need 4, got \('conv',\)"),
        ({"block_types": ("conv", "conv", "conv", "dense")}, "`block_types` must be one of 'conv', 'resnet'.*'dense'"),
        ({"mid_block_type": "conv"}, "`mid_block_type` must be one of None, 'resnet', 'resnet_attn', got 'conv'"),
        ({"out_block_type": "norm"}, "`out_block_type` must be one of 'conv', 'norm_conv', got 'norm'"),
        ({"act_fn": "gelu"}, "`act_fn` must be one of 'relu', 'silu', got 'gelu'"),
        ({"block_out_channels": (64,), "block_types": ()}, r"`block_out_channels` must be 2 to 12 widths"),
        ({"block_out_channels": (64, 128, 0, 512, 1024)}, r"`block_out_channels` must be 2 to 12 widths"),
        ({"sample_size": 40}, r"`sample_size` must be .* multiple of 16 .*, got 40"),
        ({"sample_size": (64, 40)}, r"`sample_size` must be .* multiple of 16 .*, got \(64, 40\)"),
        ({"sample_size": (64, 64, 64)}, r"`sample_size` must be a side or \(height, width\)"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"`dropout` must lie in \[0, 1\), got -0.1"),
        ({"in_channels": 0}, "`in_channels` must be an integer from 1 to .*, got 0"),
        ({"out_channels": 0}, "`out_channels` must be an integer from 1 to .*, got 0"),
        ({"layers_per_block": 0}, "`layers_per_block` must be an integer from 1 to .*, got 0"),
        ({"time_proj_dim": 31}, "`time_proj_dim` must be even, got 31"),
        ({"time_proj_dim": 2}, "`time_proj_dim` must be an integer from 4 to 16384, got 2"),
        ({"num_class_embeds": 0}, "`num_class_embeds` must be an integer from 1 to 1000000 or None, got 0"),
    ],
)
def test_bad_config(config, match):
    with pytest.raises(ValueError, match=match), torch.device("meta"):
        DDPMFacesUNet(**config)


# Wrong values that a config.json may contain.
ODD_VALUES = [
    None,
    True,
    "x",
    "0",
    -1,
    0,
    0.5,
    2**70,
    math.inf,
    math.nan,
    [],
    {},
    [[1]],
    [5],
    [None],
    ["relu"],
    ["x"] * 2,
]


@pytest.mark.parametrize("name", list(inspect.signature(DDPMFacesUNet.__init__).parameters)[1:])
def test_config_of_wrong_types(name):
    default = inspect.signature(DDPMFacesUNet.__init__).parameters[name].default
    for value in ODD_VALUES:
        if value is default or (name == "dropout" and value in (0, 0.5)):
            continue
        with pytest.raises(ValueError, match=f"`{name}`"), torch.device("meta"):
            DDPMFacesUNet(**{name: value})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"norm_num_groups": 5}, r"`norm_num_groups` \(5\) must divide the width of each level, here 8"),
        ({"attention_head_dim": 6}, r"`attention_head_dim` \(6\) must divide the width of its level \(8\)"),
    ],
)
def test_indivisible_widths_are_refused(config, match):
    config = {**RESNET, "block_types": ("resnet_attn",), "block_out_channels": (8, 16), **config}
    with pytest.raises(ValueError, match=match), torch.device("meta"):
        DDPMFacesUNet(**config)


# Augmentation


AUGMENT = {
    "conv": {**CONFIGS["article"], "augment_dim": 3},
    "attention": {**CONFIGS["attention"], "augment_dim": 9},
}


@pytest.fixture(params=AUGMENT)
def augment_unet(request):
    return make_unet(**AUGMENT[request.param])


def make_augment_labels(unet, batch_size=2):
    return torch.randn(batch_size, unet.config.augment_dim, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_augment_labels_of_zero_have_no_effect(augment_unet):
    inputs = make_inputs(augment_unet)
    zeros = torch.zeros(2, augment_unet.config.augment_dim)
    plain = augment_unet(**inputs).sample
    assert torch.equal(augment_unet(**inputs, augment_labels=zeros).sample, plain)
    # A network without augmentation labels computes the same with the same weights.
    unet = DDPMFacesUNet.from_config({**augment_unet.config, "augment_dim": None}).eval()
    weights = augment_unet.state_dict()
    del weights["augment_embedding.weight"]
    unet.load_state_dict(weights)
    assert torch.equal(unet(**inputs).sample, plain)


@torch.no_grad()
def test_augment_labels_are_added_to_the_embedding_of_time(augment_unet):
    inputs, labels = make_inputs(augment_unet), make_augment_labels(augment_unet)
    actual = augment_unet(**inputs, augment_labels=labels).sample
    assert relative_error(actual, augment_unet(**inputs).sample) > 1e-3
    added = labels @ augment_unet.augment_embedding.weight.T
    augment_unet.time_embedding.register_forward_hook(lambda module, inputs, output: output + added)
    torch.testing.assert_close(actual, augment_unet(**inputs).sample)


@torch.no_grad()
def test_each_augment_label_applies_only_to_its_own_image(augment_unet):
    inputs = make_inputs(augment_unet)
    plain = augment_unet(**inputs).sample
    for i in range(augment_unet.config.augment_dim):
        labels = torch.zeros(2, augment_unet.config.augment_dim)
        labels[1, i] = 2.0
        output = augment_unet(**inputs, augment_labels=labels).sample
        assert relative_error(output[0], plain[0]) < 1e-5
        assert relative_error(output[1], plain[1]) > 1e-3


def test_augment_labels_give_every_parameter_a_gradient(augment_unet):
    inputs = {**make_inputs(augment_unet), "augment_labels": make_augment_labels(augment_unet)}
    _, gradients = loss_and_gradients(augment_unet.train(), inputs)
    assert "augment_embedding.weight" in gradients
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []


def test_augment_labels_of_zero_give_every_parameter_a_gradient(augment_unet):
    # The gradient is 0, not None: DistributedDataParallel would wait for it.
    inputs = {**make_inputs(augment_unet), "augment_labels": torch.zeros(2, augment_unet.config.augment_dim)}
    _, gradients = loss_and_gradients(augment_unet.train(), inputs)
    assert [name for name, gradient in gradients.items() if gradient is None] == []


def test_augment_labels_with_gradient_checkpointing(augment_unet):
    inputs = {**make_inputs(augment_unet), "augment_labels": make_augment_labels(augment_unet)}
    output, gradients = loss_and_gradients(augment_unet.train(), inputs)
    augment_unet.enable_gradient_checkpointing()
    checkpointed_output, checkpointed_gradients = loss_and_gradients(augment_unet, inputs)
    torch.testing.assert_close(checkpointed_output, output)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, msg=name)


@torch.no_grad()
def test_augment_labels_save_and_load(augment_unet, tmp_path):
    augment_unet.save_pretrained(tmp_path)
    loaded = DDPMFacesUNet.from_pretrained(tmp_path)
    assert loaded.config.augment_dim == augment_unet.config.augment_dim
    inputs = {**make_inputs(augment_unet), "augment_labels": make_augment_labels(augment_unet)}
    assert torch.equal(loaded(**inputs).sample, augment_unet(**inputs).sample)


@torch.no_grad()
def test_loads_networks_saved_before_augmentation(tmp_path):
    unet = make_unet(**CONFIGS["attention"], augment_dim=None)
    unet.save_pretrained(tmp_path)
    path = Path(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["augment_dim"]
    path.write_text(json.dumps(config))
    loaded, info = DDPMFacesUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(**make_inputs(unet)).sample, unet(**make_inputs(unet)).sample)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_augment_labels_in_half_precision(augment_unet, dtype):
    # The labels are float32 for every dtype of the weights.
    inputs, labels = make_inputs(augment_unet), make_augment_labels(augment_unet)
    expected = augment_unet(**inputs, augment_labels=labels).sample
    inputs["sample"] = inputs["sample"].to(dtype)
    output = augment_unet.to(dtype)(**inputs, augment_labels=labels).sample
    assert output.dtype == dtype
    assert relative_error(output, expected) < (0.05 if dtype == torch.bfloat16 else 0.005)


@torch.no_grad()
def test_augment_labels_compile(augment_unet):
    torch.compiler.reset()
    compiled = torch.compile(augment_unet, fullgraph=True, backend="eager")
    for inputs in (make_inputs(augment_unet), {"augment_labels": make_augment_labels(augment_unet)}):
        inputs = {**make_inputs(augment_unet), **inputs}
        torch.testing.assert_close(compiled(**inputs).sample, augment_unet(**inputs).sample)


@torch.no_grad()
def test_augment_labels_keep_the_order_of_positional_arguments(augment_unet):
    inputs = make_inputs(augment_unet)
    args = (inputs["sample"], inputs["timestep"], inputs.get("class_labels"), False)
    assert torch.equal(augment_unet(*args)[0], augment_unet(**inputs).sample)


def test_bad_augment_labels(augment_unet):
    inputs, augment_dim = make_inputs(augment_unet), augment_unet.config.augment_dim
    for shape in ((2, augment_dim + 1), (1, augment_dim), (augment_dim,), (2, augment_dim, 1)):
        match = re.escape(f"(batch, augment_dim), here (2, {augment_dim}), got {shape}")
        with pytest.raises(ValueError, match=match):
            augment_unet(**inputs, augment_labels=torch.zeros(shape))
    unet = make_unet(**CONFIGS["article"])
    with pytest.raises(ValueError, match="`augment_labels` must be None: .*`augment_dim` is None"):
        unet(**make_inputs(unet), augment_labels=torch.zeros(2, 9))


@pytest.mark.parametrize("augment_dim", [0, -1])
def test_bad_augment_dim(augment_dim):
    with pytest.raises(
        ValueError, match=f"`augment_dim` must be an integer from 1 to 16384 or None, got {augment_dim}"
    ):
        DDPMFacesUNet(augment_dim=augment_dim)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_layerwise_casting_computes_in_its_compute_type(name, storage):
    torch.manual_seed(0)
    config = {"sample_size": 16, **CONFIGS[name]}
    unet = DDPMFacesUNet(**config).eval()
    sample, labels = torch.randn(2, unet.config.in_channels, 16, 16), None
    if config.get("num_class_embeds") is not None:
        labels = torch.tensor([0, 1])
    with torch.no_grad():
        expected = unet(sample, 3, labels).sample
        unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        found = unet(sample, 3, labels).sample
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() <= 0.1 * expected.abs().mean()  # only the weights are rounded
