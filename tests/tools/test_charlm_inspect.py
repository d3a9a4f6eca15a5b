"""The page of ``fastrnn charlm inspect``: its values, its ranking, its text, and its scripts."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from charlm_support import SMALL, some_text, trainer_for
from support import exact_call
from tolerance import Change, assert_agrees
from webdriver import Browser, NoBrowser

from fastrnn.tools.charlm import checkpoint, page
from fastrnn.tools.charlm.activations import Activations, record
from fastrnn.tools.charlm.config import Config
from fastrnn.tools.charlm.data import Vocabulary, prepare, read_files
from fastrnn.tools.charlm.errors import TrainingError
from fastrnn.tools.charlm.features import chance, correlations, text_features
from fastrnn.tools.charlm.model import CharRNN
from fastrnn.tools.charlm.train import Trainer
from fastrnn.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = {
    "lstm": ["h", "c", "i", "f", "g", "o"],
    "gru": ["h", "r", "z", "n"],
    "rnn": ["h"],
}
RIGHT, LEFT = "\ue014", "\ue012"  # WebDriver's codes of the arrow keys
# everything that has a meaning in HTML, in JSON or in a script
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \"x\" 'y' \\ @DATA@ \t\u2028\u202e é 𝄞\n"


# -- the values of the model ----------------------------------------------------------------------


def step_by_step(model: CharRNN, numbers: Tensor) -> Any:
    """Returns h, for an LSTM also c, [T,L,H] each, and the logits, one character at a time."""
    state = model.zero_state(1)
    states, logits = [], []
    for number in numbers.long():
        row, state = model(number.view(1, 1), state)
        states.append(torch.stack(state) if isinstance(state, tuple) else state.unsqueeze(0))
        logits.append(row[0, 0])
    return torch.stack(states).squeeze(3).unbind(1), torch.stack(logits).log_softmax(-1)


@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
@pytest.mark.parametrize("cell", CELLS)
def test_states_are_those_of_the_model_step_by_step(cell: str, backend: str) -> None:
    config = dataclasses.replace(SMALL, cell=cell, backend=backend, dropout=0.5, embedding=5)
    trainer = trainer_for(config)
    trainer.run(3)
    trainer.model.eval()
    numbers = trainer.corpus.vocabulary.encode(some_text().content[:40])
    found = record(trainer.model, numbers)
    assert [list(layer) for layer in found.layers] == [CELLS[cell]] * SMALL.layers
    states = tuple(
        torch.stack([layer[name] for layer in found.layers], dim=1)
        for name in ("h", "c")
        if name in CELLS[cell]
    )
    with torch.no_grad():
        theirs = step_by_step(trainer.model, numbers)
        exact = exact_call(trainer.model, call=lambda model: step_by_step(model, numbers))
        assert_agrees((states, found.log_probabilities), theirs, exact)
    trainer.model.train()  # dropout has no effect
    assert torch.equal(record(trainer.model, numbers).layers[1]["h"], found.layers[1]["h"])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_explain_the_states(cell: str) -> None:
    trainer = trainer_for(dataclasses.replace(SMALL, cell=cell))
    trainer.run(3)
    for layer in record(trainer.model, torch.arange(8)).layers:

        def recurrence(change: Change, layer: dict[str, Tensor] = layer) -> Any:
            v = {name: change(values) for name, values in layer.items()}
            before = {name: torch.cat([v[name][:1] * 0, v[name][:-1]]) for name in v}
            if cell == "gru":
                return (1 - v["z"]) * v["n"] + v["z"] * before["h"]
            return v["o"] * v["c"].tanh(), v["f"] * before["c"] + v["i"] * v["g"]

        states = layer["h"] if cell == "gru" else (layer["h"], layer["c"])
        assert_agrees(states, recurrence(lambda value: value), recurrence)


def test_infinite_state_is_a_one_line_error() -> None:
    trainer = trainer_for(dataclasses.replace(SMALL, nonlinearity="relu"))
    torch.nn.init.constant_(trainer.model.recurrent.weight_hh_l0, 1e30)
    torch.nn.init.constant_(trainer.model.recurrent.bias_hh_l0, 1e30)
    with pytest.raises(TrainingError, match="NaN or infinity"):
        record(trainer.model, torch.arange(8))


# -- features and correlations --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("inside double quotes", 'a "b\\"c" d "e\nf', "001111100001100"),
        ("inside single quotes", "it's 'a' b'c' dog's", "0000011000110000000"),
        ("inside triple quotes", '"""a"b\n""" c', "111111111000"),
        ("after # in the line", "a #b\n#c\nd", "001101100"),
        ("depth of brackets", "f(a[0])}(", "011221001"),
        ("position in the line", "ab\ncd", "12012"),
        ("indentation of the line", "  a b\nc", "1222200"),
        ("in the indentation", "  a b\nc", "1100010"),
        ("position in the word", "ab c_1, d", "120123001"),
        ("end of a word", "ab c_1, d", "001000110"),
        ("white space", "a b\nc", "01010"),
        ("line break", "a b\nc", "00010"),
        ("upper case", "aBc", "010"),
        ("digit", "a1c", "010"),
        ("punctuation", "a, b_c", "010000"),
    ],
)
def test_feature_has_a_value_per_character(name: str, text: str, expected: str) -> None:
    values = "".join(str(int(value)) for value in text_features(text)[name])
    assert values == expected


