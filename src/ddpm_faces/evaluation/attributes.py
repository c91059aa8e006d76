"""Attributes of faces, such as `gender`: what a caption says of them, and what an image shows.

Both are learned from a dataset with captions and attributes: a decision tree reads captions, and logistic regression
on the features of a network reads images.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from ..text import phrases


try:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.tree import DecisionTreeClassifier
except ImportError as error:
    raise ImportError(f"{error}. To install it: `pip install scikit-learn`.") from error

UNKNOWN = -1
MAX_VALUES = 12  # a column of texts with more is not an attribute
_NUM_WORDS = 500  # the frequent ones, which captions are read by
_MIN_CAPTIONS = 5  # of training images, to learn what a word says
_NUM_ENDINGS = 50  # phrases to try
_STATED = 0.95  # share of the images with a caption like this that have the value


@dataclass
class Attribute:
    """An attribute with a few values.

    Args:
        name (`str`): Name of its column.
        values (`list[str]`): Names of its values.
        codes (`numpy.ndarray` of shape `(num_images,)`): Number of each image's value, or -1 where it is unknown.
    """

    name: str
    values: list[str]
    codes: np.ndarray

    def full_name(self, code: int) -> str:
        """Return the name of a value with that of the attribute, such as "hair brown"."""
        return f"{self.name} {self.values[code]}"


def attributes_of(columns: Mapping[str, Sequence[Any]]) -> list[Attribute]:
    """Find the attributes among the columns of a dataset.

    A column of texts, booleans or integers is an attribute if it has 2 to 12 different values. Other numbers are
    divided into three groups of about the same size, with round bounds.

    Args:
        columns (`Mapping`): The values of each column; `None` is an unknown value.
    """
    attributes = []
    for name, column in columns.items():
        known = [value for value in column if value is not None]
        distinct = set(known) if all(isinstance(value, str | bool | int) for value in known) else None
        if distinct is not None and 2 <= len(distinct) <= MAX_VALUES:
            ordered = sorted(distinct, key=str)
            number = {value: code for code, value in enumerate(ordered)}
            codes = [UNKNOWN if value is None else number[value] for value in column]
            names = [("no", "yes")[value] if isinstance(value, bool) else str(value) for value in ordered]
            attributes.append(Attribute(name, names, np.array(codes)))
        elif known and all(isinstance(value, int | float) for value in known):
            attributes += _groups(name, np.array([np.nan if value is None else value for value in column], float))
    return attributes


def _groups(name: str, numbers: np.ndarray) -> list[Attribute]:
    bounds = sorted({float(f"{bound:.1g}") for bound in np.nanquantile(numbers, (1 / 3, 2 / 3))})
    codes = np.where(np.isnan(numbers), UNKNOWN, np.searchsorted(bounds, numbers, side="right"))
    if len(bounds) < 2 or len(set(codes) - {UNKNOWN}) < 3:
        return []
    low, high = bounds
    return [Attribute(name, [f"below {low:g}", f"{low:g} to {high:g}", f"{high:g} or more"], codes)]


class CaptionReader:
    """Reads from the words of a caption which values of attributes it states.

    A value is stated if at least 95 % of the training images with such a caption have it. A word that is missing
    counts, too: a caption without "glasses" states that there are none if the captions of the dataset are like that.

    Args:
        captions (`list[str]`): Captions of the training images.
        attributes (`list[Attribute]`): Their attributes.
    """

    def __init__(self, captions: Sequence[str], attributes: Sequence[Attribute]) -> None:
        # The default pattern leaves out words of one letter.
        self._words = CountVectorizer(binary=True, max_features=_NUM_WORDS, token_pattern=r"\w+")
        self._trees: dict[str, DecisionTreeClassifier] = {}
        words = self._words.fit_transform(captions)
        for attribute in attributes:
            tree = DecisionTreeClassifier(criterion="entropy", min_samples_leaf=_MIN_CAPTIONS, random_state=0)
            # An unknown value is a class like others: captions without a color of hair state none.
            self._trees[attribute.name] = tree.fit(words, attribute.codes)

    def read(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Return for each attribute the value that each caption states, or -1."""
        words = self._words.transform(captions)
        stated = {}
        for name, tree in self._trees.items():
            shares = tree.predict_proba(words)
            codes = tree.classes_[shares.argmax(axis=1)]
            stated[name] = np.where(shares.max(axis=1) >= _STATED, codes, UNKNOWN)
        return stated


