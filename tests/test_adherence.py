"""Adherence to prompts, with generators that obey, ignore or contradict them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_evaluation import Plain
from test_prompts import a_prompt_model

from ddpm_faces import DDPMFacesPipeline
from ddpm_faces.evaluation import adherence
from ddpm_faces.evaluation.adherence import evaluate_prompts
from ddpm_faces.evaluation.attributes import CaptionReader, attributes_of, unseen_pairs
from ddpm_faces.evaluation.copies import audit_model
from ddpm_faces.evaluation.samples import Generated, open_samples
from ddpm_faces.hub.card_values import prompts_table


DECADES = {0: "a girl", 1: "a woman in the thirties", 2: "a woman in the fifties"}


def a_face(index: int) -> dict:
    """Attributes that captions state, and others that they do not; no woman has a beard."""
    rng = np.random.default_rng(index)
    gender = "male" if rng.random() < 0.5 else "female"
    beard, glasses, age = gender == "male" and bool(rng.random() < 0.4), bool(rng.random() < 0.3), rng.integers(3)
    person = {"female": DECADES[age], "male": DECADES[age].replace("girl", "boy").replace("woman", "man")}[gender]
    things = ["a beard"] * beard + ["glasses"] * glasses
    caption = " and ".join([f"{person} with {things[0]}", *things[1:]]) if things else person
    return {
        "image_id": f"{index:05}",
        "caption": caption if index % 50 else "a face",
        "gender": gender if index % 50 else None,
        "age": float([8, 35, 55][age] + rng.random()) if index % 50 else None,
        "beard": beard,
        "glasses": glasses,
        "yaw": float(rng.normal()),
        "source": "studio",
    }


def draw(gender: bool, beard: bool, glasses: bool, age: int, rng: np.random.Generator) -> np.ndarray:
    """An image whose corners show the attributes."""
    pixels = np.full((16, 16, 3), 90.0)
    pixels[:5, :5, 0] += 80 * gender
    pixels[11:, :5, 1] += 80 * beard
    pixels[:5, 11:, 2] += 80 * glasses
    pixels[11:, 11:, 0] += 50 * age
    return (pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)


def image_of(face: dict, index: int) -> Image.Image:
    age = 0 if face["age"] is None else int(face["age"] > 20) + int(face["age"] > 45)
    rng = np.random.default_rng(index)
    return Image.fromarray(draw(face["gender"] == "female", face["beard"], face["glasses"], age, rng))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset with 300 training images and 150 held-out ones."""
    folder = tmp_path_factory.mktemp("faces")
    for split, first, last in (("train", 0, 300), ("test", 1000, 1150)):
        faces = [{**a_face(index), "image": image_of(a_face(index), index)} for index in range(first, last)]
        Dataset.from_list(faces).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


class Faces(Generated):
    """Stands in for a model: an image shows what its prompt says with a probability that grows with the scale."""

    def __init__(self, guidance_scale: float) -> None:
        self.scale, self.image_size, self.prompts = guidance_scale, (16, 16), []

    def with_prompts(self, prompts):
        prompted = Faces(self.scale)
        prompted.prompts = list(prompts)
        return prompted

    def batches(self, indices):
        images = []
        for index in indices:
            rng = np.random.default_rng((7, index))
            text = self.prompts[index % len(self.prompts)]
            if rng.random() > (self.scale - 1) / 2:  # at a scale of 1 no prompt is obeyed, at 3 each
                text = a_face(int(rng.integers(10**6)))["caption"]
            age = 0 if "girl" in text or "boy" in text else 2 if "fifties" in text else 1
            female = "woman" in text or "girl" in text
            images.append(draw(female, "beard" in text, "glasses" in text, age, rng))
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def provenance(self, num_images):
        return {"seeds": f"0 to {num_images - 1}", "guidance_scale": self.scale}


@pytest.fixture
def obedient(monkeypatch):
    monkeypatch.setattr(adherence, "open_samples", lambda *_, guidance_scale, **__: Faces(guidance_scale))
    return a_prompt_model()


def by_name(results: dict, kind: str = "attributes") -> dict:
    return {entry["name"]: entry for entry in results[kind]}


