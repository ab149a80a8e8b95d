"""The public names, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import giantstep as gs
from giantstep import errors


def test_all_is_what_there_is_and_small() -> None:
    assert sorted(gs.__all__) == gs.__all__
    assert len(gs.__all__) <= 28
    for name in gs.__all__:
        assert getattr(gs, name).__name__.rpartition(".")[2] == name
    assert set(gs.__all__) <= set(dir(gs))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gs.nothing  # noqa: B018


def test_save_and_load_stay_functions_whatever_is_imported() -> None:
    program = "import giantstep.saving, giantstep.loading, giantstep.opening, giantstep as gs; print(gs.save, gs.load)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.startswith("<function save")


def test_importing_brings_neither_torch_nor_threads_nor_files() -> None:
    program = (
        "import sys, threading; before = set(sys.modules); import giantstep;"
        "print(sorted({'torch', 'numpy', 'safetensors', 'rich', 'click'} & set(sys.modules)), threading.active_count())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[] 1\n"


def test_every_error_has_its_own_code_and_survives_the_wire() -> None:
    classes = errors.error_classes()
    every = errors._tree(errors.GiantstepError)
    assert len(classes) == len(every)
    for kind in every:
        error = kind("what happened", rank=3, phase="write")
        again = errors.error_from_wire(errors.error_to_wire(error))
        assert type(again) is kind
        assert str(again) == str(error) == "[rank 3, phase write] what happened"
        assert (again.rank, again.phase) == (3, "write")


def test_errors_can_be_caught_as_what_python_calls_them() -> None:
    for kind, builtin in (
        (errors.BadArgumentError, ValueError),
        (errors.UnsupportedTypeError, TypeError),
        (errors.KeyMismatchError, KeyError),
        (errors.CheckpointNotFoundError, FileNotFoundError),
        (errors.PhaseTimeoutError, TimeoutError),
    ):
        assert issubclass(kind, builtin)
        assert str(kind("plain words")) == "plain words"


def test_the_environment_gives_the_default_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gs.SaveOptions().timeout_secs == 1800
    monkeypatch.setenv("GIANTSTEP_TIMEOUT_SECS", "7.5")
    assert gs.LoadOptions().timeout_secs == 7.5
    monkeypatch.setenv("GIANTSTEP_TIMEOUT_SECS", "30m")
    with pytest.raises(gs.errors.BadArgumentError, match="GIANTSTEP_TIMEOUT_SECS='30m'"):
        gs.SaveOptions()