class ImageReader:
    """Recognizes the values of attributes from the features of an image.

    Args:
        features (`torch.Tensor` of shape `(num_images, dim)`): Features of the training images.
        attributes (`list[Attribute]`): Their attributes.
        values (`dict[str, list[int]]`): The values of each attribute to tell apart.
    """

    def __init__(
        self, features: torch.Tensor, attributes: Sequence[Attribute], values: Mapping[str, Sequence[int]]
    ) -> None:
        self._classifiers: dict[str, Pipeline] = {}
        for attribute in attributes:
            chosen = np.isin(attribute.codes, values[attribute.name])
            # Balanced, so that rare values are recognized as well as frequent ones.
            regression = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=1000)
            classifier = make_pipeline(StandardScaler(), regression)
            self._classifiers[attribute.name] = classifier.fit(features.numpy()[chosen], attribute.codes[chosen])

    def read(self, features: torch.Tensor) -> dict[str, np.ndarray]:
        """Return for each attribute the value that each image shows."""
        return {name: classifier.predict(features.numpy()) for name, classifier in self._classifiers.items()}


@dataclass
class UnseenPair:
    """Values of two attributes that no training image has together, and prompts that ask for both.

    Args:
        values (`dict[str, int]`): The number of a value for each of the two attributes.
        prompts (`list[str]`): The prompts.
    """

    values: dict[str, int]
    prompts: list[str]


def unseen_pairs(
    reader: CaptionReader,
    attributes: Sequence[Attribute],
    values: Mapping[str, Sequence[int]],
    training_captions: Sequence[str],
    captions: Sequence[str],
    num_prompts: int = 16,
    min_expected: float = 5.0,
) -> list[UnseenPair]:
    """Make prompts for pairs of values that no training image has together, such as a child with gray hair.

    A prompt is the beginning of a caption, which states one value, with a phrase that states the other.

    Args:
        reader ([`CaptionReader`]): Reads the captions.
        attributes (`list[Attribute]`): Attributes of the training images.
        values (`dict[str, list[int]]`): Their values to consider.
        training_captions (`list[str]`): Captions to take phrases from.
        captions (`list[str]`): Captions to take beginnings from.
        num_prompts (`int`, defaults to 16): Number of prompts for each pair, or fewer if the captions offer no more.
        min_expected (`float`, defaults to 5.0):
            Number of training images that would have both values if the attributes were independent.
    """
    endings = Counter(phrase for caption in training_captions for phrase in phrases(caption)[1:])
    sources: dict[str, list[int]] = {}  # of each beginning, the captions that it comes from
    for i, parts in enumerate(map(phrases, captions)):
        for count in range(1, len(parts) + 1):
            sources.setdefault(" ".join(parts[:count]), []).append(i)
    beginnings = list(sources)
    plain, whole = reader.read(beginnings), reader.read(captions)
    # A beginning states what it has in common with its captions. What it lacks may seem to state something, too.
    before = {
        name: np.array(
            [
                code if (whole[name][sources[text]] == code).all() else UNKNOWN
                for text, code in zip(beginnings, codes, strict=True)
            ]
        )
        for name, codes in plain.items()
    }
    additions = []  # from the most frequent phrase on: the texts with it, and what they state
    for ending, _ in endings.most_common(_NUM_ENDINGS):
        if not re.match(r"and\b", ending):  # which needs another phrase before it
            texts = [f"{beginning} {ending}" for beginning in beginnings]
            after = reader.read(texts)
            additions.append((texts, after, sum(after[name] != codes for name, codes in plain.items())))
    rng = np.random.default_rng(0)
    pairs = []
    for one, other in _never_together(attributes, values, min_expected):
        prompts: list[str] = []
        for ((base, base_code), (more, more_code)), (texts, after, num_changed) in product(
            ((one, other), (other, one)), additions
        ):
            # The beginning states the one value, and the phrase adds the other and nothing else.
            is_pair = (before[base] == base_code) & (after[more] == more_code) & (plain[more] != more_code)
            prompts = [texts[i] for i in np.flatnonzero(is_pair & (num_changed == 1))]
            if prompts:
                break
        if prompts:
            chosen = sorted(rng.permutation(len(prompts))[:num_prompts])
            pairs.append(UnseenPair(dict((one, other)), [prompts[i] for i in chosen]))
    return pairs


def _never_together(
    attributes: Sequence[Attribute], values: Mapping[str, Sequence[int]], min_expected: float
) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    found = []
    for i, first in enumerate(attributes):
        for second in attributes[i + 1 :]:
            known = (first.codes != UNKNOWN) & (second.codes != UNKNOWN)
            for a in values[first.name]:
                for b in values[second.name]:
                    of_a, of_b = first.codes[known] == a, second.codes[known] == b
                    expected = of_a.sum() * of_b.sum() / max(1, known.sum())
                    if expected >= min_expected and not (of_a & of_b).any():
                        found.append(((first.name, a), (second.name, b)))
    return found
