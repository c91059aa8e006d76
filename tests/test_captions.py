"""Captions of datasets and folders, and their way into a batch."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_unet
from datasets import Dataset
from PIL import Image

from ddpm_faces import DDPMFacesUNet, DrawnFaces
from ddpm_faces.data import FaceBatches, load_faces
from ddpm_faces.data.captions import captions_of
from ddpm_faces.data.stream import open_stream
from ddpm_faces.pipeline_ddpm_faces import pooled, tokenize
from ddpm_faces.text import make_text_encoder, make_tokenizer
from ddpm_faces.training.scripts import set_learning_rate
from ddpm_faces.training.text import PromptedUNet, TextSide, choose_captions, parameter_groups


TEXTS = ["a man with a hat", ["a woman", "a lady"], None, ["", " a  girl\n"], "", []]
EXPECTED = [["a man with a hat"], ["a woman", "a lady"], [], ["a girl"], [], []]


@pytest.fixture
def photos(tmp_path):
    """A folder of six images, with text files beside four of them."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i, texts in enumerate(EXPECTED):
        path = tmp_path / "photos" / ("more" if i > 3 else ".") / f"{i}.png"
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)
        if i != 2:
            path.with_suffix(".txt").write_text("\n".join(texts), "utf-8")
    return tmp_path / "photos"


def test_captions_of_a_value():
    assert [captions_of(value) for value in TEXTS] == EXPECTED
    for value in (3, ["a", 3], {"a": "b"}):
        with pytest.raises(ValueError, match="a caption must be a text or a list of texts, got"):
            captions_of(value)


def test_captions_of_a_dataset(tmp_path):
    rows = [{"image": face["image"], "text": face["caption"], "texts": [face["caption"], "a face"]}
            for face in DrawnFaces(8, resolution=16)]  # fmt: skip
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    source = {"dataset_name": str(tmp_path / "set"), "resolution": 16, "cache_dir": str(tmp_path / "cache")}
    one = load_faces(**source, caption_column="text")
    assert one.captions == [[row["text"]] for row in rows]
    several = load_faces(**source, caption_column="texts")  # a cache of its own
    assert several.captions == [row["texts"] for row in rows]
    assert several.subset([3, 1]).captions == [rows[3]["texts"], rows[1]["texts"]]
    assert len({one.fingerprint, several.fingerprint, load_faces(**source).fingerprint}) == 3
    batch = next(FaceBatches(several, 4, slice(0, 4)).batches())
    numbers = [int(name.split()[1]) for name in batch["names"]]
    assert batch["captions"] == [rows[number]["texts"] for number in numbers]
    with pytest.raises(
        ValueError, match="`caption_column` 'image' of .* contains no texts. Columns that do: text, texts"
    ):
        load_faces(**source, caption_column="image")

    stream = open_stream(source["dataset_name"], resolution=(16, 16), caption_column="texts", batch_size=4)
    batch = next(stream.batches())
    assert Counter(map(tuple, batch["captions"])) <= Counter(tuple(row["texts"]) for row in rows)
    assert stream.captions(2) == [*rows[0]["texts"], *rows[1]["texts"]]


def test_captions_of_a_folder(photos, tmp_path):
    source = {"train_data_dir": str(photos), "resolution": 8, "cache_dir": str(tmp_path / "cache")}
    dataset = load_faces(**source, caption_column="txt")
    assert dataset.captions == EXPECTED
    (photos / "0.txt").write_text("an old man")  # is read again
    assert load_faces(**source, caption_column="txt").captions[0] == ["an old man"]
    stream = open_stream(train_data_dir=str(photos), resolution=(8, 8), caption_column="txt", batch_size=6)
    batch = next(stream.batches())
    assert sorted(map(tuple, batch["captions"])) == sorted(map(tuple, [["an old man"], *EXPECTED[1:]]))


def test_skipped_images_take_their_captions_along(photos, tmp_path):
    (photos / "1.png").write_bytes(b"no image")
    dataset = load_faces(train_data_dir=str(photos), resolution=8, cache_dir=str(tmp_path / "cache"),
                         caption_column="txt", skip_unreadable=True)  # fmt: skip
    assert dataset.captions == [*EXPECTED[:1], *EXPECTED[2:]]