def test_features_that_do_not_vary_are_dropped() -> None:
    assert list(text_features("aaaa")) == ["position in the line", "position in the word"]
    assert "digit" not in text_features("no number")


def test_correlations_are_those_of_torch() -> None:
    features, units = torch.randn(3, 50), torch.randn(50, 4)
    units[:, 2] = 0.7  # a unit that is constant
    found = correlations(features, units)
    rows = torch.cat([features, units.t()])[[0, 1, 2, 3, 4, 6]]
    torch.testing.assert_close(found[:, [0, 1, 3]], torch.corrcoef(rows)[:3, 3:])
    assert found[:, 2].tolist() == [0.0, 0.0, 0.0]


def test_chance_separates_a_planted_unit_from_noise() -> None:
    text = some_text().content
    features = text_features(text)
    rows = torch.stack(list(features.values()))
    units = torch.randn(len(text), 30)
    units[:, 7] = 0.5 - 3 * features["depth of brackets"]
    r, coincidence = correlations(rows, units), chance(rows, units)
    place = list(features).index("depth of brackets")
    assert r[place, 7] < -0.99
    assert coincidence[place] < 0.9
    others = (r.abs() - coincidence.unsqueeze(1))[:, torch.arange(30) != 7]
    assert others.max() < 0.1


# -- the page -------------------------------------------------------------------------------------


def data_of(html: str) -> dict[str, Any]:
    """Returns the data of a page as a browser reads them: up to the next end of a script."""
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL)
    loaded: dict[str, Any] = json.loads(data)
    return loaded


def decoded(text: str, columns: int) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int8).view(-1, columns)


def random_activations(text: str, vocabulary: Vocabulary, hidden: int, layers: int) -> Activations:
    names = CELLS["lstm"]
    return Activations(
        [{name: torch.randn(len(text), hidden) for name in names} for _ in range(layers)],
        torch.randn(len(text), len(vocabulary)).log_softmax(-1),
    )


def plain_page() -> str:
    vocabulary = Vocabulary("ab")
    activations = random_activations("ab", vocabulary, 3, 1)
    return page.build({"title": "", "facts": []}, "ab", vocabulary, activations)


def test_hostile_text_comes_back_unchanged_and_ends_no_element() -> None:
    vocabulary = Vocabulary.of(HOSTILE)
    activations = random_activations(HOSTILE, vocabulary, 3, 1)
    about = {"title": HOSTILE, "facts": [HOSTILE]}
    html = page.build(about, HOSTILE, vocabulary, activations)
    plain = plain_page()
    for mark in ("<", "&", "</script", "alert(", "@DATA@"):
        # the text adds none, except what JSON may hold as it is
        extra = html.count(mark) - plain.count(mark)
        assert extra == (3 * HOSTILE.count(mark) if mark in ("alert(", "@DATA@") else 0), mark
    data = data_of(html)
    assert data["text"] == HOSTILE
    assert data["about"] == about
    assert data["symbols"] == ["\ufffd", *vocabulary.characters]
    assert html.isascii()


def test_page_needs_no_network() -> None:
    html = plain_page()
    assert "default-src 'none'" in html
    assert not re.findall(r"https?:|//\w+\.|\bsrc=|\bhref=|@import|url\(", html)


def test_predictions_and_surprise_are_those_of_the_model() -> None:
    vocabulary = Vocabulary("abcdefgh")
    probabilities = torch.tensor([[0.0, 0.5, 0.25, 0.125, 0.0625, 0.0625, 0, 0, 0]] * 3)
    layer = {"h": torch.zeros(3, 1)}
    data = page.page_data({}, "abc", vocabulary, Activations([layer], probabilities.log()))
    assert data["predictions"][0][:4] == [1, 2, 3, 4]
    assert data["predictions"][0][5:8] == [500, 250, 125]
    assert data["surprise"] == [2.0, 3.0]  # of b after a, and of c after b


