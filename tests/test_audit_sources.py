"""What an audit reads: files as people have them give the same examples, or one clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from poprisk.losses import IGNORED
from poprisk_lab.audit.examples import AuditExamples, AuditInputError
from poprisk_lab.audit.read import read_examples

ROWS = 60


def frame() -> pd.DataFrame:
    """Everything that a table of a hospital holds."""
    rng = np.random.default_rng(0)
    days = pd.Timestamp("2020-01-13") + pd.to_timedelta(rng.integers(0, 900, ROWS), unit="D")
    weight = rng.normal(1500, 400, ROWS).round(2)
    found = pd.DataFrame(
        {
            "patient_id": [f"P{i:04d}" for i in range(ROWS)],
            "weight": weight,
            "age": rng.integers(20, 90, ROWS),
            "visit": days.strftime("%d.%m.%Y"),
            "ward": rng.choice(["a b", "c; d", "é"], ROWS),
            "smokes": rng.random(ROWS) < 0.5,
            "country": "DE",
            "outcome": np.where(weight > 1500, "very bad", "quite good"),
        }
    )
    found.loc[::7, "weight"] = np.nan
    found.loc[::9, "ward"] = None
    found.loc[:2, "outcome"] = "rare thing"
    found.loc[10:14, "outcome"] = None
    return found


def comma(path: Path) -> None:
    frame().to_csv(path, index=False)


def semicolon(path: Path) -> None:
    frame().to_csv(path, sep=";", decimal=",", index=False, encoding="utf-8-sig")


def tab(path: Path) -> None:
    frame().to_csv(path, sep="\t", index=False, lineterminator="\r\n")


def with_index(path: Path) -> None:
    frame().to_csv(path)


def windows(path: Path) -> None:
    frame().to_csv(path, index=False, encoding="cp1252")


def dashes(path: Path) -> None:
    frame().to_csv(path, index=False, na_rep="?")


def unicode(path: Path) -> None:
    """As Excel's "Unicode text"."""
    frame().to_csv(path, sep="\t", index=False, encoding="utf-16")


WRITERS = [comma, semicolon, tab, with_index, windows, dashes, unicode]


def table(path: Path, write: Callable[[Path], None] = comma, **settings: Any) -> AuditExamples:
    write(path / "table.csv")
    settings = {"label": "outcome", **settings}
    return read_examples(str(path / "table.csv"), **settings)