def test_obedience_is_measured_at_each_scale(obedient, data):
    results = evaluate_prompts(obedient, data, guidance_scales=(1, 2, 3), networks=Plain(), num_images=300)
    found = by_name(results)
    # Not the yaw, which no caption states, the source, which is always the same, or the number of the image.
    assert {name: entry["values"] for name, entry in found.items()} == {
        "gender": ["female", "male"],
        "age": ["below 9", "9 to 40", "40 or more"],
        "beard": ["no", "yes"],
        "glasses": ["no", "yes"],
    }
    for name, entry in found.items():
        chance, values = 1 / len(entry["values"]), [result["value"] for result in entry["generated"]]
        real = entry["real"]
        assert real["value"] > (0.7 if name == "age" else 0.97)
        assert abs(values[0] - chance) < 4 * entry["generated"][0]["error"], name
        assert abs(values[1] - (real["value"] + chance) / 2) < 4 * entry["generated"][1]["error"], name
        assert abs(values[2] - real["value"]) < 4 * real["error"]
    assert {entry["n"] for entry in found.values()} <= {147, 150}
    assert found["gender"]["n"] == 147  # "a face" states no gender
    assert results["guidance_scales"] == [1, 2, 3]
    assert (results["n"], results["n_reference"], results["n_fitted"]) == (300, 150, 300)
    assert results["seeds"] == "0 to 299"
    assert results["image_size"] == "16x16"
    assert "guidance_scale" not in results

    quality = by_name(results, "quality")
    assert set(quality) == {"Faces that a detector finds", "Fréchet distance", "Precision", "Recall"}
    assert len(quality["Recall"]["generated"]) == 3

    # No training image shows these. A generator that obeys shows them all the same.
    unseen = by_name(results, "unseen")
    assert set(unseen) == {"gender female and beard yes"}
    pair = unseen["gender female and beard yes"]
    assert all("woman" in prompt or "girl" in prompt for prompt in pair["prompts"])
    assert all("beard" in prompt for prompt in pair["prompts"])
    # The classifiers have not seen them either: for them, a beard is a sign of a man.
    assert pair["generated"][0]["value"] < 0.1
    assert pair["generated"][2]["value"] > 0.3

    table = prompts_table(results)
    assert "| age (below 9, 9 to 40, 40 or more) | " in table
    assert table.splitlines()[0] == "|  | real faces | scale 1 | scale 2 | scale 3 |"
    assert all(line.count("|") == 6 for line in table.splitlines() if line)


def test_errors_are_those_of_repeated_measurements(obedient, data, monkeypatch):
    draws = []
    for first in range(0, 2000, 200):
        monkeypatch.setattr(Faces, "batches", shifted(Faces.batches, first))
        results = evaluate_prompts(obedient, data, guidance_scales=[2], networks=Plain(), num_images=150)
        draws.append(by_name(results)["glasses"]["generated"][0])
        monkeypatch.undo()
        monkeypatch.setattr(adherence, "open_samples", lambda *_, guidance_scale, **__: Faces(guidance_scale))
    spread, error = np.std([draw["value"] for draw in draws], ddof=1), np.mean([draw["error"] for draw in draws])
    assert 0.5 < spread / error < 1.7  # 10 draws


