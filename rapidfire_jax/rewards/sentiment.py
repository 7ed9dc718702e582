"""How positive a response sounds, judged by a classifier fitted on labelled reviews.

TF-IDF of words and word pairs (sublinear counts) into logistic regression. Responses are short, so it is fitted on
passages of 25 words rather than on whole reviews, and without an intercept: a text it knows nothing of scores 0.5.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special

from rapidfire_jax.data.records import LINE_BREAK, locate, read_records
from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError
from rapidfire_jax.user_cache import cache_folder

PASSAGE = 25
INVERSE_REGULARISATION = 3.0
ARRAYS = ("terms", "idf", "weights", "accuracy", "counts")


def positive_sentiment(
    prompts: list[str],
    responses: list[str],
    *,
    path: str,
    text_column: str = "text",
    label_column: str = "label",
    where: Mapping[str, str] | None = None,
    train: Sequence[float] = (0.0, 0.5),
    held_out: Sequence[float] = (0.85, 1.0),
    max_features: int = 100_000,
) -> list[float]:
    """Probability in [0, 1] that each response is positive; the prompt does not count, and an empty response is 0.5.

    The first call fits the classifier, or reads it from the user's cache folder, and prints its accuracy on standard
    error.

    Args:
      prompts: not looked at.
      responses: texts to judge.
      path: a CSV or JSONL file of labelled texts, or `package://DISTRIBUTION/FILE`.
      text_column: the text.
      label_column: 1 for positive, 0 for negative.
      where: column -> value; only such rows are used.
      train: range of text hashes to fit on; see `rapidfire_jax.data.splits.fraction`.
      held_out: range of text hashes to measure the accuracy on.
      max_features: how many words and word pairs are looked at, the most frequent ones.

    Raises:
      InputError: unusable data or ranges.
    """
    for name, place in (("train", train), ("held_out", held_out)):
        if not (len(place) == 2 and 0 <= place[0] < place[1] <= 1):
            raise InputError(f"positive_sentiment: {name}={place}; give two rising fractions such as [0.0, 0.5]")
    if max(train[0], held_out[0]) < min(train[1], held_out[1]):
        raise InputError(f"positive_sentiment: train={train} and held_out={held_out} overlap")
    if max_features < 1:
        raise InputError(f"positive_sentiment: max_features={max_features}; give 1 or more")
    arguments = {
        "path": str(locate(path).absolute()),
        "text_column": text_column,
        "label_column": label_column,
        "where": {key: str(value) for key, value in (where or {}).items()},
        "train": list(train),
        "held_out": list(held_out),
        "max_features": max_features,
    }
    return _classifier(json.dumps(arguments, sort_keys=True)).probabilities(responses)


@dataclass(frozen=True)
class _Classifier:
    """What was learnt, and how well it did."""

    terms: np.ndarray  # str [features]
    idf: np.ndarray  # float64 [features]
    weights: np.ndarray  # float64 [features]
    accuracy: float
    counts: tuple[int, int]  # texts fitted on, texts held out

    @classmethod
    def fit(cls, arguments: dict[str, Any]) -> "_Classifier":
        from sklearn.linear_model import LogisticRegression

        (texts, labels), tests = _labelled(arguments)
        passages, passage_labels = [], []
        for text, label in zip(texts, labels, strict=True):
            words = text.replace(LINE_BREAK, " ").split()
            cut = [" ".join(words[start : start + PASSAGE]) for start in range(0, len(words), PASSAGE)]
            passages += cut
            passage_labels += [label] * len(cut)

        vectorizer = _vectorizer(max_features=arguments["max_features"])
        features = vectorizer.fit_transform(passages)
        model = LogisticRegression(
            C=INVERSE_REGULARISATION, fit_intercept=False, class_weight="balanced", max_iter=1000
        ).fit(features, passage_labels)
        terms = np.array(vectorizer.get_feature_names_out(), dtype=str)
        fitted = cls(terms, vectorizer.idf_, model.coef_[0], np.nan, (len(texts), len(tests[0])))
        right = (np.array(fitted.probabilities([t.replace(LINE_BREAK, " ") for t in tests[0]])) > 0.5) == tests[1]
        return replace(fitted, accuracy=float(right.mean()))

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """Of being positive, one a text."""
        if not texts:
            return []
        return scipy.special.expit(self._transformer.transform(texts) @ self.weights).tolist()

    @functools.cached_property
    def _transformer(self) -> Any:
        vectorizer = _vectorizer(vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        return vectorizer

    def save(self, path: Path) -> None:
        """Writes one .npz file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        values = {name: getattr(self, name) for name in ARRAYS}
        try:
            with unfinished.open("wb") as file:
                np.savez_compressed(file, **values)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "_Classifier | None":
        """What `save` wrote; None if it is not there or damaged."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                terms, idf, weights, accuracy, counts = (file[name] for name in ARRAYS)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return cls(terms, idf, weights, float(accuracy), (int(counts[0]), int(counts[1])))


def _vectorizer(**settings: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second to import

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **settings)


@functools.cache
def _classifier(arguments: str) -> _Classifier:
    started = time.perf_counter()
    values = json.loads(arguments)
    cached = _cache_file(values)
    classifier = _Classifier.load(cached)
    how = f"read from {cached}"
    if classifier is None:
        classifier = _Classifier.fit(values)
        how = f"took {time.perf_counter() - started:.1f} s"
        try:
            classifier.save(cached)
        except OSError as error:
            how += f"; not kept in {cached.parent}: {error.strerror or error}"
    fitted_on, tested_on = classifier.counts
    print(
        f"sentiment classifier: {classifier.accuracy:.1%} right on {tested_on:,} held-out texts "
        f"(fitted on {fitted_on:,}; {how})",
        file=sys.stderr,
    )
    return classifier


def _cache_file(arguments: dict[str, Any]) -> Path:
    """One file for one content of the data and one set of arguments."""
    path = Path(arguments["path"])
    try:
        content = hashlib.blake2b(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot read the data: {error.strerror or error}") from None
    code = hashlib.blake2b(Path(__file__).read_bytes()).hexdigest()
    versions = [code, importlib.metadata.version("scikit-learn")]
    key = json.dumps([content, versions, arguments | {"path": path.suffix}], sort_keys=True)
    return cache_folder() / f"sentiment-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.npz"


def _labelled(arguments: dict[str, Any]) -> list[tuple[list[str], list[int]]]:
    """Texts and labels to fit on, and those held out."""
    path, text_column, label_column = Path(arguments["path"]), arguments["text_column"], arguments["label_column"]
    records = read_records(path, arguments["where"], (text_column, label_column))
    for row, record in records.items():
        if record[label_column] not in ("0", "1"):
            raise InputError(f"{path}: row {row}: {label_column}={record[label_column]!r}; give 1 (positive) or 0")
    placed = [(fraction(record[text_column]), record) for record in records.values()]
    splits = []
    for name in ("train", "held_out"):
        low, high = arguments[name]
        chosen = [record for place, record in placed if low <= place < high]
        labels = [int(record[label_column]) for record in chosen]
        if len(set(labels)) < 2:
            counts = f"{labels.count(1)} positive and {labels.count(0)} negative texts"
            raise InputError(
                f"{path}: {counts} of {len(records):,} fall in {name}={[low, high]}; both kinds are wanted"
            )
        splits.append(([record[text_column] for record in chosen], labels))
    return splits