@pytest.mark.parametrize("write", WRITERS)
def test_however_a_table_is_written_it_is_the_same_table(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    expected, found = table(tmp_path), table(tmp_path, write)
    torch.testing.assert_close(found.inputs, expected.inputs)
    assert torch.equal(found.targets, expected.targets)
    assert found.classes == ("quite good", "rare thing", "very bad")
    assert found.targets[:3].tolist() == [1, 1, 1]
    assert not found.labelled[10:15].any()
    assert int(found.labelled.sum()) == ROWS - 5
    assert found.show(1)["patient_id"] == "P0001"
    assert found.show(9)["ward"] is None
    assert found.name(0) == "row 1"


def test_json_lines_are_the_same_table(tmp_path: Path) -> None:
    expected = table(tmp_path)
    text = frame().to_json(orient="records", lines=True, force_ascii=False)
    (tmp_path / "t.jsonl").write_text(f"{text}\n", encoding="utf-8")
    found = read_examples(str(tmp_path / "t.jsonl"), label="outcome")
    torch.testing.assert_close(found.inputs, expected.inputs)
    assert torch.equal(found.targets, expected.targets)
    assert found.classes == expected.classes
    lines = [f'{{"x": {i % 7}, "more": {{"k": [{i % 3}]}}, "y": {i % 2}}}' for i in range(ROWS)]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    nested = read_examples(str(tmp_path / "n.jsonl"), label="y")
    assert any("`more` holds lists or objects" in note for note in nested.notes)
    assert nested.inputs.shape == (ROWS, 1 + 3)


def test_a_late_letter_of_windows_is_read(tmp_path: Path) -> None:
    lines = [f"{i % 7},{i % 3},{'xy'[i % 2]}\n" for i in range(20_000)]
    text = f"a,b,outcome\n{''.join(lines)}1,2,schön\n"
    (tmp_path / "t.csv").write_bytes(text.encode("cp1252"))
    found = read_examples(str(tmp_path / "t.csv"), label="outcome")
    assert found.classes == ("schön", "x", "y")


def test_numbers_without_a_size_are_none(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": np.arange(ROWS) ** 2 % 11.0, "y": list("ab") * (ROWS // 2)})
    frame["inf"] = np.where(np.arange(ROWS) % 10 == 0, np.inf, frame["a"])
    frame["huge"] = 10.0 ** np.linspace(-300, 300, ROWS)
    frame.to_csv(tmp_path / "t.csv", index=False)
    found = read_examples(str(tmp_path / "t.csv"), label="y")
    assert "`inf`: 6 of its values are infinite, taken as missing." in found.notes
    assert bool(found.inputs.isfinite().all())
    assert found.inputs.shape[1] == 3 + 1
    assert found.inputs.std(0).min() > 0.1


@pytest.mark.parametrize(
    ("labels", "numbers", "text"),
    [
        (["1,234.50", "2,000,000", "7"], [1234.5, 2e6, 7.0], "a,y\n{}"),
        (["1.234,5", "2.000.000", "7"], [1234.5, 2e6, 7.0], "a;y\n{}"),
        (["12,5", "3,25", "7,0"], [12.5, 3.25, 7.0], "a;y\n{}"),
    ],
)
def test_labels_are_numbers_with_commas_and_points(
    tmp_path: Path, labels: list[str], numbers: list[float], text: str
) -> None:
    mark = text[1]
    rows = [f'{i * i % 7}.5{mark}"{labels[i % 3]}"' for i in range(ROWS)]
    (tmp_path / "t.csv").write_text(text.format("\n".join(rows)))
    found = read_examples(str(tmp_path / "t.csv"), label="y", kind="regression")
    assert found.targets[:3].tolist() == numbers


def test_options_that_do_not_go_with_a_source_are_refused(folder: Path) -> None:
    comma(folder / "t.csv")
    np.save(folder / "x.npy", np.ones((ROWS, 2)))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("", {"label": "y"}),
        ("", {"text": "y"}),
        ("", {"labels": folder / "t.csv"}),
        ("x.npy", {"text": "y"}),
        ("x.npy", {"side": 3}),
        ("t.csv", {"labels": folder / "t.csv"}),
        ("t.csv", {"side": 3}),
    ]
    for name, options in cases:
        option = {"side": "size"}.get(*options, *options)
        with pytest.raises(AuditInputError, match=f"--{option} does not go with"):
            read_examples(str(folder / name), **options)


def test_preferences_are_referred_to_the_library(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * ROWS)
    with pytest.raises(AuditInputError, match=r"poprisk\.Auditor\(labels, kind='preferences'\)"):
        read_examples(str(tmp_path / "p.jsonl"))


def test_labels_that_are_python_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((ROWS, 2)))
    np.save(tmp_path / "y.npy", np.array(["a"] * ROWS, dtype=object), allow_pickle=True)
    with pytest.raises(AuditInputError, match=r"y\.npy cannot be read.*Python objects"):
        read_examples(str(tmp_path / "x.npy"), labels=tmp_path / "y.npy")
    with pytest.raises(AuditInputError, match="there is no file"):
        read_examples(str(tmp_path / "x.npy"), labels=tmp_path / "z.npy")
    np.save(tmp_path / "z.npy", np.array("a"))
    with pytest.raises(AuditInputError, match="must hold a label for each example"):
        read_examples(str(tmp_path / "x.npy"), labels=tmp_path / "z.npy")


def test_the_case_of_a_suffix_makes_no_difference(tmp_path: Path) -> None:
    expected = table(tmp_path)
    comma(tmp_path / "T.CSV")
    found = read_examples(str(tmp_path / "T.CSV"), label="outcome")
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.targets, expected.targets)
    np.save(tmp_path / "f.npy", found.inputs.numpy())
    (tmp_path / "f.npy").rename(tmp_path / "F.NPY")
    features = read_examples(str(tmp_path / "F.NPY"), labels=tmp_path / "T.CSV", label="outcome")
    assert torch.equal(features.targets, expected.targets)
    (tmp_path / "x.PARQUET").write_bytes(b"PAR1 and no more")
    with pytest.raises(AuditInputError, match=r"Parquet needs pyarrow|cannot be read as a table"):
        read_examples(str(tmp_path / "x.PARQUET"), label="outcome")