def test_units_that_follow_the_text_are_kept() -> None:
    text = some_text().content
    vocabulary = Vocabulary.of(text)
    activations = random_activations(text, vocabulary, 40, 2)
    activations.layers[0]["h"][:, 11] = text_features(text)["position in the line"]
    activations.layers[1]["c"][:, 39] = -text_features(text)["indentation of the line"]
    data = page.page_data({}, text, vocabulary, activations, units=3)
    first, second = (layer["units"] for layer in data["layers"])
    assert len(first) == len(second) == 3
    assert 11 in first
    assert 39 in second
    assert [layer["count"] for layer in data["layers"]] == [40, 40]
    whole = page.page_data({}, text, vocabulary, activations)
    assert whole["layers"][0]["units"] == list(range(40))


def test_default_page_is_small() -> None:
    shapes = [{name: torch.empty(2000, 512, device="meta") for name in CELLS["lstm"]}] * 4
    units = page.default_units(Activations(shapes, torch.empty(0)))
    assert units * 2000 * len(CELLS["lstm"]) * 4 <= page.VALUES_LIMIT
    assert units >= 64
    shapes = [{"h": torch.empty(page.VALUES_LIMIT * 2, 4, device="meta")}]
    assert page.default_units(Activations(shapes, torch.empty(0))) == 1


# -- the command ----------------------------------------------------------------------------------


def trained(folder: Path, config: Config, text: str, steps: int = 3) -> Path:
    """Returns the folder of a run on a text, which is beside it."""
    file = folder / "text.py"
    file.write_text(text, encoding="utf-8")
    trainer = Trainer(config, prepare(read_files([file]), config.batch_size, config.seq_length))
    trainer.run(steps)
    run = folder / "run"
    run.mkdir()
    checkpoint.save(run, checkpoint.LATEST, trainer)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, cell="lstm", hidden=20, learning_rate=0.02)
    text = some_text(6000).content + HOSTILE * 40
    return trained(tmp_path_factory.mktemp("inspect"), config, text, 40)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = main(["charlm", "inspect", *map(str, arguments)])
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("cell", CELLS)
def test_page_has_the_states_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    content = some_text(3000).content
    run = trained(tmp_path, dataclasses.replace(SMALL, cell=cell), content)
    code, out, err = call(capsys, run, "--characters", 90)
    assert (code, err) == (0, "")
    assert out.startswith(f"{run}/inspect.html: 90 characters")
    data = data_of((run / "inspect.html").read_text("utf-8"))
    assert data["text"] == content[-150:][:90]  # the validation text is the last 5 %
    saved = checkpoint.load(run / "latest.json")
    trainer = trainer_for(saved.config)
    trainer.model.load_state_dict(
        {
            name.removeprefix("model."): values
            for name, values in saved.tensors.items()
            if name.startswith("model.")
        }
    )
    activations = record(trainer.model, saved.vocabulary.encode(data["text"]))
    for found, layer in zip(data["layers"], activations.layers, strict=True):
        assert found["units"] == list(range(SMALL.hidden))
        assert list(found["quantities"]) == CELLS[cell]
        for name, quantity in found["quantities"].items():
            limits = torch.tensor(quantity["limits"], dtype=torch.float64).unsqueeze(1)
            values = decoded(quantity["values"], 90).double() * limits / page.STEPS
            exact = layer[name].t().double()
            # half a step, and the rounding of the limit to 7 digits
            assert ((values - exact).abs() <= limits / (2 * page.STEPS) * (1 + 1e-4)).all()


