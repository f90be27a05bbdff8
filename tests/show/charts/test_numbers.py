"""The rows of every chart are the numbers of its record, and every specification is complete."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from charted import HOSTILE, PROMPT, average, capacity, card, charts, model, proof
from factsmith.locate.causal import causal_trace
from factsmith.read.composition import compose
from factsmith.read.lens import lens
from factsmith.show.charts.axes import column_labels, distinct, tail
from factsmith.show.charts.chart import Chart
from factsmith.show.charts.keeping import proof_chart
from factsmith.show.charts.predictions import lens_map, next_tokens, part_bars
from factsmith.show.charts.traces import class_map, heat_map
from show.records import trace
from show.runs import evaluation

NAMES = sorted(charts())

COLOURS = ("color", "fill", "stroke")


def encodings(spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every encoding of a specification: (channel, definition)."""
    for channel, definition in spec.get("encoding", {}).items():
        for each in definition if isinstance(definition, list) else [definition]:
            yield channel, each
    for layer in spec.get("layer", []):
        yield from encodings(layer)


def missing_fields(chart: Chart) -> set[str]:
    """Return the fields that a specification names and no row has."""
    names = {str(each["field"]) for _, each in encodings(chart.spec) if "field" in each}
    return names - {name for row in chart.rows for name in row}


def fixed_colours(chart: Chart) -> list[str]:
    """Return the places where a specification names a colour."""
    text = json.dumps(chart.spec)
    named = [f'"{name}": "#' for name in COLOURS if f'"{name}": "#' in text]
    return named + (["scheme"] if '"scheme"' in text else [])


@pytest.mark.parametrize("name", NAMES)
def test_a_specification_names_fields_of_its_rows_and_no_colour(name: str) -> None:
    chart = charts()[name]
    assert chart.rows and chart.title and chart.description
    assert missing_fields(chart) == set()
    assert fixed_colours(chart) == []
    assert "data" not in chart.spec
    json.dumps(chart.to_dict(), allow_nan=False)


def test_a_specification_with_a_wrong_field_or_a_colour_is_seen() -> None:
    spec = {"mark": "bar", "encoding": {"x": {"field": "q"}, "color": {"value": "#fff"}}}
    wrong = Chart(name="w", title="w", spec=spec, rows=[{"p": 1}])
    assert missing_fields(wrong) == {"q"}
    assert fixed_colours(Chart(name="w", title="w", spec={"color": "#fff"}, rows=[])) != []


def test_a_heat_map_has_every_score_and_starts_at_the_corrupted_run() -> None:
    record = trace()
    chart = heat_map(record)
    for row in chart.rows:
        assert row["score"] == float(record.scores[row["column"], row["layer"]])
        assert row["effect"] == pytest.approx(row["score"] - record.corrupted)
    assert len(chart.rows) == record.scores.numel()
    assert dict(encodings(chart.spec))["color"]["scale"]["domain"] == pytest.approx([0.1, 0.9])
    marked = {row["label"] for row in chart.rows if row["subject"]}
    assert {label[-1] for label in marked} == {"*"} and len(marked) == 2
    assert "FFN outputs" in heat_map(trace(kind="mlp", window=3)).title


def test_a_heat_map_of_the_bundled_model_points_at_the_subject() -> None:
    record = causal_trace(model(), PROMPT, "Bulgaria", samples=2)
    best = max(heat_map(record).rows, key=lambda row: row["score"])
    assert (best["column"], best["layer"]) == record.peak


def test_average_effects_leave_out_a_kind_that_no_fact_has() -> None:
    record = average()
    rows = class_map(record).rows
    assert {row["label"] for row in rows} == {
        kind for kind, count in zip(record.classes, record.counts, strict=True) if count
    }
    first = rows[0]
    assert first["effect"] == float(record.effects["state"][0, 0])
    assert (first["low"], first["high"]) == pytest.approx(
        (first["effect"] - 0.05, first["effect"] + 0.05)
    )


def test_equal_labels_of_different_tokens_have_places_of_their_own() -> None:
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert column_labels(["a", " a", "\n"], (1, 2)) == ["0 a", "1 a*", "2 ↵"]
    rows = next_tokens({"base": [(" a", 0.5), ("a", 0.25)]}).rows
    assert [row["label"] for row in rows] == ["a", "a (2)"]
    assert [row["p"] for row in rows] == [0.5, 0.25]


def test_two_sources_share_the_place_of_a_token() -> None:
    rows = next_tokens({"base": [(" lev", 0.9)], "latest": [(" euro", 0.8), (" lev", 0.1)]}).rows
    assert [(row["label"], row["source"], row["p"]) for row in rows] == [
        ("lev", "base", 0.9),
        ("lev", "latest", 0.1),
        ("euro", "latest", 0.8),
    ]


def test_the_lens_has_a_cell_for_each_state_and_token() -> None:
    read = lens(model(), PROMPT)
    rows = lens_map(read).rows
    assert len(rows) == (read.n_layers + 1) * len(read.tokens)
    top, bottom = rows[len(read.tokens) - 1], rows[-1]
    assert (top["layer"], bottom["layer"]) == (read.n_layers - 1, None)
    assert top["p"] == read.likeliest(read.n_layers, -1)[0][1]
    assert top["stays"] and not bottom["stays"]


def test_the_parts_sum_to_the_logit() -> None:
    composition = compose(model(), PROMPT)
    rows = part_bars(composition).rows
    assert sum(row["logit"] for row in rows) == pytest.approx(composition.logit, abs=1e-3)


def test_a_proof_has_two_points_a_question_and_the_failed_ones_first() -> None:
    rows = proof_chart(proof()).rows
    asked = [check for check in proof().checks if check.p_before is not None]
    assert len(rows) == 2 * len(asked)
    assert rows[0]["held"] == "no" and rows[0]["label"].startswith("✗")
    for check in asked:
        pair = [row["p"] for row in rows if row["question"] == check.prompt]
        assert pair == [check.p_before, check.p_after]


def test_cards_layers_and_judged_edits_keep_their_numbers() -> None:
    made, drawn = card(), charts()
    assert [row["score"] for row in drawn["promoted_bars"].rows] == [
        score for _, score in (*made.promotes, *made.demotes)
    ]
    assert [row["coefficient"] for row in drawn["trigger_bars"].rows] == [2.5, 1.5, 0.5, -0.5]
    assert sum(row["tokens"] for row in drawn["histogram"].rows) == int(made.counts.sum())
    assert [row["full"] for row in drawn["use_bars"].rows] == [
        use.full for use in capacity().layers
    ]
    assert [row["label"] for row in drawn["norm_bars"].rows] == ["layer 1", "layer 3"]
    summary = evaluation(2).summaries["rome"]
    for row in drawn["share_chart"].rows:
        if row["editor"] == "rome":
            assert row["share"] == summary[row["measure"]].value


def test_texts_that_steer_are_made_visible_in_labels() -> None:
    assert "\u202e" not in tail("x" * 60 + HOSTILE)
    assert all("\u202e" not in row["label"] for row in charts()["trigger_bars"].rows)