def shifted(batches, first):
    return lambda self, indices: batches(self, [first * 150 + index for index in indices])


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that a pipeline encodes."""
    prompts, encode = [], DDPMFacesPipeline.encode_texts

    def record(pipeline, prompt):
        prompts.extend(prompt)
        return encode(pipeline, prompt)

    monkeypatch.setattr(DDPMFacesPipeline, "encode_texts", record)
    return prompts


def test_a_model_is_asked_for_what_the_captions_say(data, prompts):
    pipeline = a_prompt_model()
    results = evaluate_prompts(
        pipeline, data, guidance_scales=[1, 2], networks=Plain(), num_images=60, num_inference_steps=1, batch_size=16
    )
    captions = [a_face(index)["caption"] for index in range(1000, 1060)]
    assert set(captions) <= set(prompts)
    assert results["sampler"] == "dpmsolver++"
    for entry in results["attributes"]:
        assert len(entry["generated"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "train"}, "`split` 'train' must differ from `training_split`"),
        ({"guidance_scales": []}, "`guidance_scales` must contain at least one scale"),
        ({"guidance_scales": [-1]}, "`guidance_scale` must be .* got -1"),
        ({"num_images": 19}, "`num_images` must be an integer from 20"),
        ({"caption_column": "nothing"}, "`caption_column` 'nothing' .* contains no texts"),
        ({"caption_column": "image_id"}, "`data` has no attributes that can be measured"),
        ({"split": "test[:10]"}, "`split` must have at least 20 images with captions, has 10"),
    ],
)
def test_bad_input_is_named(data, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_prompts(a_prompt_model(), data, networks=Plain(), **changes)


def test_a_model_without_texts_has_no_adherence(data, pipeline, tmp_path):
    with pytest.raises(ValueError, match="this model was not trained with texts"):
        evaluate_prompts(pipeline, data, networks=Plain(), guidance_scales=[2])
    image_of(a_face(1), 1).save(tmp_path / "face.png")
    with pytest.raises(ValueError, match="model_index.json"):
        evaluate_prompts(tmp_path, data, networks=Plain())
    with pytest.raises(ValueError, match="is a folder of images"):
        evaluate_prompts(a_prompt_model(), str(tmp_path), networks=Plain(), guidance_scales=[1])


# Attributes and captions


def test_attributes_are_columns_with_few_values():
    columns = {
        "hair": ["brown", "red", None, "brown"],
        "smile": [True, False, None, True],
        "kind": [3, 1, None, 3],
        "age": [11.0, 38.0, None, 64.0],
        "name": ["a", "a", "a", "a"],
        "nothing": [None] * 4,
        "constant": [1.0, 1.0, 1.0, None],
        "number": [str(i) for i in range(13)],
    }
    attributes = {attribute.name: attribute for attribute in attributes_of(columns)}
    assert list(attributes) == ["hair", "smile", "kind", "age"]
    assert attributes["hair"].values == ["brown", "red"]
    assert attributes["hair"].codes.tolist() == [0, 1, -1, 0]
    assert attributes["smile"].values == ["no", "yes"]
    assert attributes["smile"].codes.tolist() == [1, 0, -1, 1]
    assert attributes["kind"].values == ["1", "3"]
    assert attributes["kind"].full_name(1) == "kind 3"
    # Thirds, with round bounds; a bound belongs to the upper group.
    assert attributes["age"].codes.tolist() == [0, 1, -1, 2]
    ages = attributes_of({"age": [*range(90), 30.0]})[0]
    assert ages.values == ["below 30", "30 to 60", "60 or more"]
    assert ages.codes[[29, 30, 59, 60]].tolist() == [0, 1, 1, 2]


def a_reader(num_faces: int = 300):
    faces = [a_face(index) for index in range(num_faces)]
    attributes = attributes_of({name: [face[name] for face in faces] for name in faces[0] if name != "caption"})
    captions = [face["caption"] for face in faces]
    return CaptionReader(captions, attributes), attributes, captions


def test_captions_are_read_by_their_words():
    reader, attributes, _ = a_reader()
    names = {attribute.name: [*attribute.values, None] for attribute in attributes}

    def read(caption):
        return {name: names[name][codes[0]] for name, codes in reader.read([caption]).items()}

    assert read("A WOMAN in the fifties with glasses") == {
        "gender": "female",
        "age": "40 or more",
        "beard": "no",
        "glasses": "yes",
        "yaw": None,
    }
    assert read("a boy with a beard")["age"] == "below 9"
    assert read("a face")["gender"] is None
    assert read("a face")["age"] is None
    # No training caption says this.
    assert {name: read("a girl with a beard")[name] for name in ("gender", "beard")} == {
        "gender": "female",
        "beard": "yes",
    }


def test_unseen_pairs_are_those_of_no_training_image():
    reader, attributes, captions = a_reader()
    values = {attribute.name: list(range(len(attribute.values))) for attribute in attributes}
    pairs = unseen_pairs(reader, attributes, values, captions, captions, num_prompts=5)
    assert [pair.values for pair in pairs] == [{"gender": 0, "beard": 1}]
    assert len(pairs[0].prompts) == len(set(pairs[0].prompts)) == 5
    assert all(prompt.endswith("with a beard") for prompt in pairs[0].prompts)
    assert not any("man" in prompt.split() or "boy" in prompt.split() for prompt in pairs[0].prompts)

    # One such image, and the pair is seen.
    beards = next(attribute for attribute in attributes if attribute.name == "beard")
    woman = captions.index("a woman in the thirties")
    beards = replace(beards, codes=np.where(np.arange(300) == woman, 1, beards.codes))
    others = [beards if attribute.name == "beard" else attribute for attribute in attributes]
    assert unseen_pairs(reader, others, values, captions, captions) == []
    # Or if the pair is to be expected in fewer images.
    assert unseen_pairs(reader, attributes, values, captions, captions, min_expected=100) == []
    assert unseen_pairs(reader, attributes, values, ["a face"], captions) == []


def test_a_phrase_that_changes_the_other_value_makes_no_prompt():
    captions = ["a person"] * 50 + ["a person with a cap"] * 50
    columns = {"gender": ["female"] * 50 + ["male"] * 50, "hat": [False] * 50 + [True] * 50}
    attributes = attributes_of(columns)
    reader = CaptionReader(captions, attributes)
    assert unseen_pairs(reader, attributes, {"gender": [0, 1], "hat": [0, 1]}, captions, ["a person"]) == []


# Audit with prompts


def test_without_a_prompt_no_guidance_scale_is_recorded():
    pipeline = a_prompt_model()
    pipeline.set_guidance(guidance_scale=3.0)
    samples = open_samples(pipeline)
    assert "guidance_scale" not in samples.provenance(1)
    assert samples.with_prompts(["a woman"]).provenance(1)["guidance_scale"] == 3.0


def test_audit_takes_the_captions_of_training_images_as_prompts(tmp_path, prompts):
    for split, first in (("train", 0), ("test", 1000)):
        faces = [{**a_face(first + i), "image": image_of(a_face(first + i), first + i)} for i in range(100)]
        Dataset.from_list(faces).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    pipeline = a_prompt_model()
    settings = {"num_images": 100, "num_inference_steps": 1, "num_loss_images": 0}
    audit_model(pipeline, str(tmp_path), caption_column="caption", **settings)
    captions = [a_face(index)["caption"] for index in range(100)]
    assert sorted(prompts) == sorted(captions)
    assert prompts != captions  # at random
    prompts.clear()
    audit_model(pipeline, str(tmp_path), **settings)
    assert prompts == []
    folder = tmp_path / "pictures"
    folder.mkdir()
    image_of(a_face(1), 1).save(folder / "1.png")
    with pytest.raises(ValueError, match="`caption_column` needs a pipeline"):
        audit_model(folder, str(tmp_path), caption_column="caption", **settings)
