"""Oracle files of the official implementations are reproduced, and the check notices what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import own_process
import parity
import parity_samples
import parity_samples_sherl
import parity_vision
from parity_backbones import transformers_vit
from parity_files import Oracle, OracleError

ORACLES = sorted((Path(__file__).parent / "oracles").glob("*.safetensors"))
ON_VIT = [path for path in ORACLES if path.name.startswith(("dtl_vit_", "synqt_"))]
ONE = Path(__file__).parent / "oracles" / "dtl_vit_dtlplus_k4.safetensors"

#: Files made by the formulas, of sizes that no official file has.
SAMPLES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "dtl_vit_small": (parity_samples.dtl_vit, {}),
    "dtl_vit_all_blocks": (parity_samples.dtl_vit, {"depth": 2, "first_late": 0, "kernel": 3, "rank": 5}),
    "dtl_vit_last_block": (
        parity_samples.dtl_vit,
        {"depth": 5, "first_read": 2, "first_late": 4, "beta": 100.0, "kernel": 4, "width": 20, "heads": 5},
    ),
    "dtl_swin_two_stages": (parity_samples.dtl_swin, {}),
    "dtl_swin_one_stage_written": (
        parity_samples.dtl_swin,
        {"depths": (2, 1, 2), "heads": (1, 2, 3), "first_read": 1, "first_late": 3, "kernel": 3, "classes": 7},
    ),
    "dtl_swin_steep": (parity_samples.dtl_swin, {"first_late": 1, "beta": 100.0, "kernel": 4, "seed": 3}),
    "synqt_three_queries": (parity_samples.synqt, {}),
    "synqt_one_query": (parity_samples.synqt, {"queries": 1, "depth": 3, "hidden": 7, "classes": 2}),
    "synqt_many_queries": (parity_samples.synqt, {"queries": 9, "depth": 1, "grid": 6, "width": 16, "heads": 2}),
    "sherl_t5_five_blocks": (parity_samples_sherl.sherl_t5, {}),
    "sherl_t5_two_blocks": (parity_samples_sherl.sherl_t5, {"depth": 2, "layers": (0,), "reduction": 6, "seed": 2}),
    "sherl_vse_bert_small": (parity_samples_sherl.sherl_vse_bert, {}),
    "sherl_vse_bert_deep": (parity_samples_sherl.sherl_vse_bert, {"depth": 5, "embedding": 18, "heads": 2}),
    "sherl_vse_cnn_train_small": (parity_samples_sherl.sherl_vse_cnn, {}),
    "sherl_vse_cnn_eval_small": (parity_samples_sherl.sherl_vse_cnn, {"rows": 1, "sides": (6, 6, 3)}),
    "sherl_vse_cnn_train_uneven": (
        parity_samples_sherl.sherl_vse_cnn,
        {"widths": (4, 3, 6, 5), "sides": (9, 6, 6, 3), "hidden": 4, "seed": 2},
    ),
    "sherl_clipvil_block_small": (parity_samples_sherl.sherl_block, {}),
    "sherl_mdetr_block_small": (parity_samples_sherl.sherl_block, {"hidden": 3, "levels": 5}),
}


def test_there_are_files_of_every_family() -> None:
    for prefix in parity.FAMILIES:
        assert any(path.name.startswith(prefix) for path in ORACLES), prefix


@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_official_numbers_are_reproduced(path: Path) -> None:
    verdict = parity.check(path)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("path", ON_VIT, ids=lambda path: path.stem)
def test_transformers_vit_gives_the_official_numbers_too(path: Path) -> None:
    oracle = Oracle.read(path)
    verdict = parity.judge(oracle, parity.family_of(path)(oracle, transformers_vit))
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("name", SAMPLES)
def test_other_sizes_are_taken_from_the_file(name: str, tmp_path: Path) -> None:
    make, sizes = SAMPLES[name]
    verdict = parity.check(make(tmp_path / f"{name}.safetensors", **sizes))
    assert verdict.passed, str(verdict)


def test_hidden_states_are_compared_where_the_file_has_them() -> None:
    oracle = Oracle.read(ONE)
    found = parity_vision.dtl_vit(oracle)
    assert {"block0.in", "block3.out"} <= found.states.keys() == oracle.group("act.").keys()
    queries = Oracle.read(ONE.with_name("synqt_T4.safetensors"))
    within = {"qsm2.in", "qsm2.out", "head.feat_in", "head.combined", "block2.x_out"}
    assert within <= parity_vision.synqt(queries).states.keys() & queries.group("act.").keys()
    found.states["block3.in"][0, 0, 0] += 1e-3
    assert not parity.judge(oracle, found).passed


def changed(path: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None], folder: Path) -> Path:
    """A copy of a file with one tensor edited, or left out where `edit` gives None."""
    tensors = load_file(path)
    new = edit(tensors.pop(name))
    save_file(tensors | ({} if new is None else {name: new}), folder / path.name)
    return folder / path.name


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("out.logits", 2e-5),
        ("out.loss", -2e-5),
        ("grad.lora_dict.0.lora_A", 2e-5),
        ("grad.lora_fusion.weight", torch.nan),
        ("grad.head.bias", 2e-5),
        ("w.blocks.0.mlp.fc1.weight", 1e-2),
        ("meta.beta", 1.0),
    ],
)
def test_one_wrong_number_fails(name: str, step: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] += step
        return tensor

    assert parity.main([str(changed(ONE, name, edit, tmp_path))]) == 1
    shown = capsys.readouterr().out
    assert f"{ONE.name}: FAIL outputs" in shown
    assert "0 of 1 files reproduced" in shown


def test_a_gradient_that_only_one_side_has_fails(tmp_path: Path) -> None:
    path = changed(ONE, "grad.lora_dict.1.lora_B", lambda tensor: None, tmp_path)
    verdict = parity.check(path)
    assert not verdict.passed
    assert verdict.gradients > 1e-3
    oracle = Oracle.read(ONE)
    found = parity_vision.dtl_vit(oracle)
    del found.gradients["lora_dict.1.lora_B"]
    assert not parity.judge(oracle, found).passed


def test_a_graph_that_begins_elsewhere_fails() -> None:
    oracle = Oracle.read(ONE)
    found = replace(parity_vision.dtl_vit(oracle), flags={"block_in_requires_grad": [0, 0, 1, 1]})
    verdict = parity.judge(oracle, found)
    assert not verdict.passed
    assert "block_in_requires_grad is [0, 0, 1, 1], in the file [0, 0, 0, 1]" in str(verdict)


def test_only_a_steep_gate_widens_the_tolerance() -> None:
    for path in ORACLES:
        if path.name.startswith("dtl_"):
            steep = Oracle.read(path).number("meta.beta") >= 100
            assert parity.check(path).gradient_tolerance == (1e-4 if steep else 1e-5)


def test_an_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "lora_vit.safetensors"
    path.write_bytes(ONE.read_bytes())
    with pytest.raises(OracleError, match="no known family: the name has to begin with dtl_vit_, dtl_swin_, synqt_"):
        parity.check(path)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("meta.lora_before", lambda blocks: blocks[:3], r"reads or writes at \[0, 1, 2\].* up to the last block, 3"),
        ("meta.num_heads", lambda heads: None, "has no tensor 'meta.num_heads'"),
        ("w.lora_dict.2.lora_B", lambda weight: weight[:, :1].contiguous(), "does not fit SideModel: .*writes.2"),
        ("w.norm.bias", lambda bias: None, "does not fit VisionTransformer: .*norm.bias"),
        ("out.logits", lambda logits: logits[:, :2].contiguous(), r"logits of shape \(3, 2\), Sidestep's has \(3, 5\)"),
        ("out.loss", lambda loss: None, r"has the outputs \['logits'\], Sidestep's are"),
    ],
)
def test_what_does_not_fit_is_named(
    name: str, edit: Callable[[torch.Tensor], torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    with pytest.raises(OracleError, match=f"(?s){said}"):
        parity.check(changed(ONE, name, edit, tmp_path))


def test_the_command_shows_each_file_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(ONE)]) == 0
    assert "1 of 1 files reproduced" in capsys.readouterr().out
    broken = tmp_path / "dtl_vit_broken.safetensors"
    broken.write_bytes(b"no tensors")
    done = own_process.run(Path(parity.__file__), ONE, broken)
    assert done.returncode == 1, done.stderr
    assert f"{ONE.name}: ok" in done.stdout
    assert "dtl_vit_broken.safetensors: FAIL cannot be read" in done.stdout
    assert "1 of 2 files reproduced" in done.stdout
