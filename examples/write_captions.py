"""Write several captions for each face of a dataset with attributes, in many words.

$ python examples/write_captions.py user/faces faces-with-captions
$ ddpm-faces train --dataset-name faces-with-captions --caption-column captions

A model knows only the words of its captions. With several captions for each image, it also understands other words for
the same thing: "elderly" beside "old", "blonde" beside "blond". The attributes are columns of the dataset: `gender`
("male" or "female"), `age` in years, `hair` ("brown", "black", "blond", "gray", "red", "bald" or "hidden"), `glasses`
("none", "glasses" or "sunglasses") and the booleans `smile`, `beard` and `headwear`. Any of them may be missing or
unknown (None). A column `caption` is kept as the first caption of each image; the words "young" and "older" in it
stand in for an unknown age.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset


COLUMNS = ("caption", "gender", "age", "smile", "hair", "beard", "headwear", "glasses")
MEN = ("man", "man", "man", "guy", "gentleman")
WOMEN = ("woman", "woman", "woman", "lady")
AGES = {  # in years, from the first to below the second
    "young": (18, 35),
    "middle-aged": (40, 60),
    "older": (50, 200),
    "old": (60, 200),
    "elderly": (65, 200),
    "senior": (65, 200),
}
DECADES = ("twenties", "thirties", "forties", "fifties", "sixties", "seventies", "eighties", "nineties")
HAIR = {
    "brown": ("brown hair",),
    "black": ("black hair", "black hair", "dark hair"),
    "blond": ("blond hair", "blonde hair", "fair hair"),
    "gray": ("gray hair", "grey hair", "white hair"),
    "red": ("red hair", "ginger hair"),
    "bald": ("a bald head", "no hair"),
}
HEADWEAR = ("a hat", "a hat", "a cap", "headwear")
BEARD = ("a beard", "a beard", "facial hair")
GLASSES = {
    "glasses": ("glasses", "glasses", "eyeglasses", "spectacles"),
    "sunglasses": ("sunglasses", "sunglasses", "dark glasses", "shades"),
}


def write_caption(face: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Write a caption of a face, such as "a smiling old man with grey hair wearing sunglasses".

    Args:
        face (`Mapping`): Its attributes.
        rng (`numpy.random.Generator`): Chooses the words.
    """
    adjective, noun, ending = person(face, rng)
    adjectives, owned, worn, missing = [adjective] if adjective else [], [], [], []

    if face.get("smile"):
        if rng.random() < 0.7:
            adjectives.insert(0, rng.choice(("smiling", "smiling", "happy", "cheerful")))
        else:
            owned.append("a smile")
    elif face.get("smile") is False and rng.random() < 0.3:
        adjectives.insert(0, "serious")

    if face.get("hair") == "bald" and rng.random() < 0.4:
        adjectives.append("bald")
    elif face.get("hair") in HAIR:
        owned.append(rng.choice(HAIR[face["hair"]]))

    if face.get("beard"):
        if rng.random() < 0.25:
            adjectives.append("bearded")
        else:
            owned.append(rng.choice(BEARD))
    elif face.get("beard") is False and noun in MEN and rng.random() < 0.15:
        adjectives.append(rng.choice(("clean-shaven", "beardless")))

    if face.get("headwear"):
        (owned if rng.random() < 0.6 else worn).append(rng.choice(HEADWEAR))
    if face.get("glasses") in GLASSES:
        (owned if rng.random() < 0.6 else worn).append(rng.choice(GLASSES[face["glasses"]]))
    elif face.get("glasses") == "none" and rng.random() < 0.1:
        missing.append("glasses")

    text = " ".join([*adjectives, noun])
    text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}{ending}"
    for word, things in {"with": owned, "wearing": worn, "without": missing}.items():
        if things:
            *others, last = rng.permutation(things)
            text += f" {word} {', '.join(others)}{' and ' if others else ''}{last}"
    return text


def person(face: Mapping[str, Any], rng: np.random.Generator) -> tuple[str, str, str]:
    """Choose an adjective of age (or ""), a noun, and an ending such as " in her thirties" (or "")."""
    gender, age = face.get("gender"), face.get("age")
    nouns = {"female": WOMEN, "male": MEN}.get(gender, ("person",))
    if age is None:
        caption = (face.get("caption") or "").split()
        is_old = face.get("hair") in ("gray", "bald")
        adjectives = ("young", "young", "young", "") if "young" in caption else ("",)
        if "older" in caption:
            adjectives = ("older", "old", "elderly", "senior") if is_old else ("older", "older", "middle-aged")
        return rng.choice(adjectives), rng.choice(nouns), ""
    if age < 3:
        return "", rng.choice(("baby", "baby", "infant", "toddler")), ""
    child = {"female": "girl", "male": "boy"}.get(gender, "child")
    if age < 13:
        return rng.choice(("", "", "little", "young")), rng.choice((child, child, "child", "kid")), ""
    if age < 20:
        return ("teenage", child, "") if rng.random() < 0.6 else ("", "teenager", "")
    if rng.random() < 0.5:
        whose = {"female": "her", "male": "his"}.get(gender, "the")
        return "", rng.choice(nouns), f" in {rng.choice((whose, 'the'))} {DECADES[min(int(age) // 10, 9) - 2]}"
    adjectives = [word for word, (first, last) in AGES.items() if first <= age < last]
    return rng.choice(adjectives or [""]), rng.choice(nouns), ""


def captions(face: Mapping[str, Any], seed: int, num_captions: int) -> list[str]:
    """Return the caption of a face, if it has one, and others that differ from it and from each other."""
    rng = np.random.default_rng(seed)
    written = [face["caption"]] if face.get("caption") else []
    written += [write_caption(face, rng) for _ in range(num_captions)]
    return list(dict.fromkeys(written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="dataset with attributes: a folder, or a repository on the Hub")
    parser.add_argument("output", help="new folder for the dataset with captions")
    parser.add_argument("--num_captions", type=int, default=6, help="captions to write for each image (default: 6)")
    args = parser.parse_args()

    output = Path(args.output)
    if args.num_captions < 1:
        parser.error(f"--num_captions must be at least 1, got {args.num_captions}.")
    if output.exists():
        parser.error(f"{args.output!r} exists already.")
    splits = load_dataset(args.dataset)
    if any("captions" in split.column_names for split in splits.values()):
        parser.error(f"{args.dataset!r} has a column `captions` already.")
    if not any({*COLUMNS} & {*split.column_names} for split in splits.values()):
        parser.error(f"{args.dataset!r} has none of the columns {', '.join(COLUMNS)}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:  # the output appears once it is complete
        data = Path(folder, "dataset", "data")
        data.mkdir(parents=True)
        for name, split in splits.items():
            faces = split.select_columns([column for column in COLUMNS if column in split.column_names])
            texts = [captions(face, seed, args.num_captions) for seed, face in enumerate(faces)]
            split.add_column("captions", texts).to_parquet(data / f"{name}-00000-of-00001.parquet")
        data.parent.rename(output)
    print(output)


if __name__ == "__main__":
    main()