def test_lines_of_spaces_and_short_rows_keep_labels_at_their_rows(tmp_path: Path) -> None:
    """The labels are read beside the other columns, by one reader."""
    rows = [f"{i}.5,{i % 7},{'ab'[i % 2]}" for i in range(ROWS)]
    rows[10:10] = ["   ", "", "1.25"]
    (tmp_path / "t.csv").write_text("x,z, y \n" + "\n".join(rows) + "\n")
    found = read_examples(str(tmp_path / "t.csv"), label="y")
    labels = found.targets[found.labelled]
    assert labels.tolist() == [i % 2 for i in range(ROWS)]
    for i in range(len(found.targets)):
        cells = found.show(i)
        if bool(found.labelled[i]):
            assert cells["y"] == found.classes[int(found.targets[i])]


def test_columns_are_typed_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    found = table(tmp_path)
    notes = "\n".join(found.notes)
    assert "`patient_id` is left out: it looks like an id" in notes
    assert "`country` is left out: it has one value" in notes
    assert "`visit` holds dates" in notes
    assert "5 examples have no label" in notes
    assert "rare thing: fewer than 10 examples" in notes
    # weight, whether it is missing, age, three parts of a date; wards and whether it is missing,
    # and smoking.
    assert found.inputs.shape == (ROWS, 6 + 4 + 2)
    assert bool(found.inputs.isfinite().all())


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["1,5", "2,25", "-3"], [1.5, 2.25, -3.0]),
        (["1.234,5", "2.000.000", "7"], [1234.5, 2e6, 7.0]),
    ],
)
def test_decimal_commas_and_thousands(
    tmp_path: Path, cells: list[str], numbers: list[float]
) -> None:
    lines = [f"{cells[i % 3]};{'ab'[i % 2]}" for i in range(ROWS)]
    (tmp_path / "a.csv").write_text("amount;label\n" + "\n".join(lines) + "\n")
    lines = [f"{numbers[i % 3]},{'ab'[i % 2]}" for i in range(ROWS)]
    (tmp_path / "b.csv").write_text("amount,label\n" + "\n".join(lines) + "\n")
    a, b = (read_examples(str(tmp_path / f"{f}.csv"), label="label") for f in "ab")
    assert torch.equal(a.inputs, b.inputs)


def test_dates_between_points_are_no_thousands(tmp_path: Path) -> None:
    lines = [f"{1 + i % 28:02d}.03.20{i % 9 + 10};{i % 4},5;{'ab'[i % 2]}" for i in range(ROWS)]
    (tmp_path / "a.csv").write_text("day;x;label\n" + "\n".join(lines) + "\n")
    assert any(
        "holds dates" in n for n in read_examples(str(tmp_path / "a.csv"), label="label").notes
    )


@pytest.mark.parametrize("labels", [["1", "2.0", "10"], ["x y", "None", '<b>&"']])
def test_names_of_classes_are_as_written(tmp_path: Path, labels: list[str]) -> None:
    pd.DataFrame(
        {"x": range(0, 2 * ROWS, 2), "z": np.arange(ROWS) ** 2 % 7, "y": (labels * ROWS)[:ROWS]}
    ).to_csv(tmp_path / "a.csv", index=False)
    found = read_examples(str(tmp_path / "a.csv"), label="y")
    assert found.classes == (("1", "2", "10") if labels[0] == "1" else tuple(sorted(labels)))


def test_numbers_of_many_values_are_numbers(tmp_path: Path) -> None:
    found = table(tmp_path, label="weight")
    assert found.classes == ()
    assert found.targets.dtype == torch.float64
    assert int(found.labelled.sum()) == ROWS - len(range(0, ROWS, 7))
    assert "The labels are taken as numbers." in found.notes
    assert table(tmp_path, label="age", kind="regression").classes == ()


