"""Seven tables for the seven classifiers of `examples/router.py`, of sentences in the shared data.

    python benchmarks/router_tables.py tables    # NAME.train.csv and NAME.dev.csv, with the columns text and label

Three tasks have people's labels: sentiment (MR), product (CR) and entities (WNUT-17: whether a message names any). Four
have labels that follow from where a sentence is from: topic (which of six sets), subjectivity (reviews against news and
encyclopedia), act (questions against statements, both without punctuation at their ends and in lower case) and answer
(whether a question of SQuAD is answered by a number, a name or other words). Such labels are easier than people's are.
So the scores show that tasks run, and not how hard such tasks are.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from text_tasks import SHARED, TASKS

TRAIN, DEV = 600, 200
"""Rows of a task."""
Pairs = list[tuple[str, str]]


def lines(name: str) -> list[str]:
    with gzip.open(SHARED / name, "rt", encoding="latin-1") as file:
        return [line.strip() for line in file if line.strip()]


def objects(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]


def answer_type(text: str) -> str:
    if any(character.isdigit() for character in text):
        return "number"
    words = [word for word in text.split() if len(word) > 3]
    return "name" if words and all(word[0].isupper() for word in words) else "other"


def plain(text: str) -> str:
    return text.lower().rstrip(" ?.!")


def tables() -> dict[str, Pairs]:
    films = [(text, label) for label in ("neg", "pos") for text in lines(f"mr/rt-polarity.{label}.gz")]
    products = [(text, label) for label in ("neg", "pos") for text in lines(f"cr/custrev.{label}.gz")]
    messages = [(" ".join(row["tokens"]), row["ner_tags"]) for row in objects("wnut17/train.jsonl")]
    asked = chain(*TASKS["qnli"].rows())
    questions, statements = zip(*((row["question"], row["sentence"]) for row in asked), strict=True)
    news = TASKS["mrpc"].rows()[0]["sentence1"][:]
    captions = list(dict.fromkeys(TASKS["snli"].rows()[0]["premise"][:]))
    sources = {
        "film": [text for text, _ in films],
        "product": [text for text, _ in products],
        "message": [text for text, _ in messages],
        "encyclopedia": list(statements),
        "news": list(news),
        "caption": captions,
    }
    opinions, facts = sources["film"] + sources["product"], sources["encyclopedia"] + sources["news"]
    squad = objects("squad_small/train.jsonl")
    return {
        "sentiment": films,
        "product": products,
        "topic": [(text, name) for name, texts in sources.items() for text in texts],
        "subjectivity": labelled(opinions, "opinion") + labelled(facts, "fact"),
        "act": labelled(map(plain, questions), "question") + labelled(map(plain, statements), "statement"),
        "answer": [(row["question"], answer_type(texts[0])) for row in squad if (texts := row["answers"]["text"])],
        "entities": [(text, "none" if set(tags) == {"O"} else "some") for text, tags in messages],
    }


def labelled(texts: Iterable[str], label: str) -> Pairs:
    return [(text, label) for text in texts]


def chosen(pairs: Pairs) -> Pairs:
    """Rows of which no text comes twice, as many of each class as there are of the rarest, in a fixed order."""
    by_label: dict[str, list[str]] = {}
    for text, label in dict(pairs).items():
        by_label.setdefault(label, []).append(text)
    order = random.Random(0)
    for texts in by_label.values():
        order.shuffle(texts)
    most = min(map(len, by_label.values()))
    rows = [(text, label) for label, texts in by_label.items() for text in texts[:most]]
    order.shuffle(rows)
    return rows[: TRAIN + DEV]


def write(path: Path, rows: Pairs) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in tables().items():
        rows = chosen(pairs)
        held = min(DEV, len(rows) // 4)
        write(folder / f"{name}.dev.csv", rows[:held])
        write(folder / f"{name}.train.csv", rows[held:])
        print(f"{name}: {len(rows) - held} rows and {held} held out, {len({label for _, label in rows})} classes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else sys.exit("name a folder for the tables"))
