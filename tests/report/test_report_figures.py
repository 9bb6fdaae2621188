from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import sample

from sidestep.report.bars import memory_parts, module_group
from sidestep.report.chart import Figure
from sidestep.report.figures import figures
from sidestep.report.files import write_figures
from sidestep.report.labels import LETTER, LINE, Box, place_labels
from sidestep.report.load import load
from sidestep.report.looks import OF_PARTS, colours, for_files, for_page
from sidestep.report.rows import Group
from sidestep.report.scatter import pareto

SMALL = ("read", "probe", "lora", "lora+checkpoint", "full")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    path = tmp_path_factory.mktemp("figures") / "results.jsonl"
    return load([sample.write(path, sample.study())]).groups[0]


def named(group: Group, start: str, *, by_task: bool = False) -> Figure:
    return next(figure for figure in figures(group, by_task=by_task) if figure.name.startswith(start))


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (2.0, 0.6), (4.0, 0.9)]
    assert pareto(points, greater=True) == {0, 1, 4}
    assert pareto(points, greater=False) == {0}


def test_of_two_with_the_same_score_the_cheaper_is_on_the_front() -> None:
    assert pareto([(2.0, 0.7), (1.0, 0.7)], greater=True) == {1}


def test_scores_against_peak_hold_every_contender_and_the_shared_scores(group: Group) -> None:
    rows = [row for row in named(group, "score-against-peak").rows if row["task"] == "average"]
    by_name = {row["contender"]: row for row in rows}
    assert set(by_name) == set(sample.CONTENDERS)
    assert by_name["lora"]["score"] == by_name["lora+checkpoint"]["score"]
    assert by_name["lora"]["series"] == by_name["lora+checkpoint"]["series"]
    assert [name for name in by_name if by_name[name]["checkpoint"]] == ["lora+checkpoint", "full+checkpoint"]
    assert by_name["read"]["low"] < by_name["read"]["score"] < by_name["read"]["high"]
    assert by_name["probe"]["front"]
    assert not by_name["lora"]["front"]


def test_files_have_a_figure_for_each_task_and_the_page_one_for_all(group: Group) -> None:
    assert {figure.about for figure in figures(group, by_task=True) if figure.kind == "score"} == {
        "average",
        *sample.TASKS,
    }
    assert len([figure for figure in figures(group) if figure.kind == "score"]) == 3


def test_the_parts_of_memory_add_up_to_the_peak(group: Group) -> None:
    for row in group.rows:
        parts = memory_parts(row)
        assert row.peak is not None
        assert sum(parts.values()) == pytest.approx(row.peak + row.measured("model_bytes"), rel=1e-6)
        assert set(parts) <= set(OF_PARTS)


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("side.out", "the method"),
        ("head.linear", "head"),
        ("encoder.layer.*.attention.self", "attention"),
        ("encoder.layer.*.attention.output.LayerNorm", "norms, dropout"),
        ("encoder.layer.*.intermediate.intermediate_act_fn", "MLP"),
        ("encoder.layer.*.output.dense", "MLP"),
        ("encoder.layer.*.attention.self.query.lora_A.default", "the method"),
        ("model.layers.*.self_attn.q_proj", "attention"),
        ("model.layers.*.mlp.down_proj", "MLP"),
        ("model.layers.*.input_layernorm", "norms, dropout"),
        ("decoder.block.*.layer.*.DenseReluDense.wi", "MLP"),
        ("decoder.block.*.layer.*.EncDecAttention.k", "attention"),
        ("encoder.layer.*", "whole blocks"),
        ("layers.11", "whole blocks"),
        ("embeddings.word_embeddings", "embeddings"),
        ("(other)", "other"),
    ],
)
def test_modules_are_grouped_by_their_names(module: str, part: str) -> None:
    assert module_group(module) == part


def test_curves_are_means_over_seeds(group: Group) -> None:
    figure = named(group, "curve-rte-score")
    read = group.find("read")
    assert read is not None
    last = [(record.measured or {})["history"][-1]["score"] for record in read.scores["rte"].records]
    row = next(row for row in figure.rows if row["contender"] == "read" and row["epoch"] == 5)
    assert row["score"] == pytest.approx(100 * sum(last) / 3)
    assert (row["low"], row["high"]) == (pytest.approx(100 * min(last)), pytest.approx(100 * max(last)))
    assert "lora+checkpoint" not in {row["contender"] for row in figure.rows}


def test_a_contender_has_one_colour_wherever_it_stands() -> None:
    assert colours(["read", "lora"])["lora"] == colours(["full", "lora", "dtl"])["lora"]
    assert list(colours(["lora", "lora+checkpoint"])) == ["lora"]
    many = colours([f"method-{number}" for number in range(8)])
    assert len(set(many.values())) == 8


def test_the_page_takes_colours_from_css(group: Group) -> None:
    names = [row.contender for row in group.rows]
    figure = named(group, "score-against-peak")
    assert "var(--series-0)" in json.dumps(figure.spec(for_page(names)))
    assert "var(" not in json.dumps(figure.spec(for_files(names, 420)))


def test_labels_cover_neither_points_nor_each_other() -> None:
    points = [(100.0, 100.0), (104.0, 101.0), (100.0, 112.0), (300.0, 20.0)]
    texts = ["read", "lora", "full+checkpoint", "dora"]
    boxes = []
    for (x, y), text, place in zip(points, texts, place_labels(points, texts, [], 340, 300), strict=True):
        if place.shown:
            left = x + place.dx - {"left": 0, "center": 0.5, "right": 1}[place.align] * LETTER * len(text)
            boxes.append(Box(left, y + place.dy - LINE / 2, left + LETTER * len(text), y + place.dy + LINE / 2))
    assert len(boxes) >= 3
    area = LETTER * 4 * LINE
    assert all(one.overlap(other) < 0.3 * area for n, one in enumerate(boxes) for other in boxes[:n])


def test_a_label_without_room_is_left_out() -> None:
    full = [Box(0, 0, 340, 300)]
    assert not place_labels([(170.0, 150.0)], ["read"], full, 340, 300)[0].shown


def test_every_figure_is_a_png_an_svg_and_a_csv(tmp_path: Path) -> None:
    lines = sample.study("BERT base", SMALL, tasks=("rte",), seeds=2)
    results = load([sample.write(tmp_path / "results.jsonl", lines)])
    written = write_figures(results, tmp_path / "deep" / "figures")
    names = {path.stem for path in written}
    assert "bert-base-score-against-peak-average" in names
    assert {"bert-base-memory", "bert-base-step-against-peak", "bert-base-curve-rte-loss"} <= names
    assert len(written) == 3 * len(names) == len(list((tmp_path / "deep" / "figures").iterdir()))
    for path in written:
        content = path.read_bytes()
        assert content.startswith({".png": b"\x89PNG", ".svg": b"<svg", ".csv": b""}[path.suffix])
    with (tmp_path / "deep" / "figures" / "bert-base-score-against-peak-average.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["contender"] for row in rows} == set(SMALL)
    assert float(rows[0]["peak memory above the weights, MiB"]) > 0