def test_choice_depends_only_on_the_place_in_the_run():
    captions = [["a man with a hat and a beard", "a person"], ["a woman"], [], ["x", "y", "z"]] * 8
    whole = choose_captions(captions, 3, 640, slice(0, 32))
    parts = [choose_captions(captions[i : i + 8], 3, 640, slice(i, i + 8)) for i in range(0, 32, 8)]
    assert whole == [text for part in parts for text in part]
    assert whole != choose_captions(captions, 3, 672, slice(0, 32))
    assert {text for text, texts in zip(whole, captions, strict=True) if not texts} == {""}
    found = Counter(text for i in range(100) for text in choose_captions(captions[:1], 0, 8 * i, slice(0, 1)))
    assert found["a person"] > 30
    assert found["a man with a hat and a beard"] > 10
    assert found["with a hat"] > 1  # shortened


@pytest.mark.parametrize("is_trained", [True, False])
def test_network_sees_the_texts_that_are_kept(is_trained):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["a man", "a woman with a hat"])
    encoder = make_text_encoder(tokenizer, dim=16).eval()
    unet = tiny_unet(text_embed_dim=16)
    torch.nn.init.normal_(unet.text_embedding.weight, std=0.5)
    side = TextSide(tokenizer, encoder, is_trained)
    prompted = PromptedUNet(unet, encoder if is_trained else None)
    captions, is_kept = ["a man", "a woman with a hat", "", "a man"], torch.tensor([True, True, True, False])
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    for _ in range(2):  # the second time, embeddings of a frozen encoder are known
        batch = side.batch(captions, is_kept, torch.device("cpu"))
        found = prompted(x, t, **batch).sample
        for i, text in enumerate(captions):
            embeds = {} if i > 1 else {"text_embeds": _encode(tokenizer, encoder, text)}
            torch.testing.assert_close(found[i : i + 1], unet(x[i : i + 1], t[i], **embeds).sample, atol=1e-5, rtol=0)
    found.square().mean().backward()
    gradients = {name: p.grad for name, p in prompted.named_parameters()}
    assert gradients["unet.null_text_embed"].any()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    assert any(name.startswith("text_encoder") for name in gradients) == is_trained


def _encode(tokenizer, encoder, text):
    output = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state
    return output.mean(dim=1)


def test_the_encoder_learns_more_slowly_than_the_network():
    unet = tiny_unet(text_embed_dim=16)
    network = PromptedUNet(unet, make_text_encoder(make_tokenizer(["a man"]), dim=16))
    optimizer = torch.optim.SGD(parameter_groups(network), lr=1.0)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == {id(p) for p in network.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    assert {rates[id(p)] for p in unet.parameters()} == {0.5}
    assert {rates[id(p)] for p in network.text_encoder.parameters()} == {0.005}
    for plain in (unet, PromptedUNet(unet)):  # embeddings come with the batch
        (group,) = parameter_groups(plain)
        assert {id(p) for p in group["params"]} == {id(p) for p in unet.parameters()}


def test_training_keeps_texts_apart():
    """Texts that say nothing of the images are not made the same, so that the network could still learn from them."""
    torch.manual_seed(0)
    captions = ["a man", "a woman", "a girl", "a boy", "a smiling man", "a woman with a hat"]
    tokenizer = make_tokenizer(captions)
    encoder = make_text_encoder(tokenizer, dim=32)
    side, network = TextSide(tokenizer, encoder, True), PromptedUNet(tiny_unet(text_embed_dim=32), encoder)

    def embeds() -> torch.Tensor:
        with torch.no_grad():
            texts = pooled(encoder, **tokenize(tokenizer, encoder, captions))
            return F.layer_norm(torch.stack([*texts, network.unet.null_text_embed]), (32,))

    before = embeds()
    optimizer = torch.optim.AdamW(parameter_groups(network))
    set_learning_rate(optimizer, 2e-3)
    for step in range(300):
        generator = torch.Generator().manual_seed(step)
        x, noise = torch.randn(2, 6, 3, 16, 16, generator=generator)
        text = side.batch(captions, torch.rand(6, generator=generator) > 0.2, torch.device("cpu"))
        loss = F.mse_loss(network(x, torch.randint(20, (6,), generator=generator), **text).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = embeds()
    # A few steps of Adam must not turn one text into another.
    assert 0.5 < encoder.embeddings.word_embeddings.weight.std() < 2
    assert 0.5 < DDPMFacesUNet(16, text_embed_dim=64).null_text_embed.std() < 2
    spread_before, spread = ((e[:-1] - e[:-1].mean(dim=0)).norm(dim=1).mean() for e in (before, after))
    assert spread > 0.7 * spread_before
    assert F.cosine_similarity(before[-1], after[-1], dim=0) > 0.8  # of no text
