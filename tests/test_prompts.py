"""Prompts: the tokenizer, the encoder, the call, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_unet

from ddpm_faces import DDPMFacesPipeline, DDPMFacesScheduler
from ddpm_faces.pipeline_ddpm_faces import Condition, Guidance, Text, pooled, tokenize
from ddpm_faces.text import make_text_encoder, make_tokenizer, shortened


CAPTIONS = ["a smiling woman in the thirties with brown hair and glasses", "an older man, bald", "a young woman"]


def a_prompt_model(**unet) -> DDPMFacesPipeline:
    torch.manual_seed(1)
    tokenizer = make_tokenizer(CAPTIONS)
    network = tiny_unet(text_embed_dim=16, **unet)
    torch.nn.init.normal_(network.text_embedding.weight, std=0.5)
    encoder = make_text_encoder(tokenizer, dim=16).eval()
    pipeline = DDPMFacesPipeline(network, DDPMFacesScheduler(20), tokenizer=tokenizer, text_encoder=encoder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def faces(pipeline, *args, seeds=(0,), **kwargs):
    return pipeline(*args, generator=generators(*seeds), output_type="pt", **kwargs).images


# Tokenizer and encoder


def test_words_are_tokens():
    tokenizer = make_tokenizer(CAPTIONS)
    assert tokenizer.tokenize("A smiling WOMAN, bald") == ["a", "smiling", "woman", ",", "bald"]
    assert tokenizer.decode(tokenizer("an older man").input_ids) == "an older man"
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]
    with pytest.raises(ValueError, match="The captions contain no words"):
        make_tokenizer(["", " "])


def test_unknown_words_and_padding_have_no_effect():
    pipeline = a_prompt_model()
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    texts = ["a young woman", "a young woman zebra zebra", "an older man, bald"]
    together = pooled(encoder, **tokenize(tokenizer, encoder, texts))
    alone = torch.cat([pooled(encoder, **tokenize(tokenizer, encoder, [text])) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[0], together[1], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[2], atol=0.1)
    assert pooled(encoder, **tokenize(tokenizer, encoder, ["zebra", ""])).isfinite().all()


def test_clip_is_pooled_by_its_own_output():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                           num_attention_heads=2, eos_token_id=29)).eval()  # fmt: skip
    ids = torch.tensor([[1, 2, 29, 0], [3, 29, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    expected = encoder(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(pooled(encoder, ids, mask), expected)


def test_captions_are_shortened_by_phrases():
    rng = np.random.default_rng(0)
    texts = {shortened(CAPTIONS[0], rng) for _ in range(200)}
    assert {"a smiling woman", "and glasses", "in the thirties with brown hair"} < texts
    assert len(texts) == 2**4 - 2  # neither none nor all of four phrases
    assert {shortened("a young woman", rng) for _ in range(20)} == {"a young woman"}
    assert {shortened("bald, old", rng) for _ in range(20)} == {"bald", "old"}


# Calls


def test_prompts_condition_the_network():
    """The oracle evaluates the network one image at a time."""
    pipeline = a_prompt_model()
    prompts = ["an older man", "", "a young woman"]
    embeds = pipeline.encode_prompt(prompts)
    assert torch.equal(embeds[1], pipeline.unet.null_text_embed)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor(7)
    text = Text(embeds, torch.tensor([True, False, True]))
    for scale in (1.0, 3.0):
        found = pipeline.predict(x, t, Condition(text=text), Guidance(scale))
        for i in range(3):
            own = pipeline.unet(x[i : i + 1], t, text_embeds=embeds[i : i + 1]).sample
            without = pipeline.unet(x[i : i + 1], t).sample
            expected = own + (scale - 1) * (own - without)
            torch.testing.assert_close(found[i : i + 1], expected, atol=1e-4, rtol=0)


def test_calls_are_those_of_stable_diffusion():
    pipeline = a_prompt_model()
    man = faces(pipeline, "an older man", guidance_scale=2)
    woman = faces(pipeline, prompt="a young woman", guidance_scale=2)
    assert not torch.allclose(man, woman, atol=1e-3)
    both = faces(pipeline, ["an older man", "a young woman"], seeds=(0, 0), guidance_scale=2)
    torch.testing.assert_close(both, torch.cat([man, woman]), atol=1e-5, rtol=0)
    four = faces(pipeline, ["an older man", "a young woman"], seeds=(5, 0, 6, 0), num_images_per_prompt=2,
                 guidance_scale=2)  # fmt: skip
    torch.testing.assert_close(four[[1, 3]], both, atol=1e-5, rtol=0)  # the images of a prompt follow each other
    embeds = pipeline.encode_prompt("an older man")
    torch.testing.assert_close(faces(pipeline, prompt_embeds=embeds, guidance_scale=2), man, atol=1e-5, rtol=0)


def test_an_empty_prompt_means_nothing_in_particular():
    pipeline = a_prompt_model()
    plain = faces(pipeline)
    for prompt in ("", "  ", ["zebra"]):
        torch.testing.assert_close(faces(pipeline, prompt, guidance_scale=3), plain, atol=1e-5, rtol=0)


def test_a_negative_prompt_takes_the_place_of_no_prompt():
    pipeline = a_prompt_model()
    man, woman = "an older man", "a young woman"
    plain, negative = (faces(pipeline, man, guidance_scale=3, negative_prompt=text) for text in (None, woman))
    assert not torch.allclose(plain, negative, atol=1e-3)
    torch.testing.assert_close(faces(pipeline, man, guidance_scale=3, negative_prompt=""), plain, atol=1e-5, rtol=0)
    # Away from itself, nothing is left of the guidance.
    itself = faces(pipeline, man, guidance_scale=3, negative_prompt=man)
    torch.testing.assert_close(itself, faces(pipeline, man), atol=1e-4, rtol=0)
    pair = faces(pipeline, [man, woman], seeds=(0, 0), guidance_scale=3, negative_prompt=[woman, man])
    torch.testing.assert_close(pair[:1], negative, atol=1e-5, rtol=0)
    embeds = pipeline.encode_prompt(woman)
    by_embeds = faces(pipeline, man, guidance_scale=3, negative_prompt_embeds=embeds)
    torch.testing.assert_close(by_embeds, negative, atol=1e-5, rtol=0)


def test_a_guide_may_know_texts_or_not():
    pipeline = a_prompt_model()
    for knows in (16, None):
        guide = tiny_unet(block_out_channels=(4, 8), text_embed_dim=knows)
        if knows:
            torch.nn.init.normal_(guide.text_embedding.weight, std=0.5)
        pipeline.set_guide(DDPMFacesPipeline(guide, pipeline.scheduler), 2.0)
        x, t, embeds = torch.randn(1, 3, 16, 16), torch.tensor(3), pipeline.encode_prompt("an older man")
        found = pipeline.predict(x, t, Condition(text=Text(embeds, torch.tensor([True]))), Guidance(1.0, 2.0))
        own = pipeline.unet(x, t, text_embeds=embeds).sample
        worse = guide(x, t, **({"text_embeds": embeds} if knows else {})).sample
        torch.testing.assert_close(found, 2 * own - worse, atol=1e-5, rtol=0)
    other = DDPMFacesPipeline(tiny_unet(text_embed_dim=8), pipeline.scheduler)
    with pytest.raises(ValueError, match="`guide` must have a `text_embed_dim` of None or 16, as this model, got 8"):
        pipeline.set_guide(other, 2.0)


def test_a_prompt_model_travels(client, bare_client, tmp_path):
    pipeline = a_prompt_model()
    pipeline.set_guidance(guidance_scale=2.0)
    expected = faces(pipeline, "an older man")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["tokenizer"], index["_format_version"]) == (["transformers", "PreTrainedTokenizerFast"], 4)
    call = """
