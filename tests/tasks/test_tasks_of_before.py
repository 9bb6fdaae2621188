"""Tasks that earlier versions wrote load, and say the same.

format_1: before sidestep.json had a checksum of its own. pair_on_a_decoder and answers_of_a_decoder: before there were
separators between texts that are put behind each other.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

import sidestep as ss
from sidestep.disk import task_folder
from sidestep.kinds.running import logits
from sidestep.kinds.task_data import stored_fields
from sidestep.tasks import predict
from small_backbone import PAIRS, TEXTS, backbone, decoder

BEFORE = Path(__file__).parents[1] / "tasks_of_before"
FORMAT_1 = BEFORE / "format_1"
LABELS = ["bad", "gut", "größer"]
#: As the version that wrote the task computed them.
LOGITS = torch.tensor(
    [
        [2.7537126541137695, -0.6874845027923584, 1.4812507629394531],
        [2.705448865890503, -0.7331730127334595, 1.4657971858978271],
        [2.5737032890319824, -0.7836086750030518, 1.373020887374878],
    ]
)
PAIR_LOGITS = [
    [1.1310800313949585, 0.04658680036664009],
    [-0.03782278299331665, 1.6749258041381836],
    [1.1385829448699951, 0.47160330414772034],
]


def test_a_task_of_format_1_has_its_outputs_and_labels() -> None:
    model = ss.load(FORMAT_1, backbone())
    batch = model.extras["processor"](TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**batch).logits
    # another version of torch may sum in another order
    torch.testing.assert_close(logits, LOGITS, rtol=1e-5, atol=1e-5)
    assert list(model.settings.head.labels) == LABELS
    assert model.settings.method == ss.ReadConfig(rank=2)
    assert model.extras["preprocessing"]["labels"] == LABELS
    assert model.extras["scores"] == {"accuracy": 0.75, "rows": 16}


def test_a_task_of_format_1_is_inspected_and_kept_in_a_bank(tmp_path: Path) -> None:
    assert task_folder.inspect_task(FORMAT_1)["labels"] == LABELS
    bank = ss.TaskBank(backbone(), tmp_path / "bank")
    bank.add("old", FORMAT_1)
    assert bank.entries()[0].labels == LABELS
    ids = torch.tensor([[11, 9, 13, 8, 10, 7]])
    logits = bank.run("old", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    torch.testing.assert_close(logits, LOGITS[:1], rtol=1e-5, atol=1e-5)


def test_a_task_of_format_1_is_saved_again(tmp_path: Path) -> None:
    model = ss.load(FORMAT_1, backbone())
    model.save_pretrained(tmp_path / "again")
    again = ss.load(tmp_path / "again", backbone())
    assert again.settings == model.settings
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_pair_on_a_decoder_is_read_without_a_separator() -> None:
    model = ss.load(BEFORE / "pair_on_a_decoder", decoder().model)
    encoded = predict._encode(model, pairs(), stored_fields(model.extras["preprocessing"]), None)
    assert encoded["length"][:] == [len("".join(pair)) for pair in PAIRS]
    found = logits(model, encoded, stored_fields(model.extras["preprocessing"]))
    np.testing.assert_allclose(found, PAIR_LOGITS, rtol=1e-5, atol=1e-5)


def test_answers_of_a_decoder_are_written_as_before() -> None:
    model = ss.load(BEFORE / "answers_of_a_decoder", decoder())
    assert predict.predict(model, pairs())["prediction"][:] == ["uuuuuuuu", "nnnnnmzz", "mzzzzzzz"]


def pairs() -> Dataset:
    return Dataset.from_list([{"first": first, "second": second} for first, second in PAIRS])


@pytest.mark.parametrize("file", ["sidestep.json", "task.safetensors", "processor/tokenizer.json"])
def test_the_kept_files_are_small(file: str) -> None:
    assert (FORMAT_1 / file).stat().st_size < 3000
