"""``model: {exported: FILE.pt2}``: a network saved by ``torch.export.save``.

torch reads such an archive with an unpickler that can run any code. Here it may read tensors only, and an archive with
objects of other kinds is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewriter.errors import TraceError
from rewriter.tracing import module_of_program
from search.config.schema import Config, ConfigError

_OBJECTS = ("custom_obj", "opaque_obj")


def load(cfg: Config) -> nn.Module:
    """The exported program as a module.

    Raises:
        ConfigError: there is no such file, or it holds no exported program, or more than tensors.
    """
    path = cfg.resolve(str(cfg.model.exported))
    if not path.is_file():
        raise ConfigError(f"model.exported: no such file: {path}")
    _refuse_objects(path)
    try:
        with _tensors_only():
            program = torch.export.load(path)
    except pickle.UnpicklingError as error:
        fact = "holds code or objects, not only tensors: refused, as loading would run it"
        raise ConfigError(f"model.exported: {path.name}: {fact}") from error
    except Exception as error:  # what a damaged archive raises depends on where it is damaged
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"model.exported: {path.name}: no exported program: {first}") from error
    try:
        return module_of_program(program)
    except TraceError as error:
        raise ConfigError(f"model.exported: {path.name}: {error}") from error


def _refuse_objects(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"model.exported: {path.name}: no archive of torch.export.save: {error}"
        ) from error
    for name in names:
        # the first folder is called as the file was; torch finds a record whatever its case
        if any(kind in name.partition("/")[2].lower() for kind in _OBJECTS):
            raise ConfigError(
                f"model.exported: {path.name}: holds an object ({name}): refused, only tensors are read"
            )


@contextmanager
def _tensors_only() -> Generator[None]:
    """``torch.export.load`` asks ``torch.load`` for whole pickles; here that reads tensors alone."""
    whole = torch.load

    def tensors(*args: Any, **kwargs: Any) -> Any:
        return whole(*args, **{**kwargs, "weights_only": True})

    torch.load = tensors
    try:
        yield
    finally:
        torch.load = whole
