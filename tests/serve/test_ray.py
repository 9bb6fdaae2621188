"""What `serve run` is told, and refuses. No cluster is started here: `make test-ray` runs the suite on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at its import


@pytest.fixture(scope="module")
def module() -> Any:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'sidestep[ray]')")
    import sidestep.serve.ray as found

    return found


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIDESTEP_KEYS", "SIDESTEP_CHANGE_KEYS"):
        monkeypatch.delenv(name, raising=False)


def test_without_keys_it_has_to_be_told_so(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = module.Arguments(bank="tasks")
    with pytest.raises(ValueError, match="without_keys=true"):
        module.deployment(arguments)
    assert module.keys_of(module.Arguments(bank="tasks", without_keys=True)) is None
    (tmp_path / "keys").write_text(f"use {20 * 'u'}\n")
    assert module.keys_of(module.Arguments(bank="tasks", keys=str(tmp_path / "keys"))) is not None
    monkeypatch.setenv("SIDESTEP_KEYS", 20 * "u")
    assert module.keys_of(arguments) is not None


def test_settings_that_there_are_not_are_refused(module: Any) -> None:
    with pytest.raises(ValueError, match="There are max_tokens, max_rows"):
        module.deployment(module.Arguments(bank="tasks", without_keys=True, settings={"rows": 3}))
    with pytest.raises(ValueError, match="max_rows"):
        module.deployment(module.Arguments(bank="tasks", without_keys=True, settings={"max_rows": 0}))
    with pytest.raises(ValueError, match="replica"):
        module.Arguments(bank="tasks", replica=2)


def test_the_config_file_is_taken(module: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (Path(__file__).parents[2] / "docker" / "serve.yaml").read_text()
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == f"{module.__name__}:deployment"
    arguments = module.Arguments(**application.args)
    module.settings_of(arguments)
    assert arguments.most_replicas >= arguments.replicas