def test_numbers_are_standardized_and_heavy_tails_ranked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    heavy = np.exp(3 * rng.normal(size=400))
    frame = pd.DataFrame({"a": rng.normal(7, 3, 400), "h": heavy, "y": list("ab") * 200})
    frame.to_csv(tmp_path / "a.csv", index=False)
    a, h = read_examples(str(tmp_path / "a.csv"), label="y").inputs.numpy().T
    expected = (frame["a"] - frame["a"].mean()) / frame["a"].std(ddof=0)
    assert np.allclose(a, expected, atol=1e-5)
    assert np.array_equal(np.argsort(h), np.argsort(heavy))
    assert np.abs(h).max() < 2  # as of uniform numbers


def test_texts(tmp_path: Path) -> None:
    words = {"a": "the ship sails on the sea", "b": "a goal in the last minute"}
    pd.DataFrame(
        {
            "id": range(ROWS),
            "body": list(words.values()) * (ROWS // 2),
            "topic": list(words) * (ROWS // 2),
        }
    ).to_csv(tmp_path / "t.csv", index=False)
    found = read_examples(str(tmp_path / "t.csv"), label="topic", text="body")
    assert found.classes == ("a", "b")
    assert len(found.inputs) == ROWS
    assert found.show(0) == {"body": words["a"]}
    with pytest.raises(AuditInputError, match="has no column 'text'"):
        read_examples(str(tmp_path / "t.csv"), label="topic", text="text")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of mixed sizes and modes, one corrupt and one cut short."""
    rng = np.random.default_rng(0)
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8))
        modes = ["L", "RGB", "RGBA", "P", "1", "CMYK"]
        mode = modes[i % 6]
        if i % 4 == 1:
            image = image.resize((20, 15))
        file = tmp_path / f"class {i % 2}" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        file.parent.mkdir(exist_ok=True)
        image.convert(mode).save(file)
    (tmp_path / "class 0" / "bad.png").write_bytes(b"nonsense")
    whole = (tmp_path / "class 0" / "0.png").read_bytes()
    (tmp_path / "class 1" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "class 1" / "notes.txt").write_text("no image")
    return tmp_path


def test_images_of_mixed_sizes_and_modes(folder: Path) -> None:
    found = read_examples(str(folder))
    assert found.inputs.dtype == torch.uint8
    assert found.inputs.shape == (40, 3, 12, 12)
    assert found.classes == ("class 0", "class 1")
    assert {Path(name).name for name in found.left_out} == {"bad.png", "cut.png"}
    assert "2 images cannot be read and are left out" in "\n".join(found.notes)
    (folder / "class 1" / "cut.png").unlink()
    assert "1 image cannot be read and is left out" in "\n".join(read_examples(str(folder)).notes)
    position = next(i for i in range(40) if found.name(i).endswith("class 0/0.png"))
    original = np.asarray(Image.open(folder / "class 0" / "0.png").convert("RGB"))
    assert np.array_equal(found.inputs[position].permute(1, 2, 0).numpy(), original)
    assert read_examples(str(folder), side=8).inputs.shape == (40, 3, 8, 8)


def test_features_and_their_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(5, 3, (ROWS, 8)))
    labels = pd.Series(["a", "b", "c"] * (ROWS // 3))
    labels.to_csv(tmp_path / "bare.csv", index=False, header=False)
    labels.to_frame("y").to_csv(tmp_path / "y.csv", index=False)
    labels.to_frame("y").assign(more=1).to_csv(tmp_path / "two.csv", index=False)
    source = str(tmp_path / "x.npy")
    a = read_examples(source, labels=tmp_path / "bare.csv")
    b = read_examples(source, labels=tmp_path / "y.csv")
    c = read_examples(source, labels=tmp_path / "two.csv", label="y")
    assert torch.equal(a.targets, b.targets)
    assert torch.equal(a.targets, c.targets)
    assert a.inputs.shape == (ROWS, 8)
    assert float(a.inputs.mean().abs()) < 1e-6
    with pytest.raises(AuditInputError, match="--label must say which column"):
        read_examples(source, labels=tmp_path / "two.csv")
    labels[:-5].to_frame("y").to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(AuditInputError, match="there are 60 examples but 55 labels"):
        read_examples(source, labels=tmp_path / "short.csv")
    with pytest.raises(AuditInputError, match="--labels must name the file"):
        read_examples(source)


REFUSED: list[tuple[str, bytes, str]] = [
    ("empty.csv", b"", "is empty"),
    ("head.csv", b"a,b,outcome\n", "has a header and no row"),
    ("blank.csv", b"\n\n\n", "cannot be read as a table"),
    ("binary.csv", b"PK\0\0" * 100, "it is no text"),
    ("picture.csv", b"\x89PNG\r\n\x1a\n\x01\xff" * 100, "it is no text"),
    ("wide.csv", b"a,outcome\n" + b"1,x,3\n" * 40, "more columns than the first line, 'a,outcome'"),
    ("above.csv", b"# by x\na,outcome\n" + b"1,x\n2,y\n" * 40, "the first line, '# by x'"),
    ("nameless.csv", b"1.5,x\n2.5,y\n" * 40, "the first line must name the columns"),
    ("few.csv", b"a,outcome\n" + b"1,x\n2,y\n" * 3, "6 of 6 examples have a label"),
    ("one.csv", b"a,outcome\n" + b"1,x\n2,x\n" * 30, "all labels are 'x'"),
    ("none.csv", b"a,outcome\n" + b"1,\n2,NA\n" * 30, "0 of 60 examples have a label"),
    ("only.csv", b"outcome\n" + b"x\ny\n" * 30, "no column is left"),
    ("twice.csv", b"a,a ,outcome\n" + b"1,2,x\n2,1,y\n" * 30, "two columns called 'a'"),
    ("same.csv", b"a,outcome,outcome\n" + b"1,x,x\n2,y,y\n" * 30, "two columns called 'outcome'"),
    ("torn.jsonl", b'{"a": 1}\n{"a":', "line 2 is no JSON"),
    ("list.jsonl", b"[1, 2]\n", "line 1 is no object"),
    ("pairs.jsonl", b'{"chosen": "a", "rejected": "b", "outcome": 1}\n' * 30, "all labels are '1'"),
    ("x.docx", b"abc", "an audit reads"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_cannot_be_audited_is_refused_in_a_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AuditInputError, match=message) as error:
        read_examples(str(tmp_path / name), label="outcome")
    assert "\n" not in str(error.value)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": None}, "--label must name the column of labels.*'outcome'"),
        ({"label": "Outcome"}, "do you mean 'outcome'"),
        ({"label": "patient_id"}, "--label patient_id: .* looks like an id, and no label"),
        ({"label": "patient_id", "kind": "classes"}, "60 classes for 60 labels"),
        ({"label": "visit"}, "--label visit: .* looks like dates"),
        ({"label": "outcom"}, "do you mean 'outcome'.* It has 'outcome', 'patient_id'"),
        ({"text": "outcome"}, "--text and --label both name 'outcome'"),
        ({"text": "weight"}, "--text weight: .* holds numbers, and no texts"),
        ({"text": "age"}, "holds numbers"),
        ({"text": "smokes"}, "holds numbers"),
        ({"text": "visit"}, "holds dates"),
        ({"text": "country"}, "holds no two different values"),
        ({"text": "patient"}, "do you mean 'patient_id'"),
        ({"kind": "regression"}, "the labels should be numbers, but one is 'rare thing'"),
    ],
)
def test_what_is_asked_must_be_there(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AuditInputError, match=message):
        table(tmp_path, **settings)


def test_a_column_that_holds_no_texts_is_refused_as_text(tmp_path: Path) -> None:
    """Of 17.99 the words would be 17 and 99, which tell enough to look like a good audit."""
    frame = pd.DataFrame({"y": list("ab") * ROWS, "comma": ["1.234,5", "12,5"] * ROWS})
    frame["gaps"] = np.where(np.arange(2 * ROWS) % 3 == 0, "", frame.index.astype(str))
    frame["ward"] = ["east", "west", "north"] * (2 * ROWS // 3)
    frame["none"] = ""
    frame.to_csv(tmp_path / "t.csv", index=False, sep=";")
    holds = {
        "comma": "numbers",
        "gaps": "numbers",
        "ward": "3 different words",
        "none": "no two different values",
    }
    for name, what in holds.items():
        with pytest.raises(AuditInputError, match=f"--text {name}: .* holds {what}, and no texts"):
            read_examples(str(tmp_path / "t.csv"), label="y", text=name)


def test_a_counter_is_no_label_unless_it_is_meant(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(ROWS) ** 2 % 7, "z": np.arange(ROWS) % 5})
    frame["number"] = np.arange(ROWS)
    frame.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(AuditInputError, match=r"--label number: .* looks like an id"):
        read_examples(str(tmp_path / "t.csv"), label="number")
    meant = read_examples(str(tmp_path / "t.csv"), label="number", kind="regression")
    assert meant.targets.tolist() == list(range(ROWS))
    np.save(tmp_path / "x.npy", np.ones((ROWS, 2)))
    with pytest.raises(AuditInputError, match="looks like an id"):
        read_examples(str(tmp_path / "x.npy"), labels=tmp_path / "t.csv", label="number")


def test_a_column_that_says_the_same_as_the_label_is_not_learned_from(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, ROWS)
    frame = pd.DataFrame({"x": rng.normal(size=ROWS), "y": np.array(["a", "b", "c"])[y]})
    frame["code"] = 7 - y.astype(float)
    frame.loc[3:9, "code"] = np.nan
    frame["name"] = np.array(["s", "t", "u"])[y]
    frame["nearly"] = np.where(np.arange(ROWS) == 5, (y + 1) % 3, y)
    frame["coarse"] = y == 0
    frame["price"] = frame["again"] = frame["x"] * 2
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = "\n".join(read_examples(str(tmp_path / "t.csv"), label="y").notes)
    left = {name for name in frame if f"`{name}` is left out: it says the same" in notes}
    assert left == {"code", "name"}
    notes = "\n".join(read_examples(str(tmp_path / "t.csv"), label="price").notes)
    left = {name for name in frame if f"`{name}` is left out: it says the same" in notes}
    assert left == {"again"}


def test_a_long_list_of_columns_begins_with_those_that_may_be_meant(tmp_path: Path) -> None:
    names = [f"f{i}" for i in range(30)] + ["diagnosis"]
    rows = pd.DataFrame(np.arange(31.0)[None] + np.arange(ROWS)[:, None], columns=names)
    rows.to_csv(tmp_path / "t.csv", index=False)
    for wanted in ("Diagnose", "diag", "DIAGNOSIS"):
        with pytest.raises(AuditInputError) as error:
            read_examples(str(tmp_path / "t.csv"), label=wanted)
        assert "do you mean 'diagnosis'? It has 'diagnosis', 'f0', 'f1'" in str(error.value)
        assert str(error.value).endswith("'f18' and 11 more up to 'f29'.")
    for wanted in (None, "target"):
        with pytest.raises(AuditInputError, match="'f19' and 11 more up to 'diagnosis'"):
            read_examples(str(tmp_path / "t.csv"), label=wanted)


def test_labels_of_several_columns_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((ROWS, 2)))
    np.save(tmp_path / "y.npy", np.eye(2)[np.arange(ROWS) % 2])
    with pytest.raises(AuditInputError, match=r"has shape \(60, 2\); of one-hot rows"):
        read_examples(str(tmp_path / "x.npy"), labels=tmp_path / "y.npy")


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(AuditInputError, match="one folder a class"):
        read_examples(str(tmp_path))
    with pytest.raises(AuditInputError, match="no file or folder"):
        read_examples(str(tmp_path / "missing.csv"), label="y")


def test_an_unlabelled_example_is_marked(tmp_path: Path) -> None:
    assert (table(tmp_path).targets[10:15] == IGNORED).all()


@pytest.mark.parametrize("place", [0, 115])
def test_a_row_that_is_refused_is_counted_as_rows_are_named(tmp_path: Path, place: int) -> None:
    array = np.ones((200, 2))
    array[place, 1] = np.nan
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(AuditInputError, match=rf"NaN or Inf, first in row {place + 1}\."):
        read_examples(str(tmp_path / "x.npy"), labels=tmp_path / "y.npy")