def test_text_of_a_file_is_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some text").write_text(HOSTILE * 2, encoding="utf-8")
    out = tmp_path / "page.html"
    code, _, err = call(capsys, run / "latest.json", "--text", tmp_path / "some text", "--out", out)
    assert (code, err) == (0, "")
    data = data_of(out.read_text("utf-8"))
    assert data["text"] == HOSTILE * 2
    assert any("of some text" in fact for fact in data["about"]["facts"])


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        ("", "CHECKPOINT", 2),
        ("gone", "gone: cannot be read", 2),
        (".", "holds no checkpoint", 2),
        ("RUN --characters 1", "--characters must be a whole number from 2 to 20,000, got 1", 2),
        ("RUN --characters 20001", "--characters must be", 2),
        ("RUN --units 0", "--units must be a whole number from 1 up, got 0", 2),
        ("RUN --device tpu", "--device must be cpu, cuda or cuda:N", 2),
        ("RUN --encoding latin-1", "--encoding needs --text FILE", 2),
        ("RUN --text gone", "gone: cannot be read", 2),
        ("RUN --text one", "one: must have at least 2 characters", 2),
        (
            "RUN --text unknown",
            "unknown: has characters that the model does not know ('\\u20ac')",
            2,
        ),
        ("RUN --out .", "--out .: is a folder", 2),
        ("RUN --out gone/page.html", "gone/page.html: cannot be written (No such file", 1),
    ],
)
def test_wrong_argument_is_a_one_line_error(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").write_text("d")
    (tmp_path / "unknown").write_text("def €", encoding="utf-8")
    given = [str(run) if word == "RUN" else word for word in arguments.split()]
    code, out, err = call(capsys, *given)
    assert (code, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1


def test_changed_text_of_the_run_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, SMALL, some_text().content)
    (tmp_path / "text.py").write_text("something else")
    code, _, err = call(capsys, run)
    assert (code, err.count("\n")) == (2, 1)
    assert "pass the original text with --text FILE" in err


# -- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        found = Browser(tmp_path_factory.mktemp("profile"))
    except NoBrowser as reason:
        pytest.skip(str(reason))
    yield found
    found.close()


def test_page_works_in_a_browser(
    run: Path, tmp_path: Path, browser: Browser, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    (tmp_path / "text").write_text(some_text(300).content + HOSTILE, encoding="utf-8")
    assert call(capsys, run, "--text", tmp_path / "text", "--out", out)[0] == 0
    data = data_of(out.read_text("utf-8"))
    browser.open(out)
    assert browser.errors() == []

    def colours() -> list[str]:
        found: list[str] = browser.run(
            "return [...document.querySelectorAll('#text span')].map(s => s.style.backgroundColor)"
        )
        return found

    def chosen() -> str:
        found: str = browser.run("return document.getElementById('which').textContent")
        return found

    def press(selector: str) -> None:
        browser.run(f"document.querySelector({selector!r}).click()")

    shown = browser.run("return document.getElementById('text').textContent")
    assert shown.replace("\u2028", "").replace("\u202e", "") == data["text"].replace(
        "\u2028", ""
    ).replace("\u202e", "")
    signs = browser.run(
        "return [...document.querySelectorAll('#text .sign')].map(s => s.dataset.sign)"
    )
    assert signs.count("\u21b5") == data["text"].count("\n")
    first, unit = colours(), chosen()
    assert len(first) == len(data["text"])
    assert len(set(first)) > 10
    assert "layer 2, cell state c" in unit
    browser.press(RIGHT)
    assert chosen() != unit
    assert colours() != first
    browser.press(LEFT)
    assert (chosen(), colours()) == (unit, first)
    press("#next")
    assert colours() != first
    press("#quantities [data-value=f]")
    assert "forget gate f" in chosen()
    press("#layers [data-value='0']")
    assert "layer 1, forget gate f" in chosen()
    # the colour of a character is that of the value in the data
    unit_of_page = browser.run("return view.unit")
    quantity = data["layers"][0]["quantities"]["f"]
    values = decoded(quantity["values"], len(data["text"]))[unit_of_page].double()
    values = values * quantity["limits"][unit_of_page] / page.STEPS
    shade = browser.run("return [...Array(T).keys()].map(t => valueAt('f', t))")
    torch.testing.assert_close(torch.tensor(shade, dtype=torch.float64), values)
    list_of_units = browser.run("return document.querySelectorAll('#units button').length")
    assert list_of_units == len(data["layers"][0]["units"])
    browser.run("showTip(4, 10, 10)")
    assert "next by the model" in browser.run("return document.getElementById('tip').textContent")
    assert browser.errors() == []


def test_colours_follow_a_dark_scheme(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(plain_page())
    try:
        browser = Browser(tmp_path / "profile", dark=True)
    except NoBrowser as reason:
        pytest.skip(str(reason))
    try:
        browser.open(tmp_path / "page.html")
        # the middle of the scale is the background
        background = "getComputedStyle(document.getElementById('reading')).backgroundColor"
        middle, panel = browser.run(f"return [colours(0)[0], {background}]")
        assert middle.replace(" ", "") == panel.replace(" ", "") == "rgb(24,27,33)"
        assert browser.errors() == []
    finally:
        browser.close()