pipeline("an older man", generator=[torch.Generator().manual_seed(0)], output_type="pt").images.tolist()
"""
    for who, load in ((client, "DDPMFacesPipeline.from_pretrained(folder)"),
                      (bare_client, "DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)")):  # fmt: skip
        outcome = who.run(f"pipeline = {load}\nresult = {call.strip()}", folder=str(tmp_path))
        assert outcome.value == expected.tolist(), outcome.output
    copied = DDPMFacesPipeline.from_pipe(pipeline)
    copied.set_progress_bar_config(disable=True)
    assert torch.equal(faces(copied, "an older man"), expected)
    assert torch.equal(faces(pipeline.with_scheduler(pipeline.scheduler), "an older man"), expected)


def test_what_is_not_seen_is_named(caplog):
    pipeline = a_prompt_model()
    pipeline.encode_prompt(["an old man with a scar", "a young woman"])
    assert "does not know these words and ignores them: old, scar" in caplog.text
    caplog.clear()
    pipeline.encode_prompt("a young woman " * 22 + "glasses and bald")
    assert "is too long; this part is cut off: 'young woman glasses and bald'" in caplog.text
    assert "does not know" not in caplog.text
    caplog.clear()
    pipeline.encode_prompt("a young woman")
    assert not caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": 3}, "`prompt` must be a text or a list of texts, got 3"),
        ({"prompt": ["a", None]}, r"`prompt` must be a text or a list of texts, got \['a', None\]"),
        ({"prompt": []}, r"`prompt` must be a text or a list of texts, got \[\]"),
        ({"negative_prompt": "a"}, "`negative_prompt` needs a `prompt`"),
        ({"prompt": ["a", "a", "a"], "negative_prompt": ["a", "a"]}, "one for each of the 3 prompts, got 2"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 16)}, "either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 8)}, r"`prompt_embeds` must be of shape \(num_prompts, 16\), got \(1, 8\)"),
        ({"prompt": "a", "batch_size": 2}, "`batch_size` must be None with prompts, got 2: use `num_images_per_p"),
        ({"prompt": "a", "batch_size": "a"}, "`prompt` is given twice"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1, got 0"),
        ({"num_images_per_prompt": 2}, r"`num_images_per_prompt` \(2\) needs a `prompt`"),
        ({"prompt": "a", "class_labels": [0]}, "`class_labels` must be None: this model has no classes"),
        ({"prompt": "a", "guidance_scale": -1}, "`guidance_scale` must be a number of at least 0, got -1"),
    ],
)
def test_bad_prompts_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        a_prompt_model()(**call)


def test_a_prompt_needs_a_text_encoder():
    plain = DDPMFacesPipeline(tiny_unet(), DDPMFacesScheduler(20))
    with pytest.raises(ValueError, match="`prompt` must be None: this model was not trained with texts"):
        plain("a man")
    pipeline = a_prompt_model()
    without = DDPMFacesPipeline(pipeline.unet, pipeline.scheduler)
    with pytest.raises(ValueError, match="`prompt` needs the model's `tokenizer` and `text_encoder`"):
        without("a man")
    assert without(prompt_embeds=torch.zeros(1, 16), num_inference_steps=2).images
    encoder = make_text_encoder(pipeline.tokenizer, dim=8)
    with pytest.raises(ValueError, match="`text_encoder` must have a `hidden_size` of 16, .* got 8"):
        DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, tokenizer=pipeline.tokenizer, text_encoder=encoder)
    with pytest.raises(ValueError, match="`text_encoder` needs its `tokenizer`"):
        DDPMFacesPipeline(pipeline.unet, pipeline.scheduler, text_encoder=pipeline.text_encoder)


@pytest.mark.parametrize("name", ["tokenizer", "text_encoder"])
@pytest.mark.parametrize("entry", [["os", "system"], ["transformers", "Trainer"], ["diffusers", "AutoencoderKL"]])
def test_other_classes_are_refused(tmp_path, name, entry):
    pipeline = a_prompt_model()
    pipeline.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: entry}))
    with pytest.raises(ValueError, match=f"`{name}` must name a library and a class"):
        DDPMFacesPipeline.from_pretrained(tmp_path)


def test_a_huge_text_encoder_is_refused(tmp_path):
    a_prompt_model().save_pretrained(tmp_path)
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 10**9}))
    with pytest.raises(ValueError, match="`vocab_size` must be at most 1000000"):
        DDPMFacesPipeline.from_pretrained(tmp_path)
