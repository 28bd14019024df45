"""What to say of an exception that the user's own code raised: where, what, and by which lines."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from rewriter.storage import Digest, code_digest, short
from search.config.schema import Config, ConfigError

OURS = tuple(
    Path(__file__).resolve().parents[2] / name for name in ("quantfix", "rewriter", "search")
)
INSTALLED = tuple(
    Path(place).resolve()
    for place in {*map(sysconfig.get_path, ("purelib", "platlib", "stdlib")), sys.base_prefix}
)


def blame(error: BaseException, folder: Path | None = None) -> str:
    """Type, place (the last line of the user's own code that it passed) and text.

    Args:
        error: What was raised.
        folder: Where the user's code is; None: wherever nothing is installed.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{Path(error.filename).name}:{error.lineno}"
    else:
        users = [f for f in frames if _is_users(f.filename, folder)]
        frame = (users or list(frames))[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__} at {place}: {text}".rstrip(": ")


def users_lines(error: BaseException) -> str:
    """The lines of the user's own code that an error goes back to, and the last line of all.

    Returns:
        "" where the user's code has no part in it.
    """
    found: BaseException | None = error
    while found is not None:
        frames = list(traceback.extract_tb(found.__traceback__))
        users = [f for f in frames if _is_users(f.filename)]
        if users:
            shown = users if frames[-1] in users else [*users, frames[-1]]
            return "".join([*traceback.format_list(shown), f"{type(found).__name__}: {found}"])
        found = found.__cause__
    return ""


def _is_users(filename: str, folder: Path | None = None) -> bool:
    path = Path(filename)
    if not path.is_file() or path.name == "quantfix":
        return False
    path = path.resolve()
    if any(path.is_relative_to(place) for place in OURS):
        return False
    if folder is not None:
        return path.is_relative_to(folder.resolve())
    return not any(path.is_relative_to(place) for place in INSTALLED)


def callable_digest(item: object) -> str:
    """Identity of a callable of the user's: its code, and what that uses of the user's other code and of plain values.

    Comments and docstrings do not count, nor does what else is in the file, such as the call that starts a run.
    """
    digest, seen = Digest(), set[int]()

    def take(item: Any) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, partial):
            take(item.func)
            digest.add([repr(item.args), sorted(map(repr, item.keywords.items()))])
        elif inspect.ismethod(item):
            take(item.__func__)
            take(item.__self__)
        elif inspect.isfunction(item):
            digest.add([item.__qualname__, _code_of(item)])
            if seen != {id(item)} and not _written_by_user(item):
                return  # installed code has a version
            names = inspect.getclosurevars(item)
            used = {**names.globals, **names.nonlocals}
            for name in sorted(used):
                digest.add(name)
                take(used[name])
        elif inspect.isclass(item):
            digest.add(f"{item.__module__}.{item.__qualname__}")
            if _written_by_user(item):
                digest.add(_code_of(item))
                for name in sorted(vars(item)):
                    if inspect.isfunction(vars(item)[name]):
                        take(vars(item)[name])
        elif item is None or isinstance(item, bool | int | float | str | bytes):
            digest.add(item)
        elif isinstance(item, list | tuple | dict | Tensor):
            digest.add(item if isinstance(item, Tensor) else repr(item))
        elif not isinstance(item, ModuleType):
            take(type(item))
            state = getattr(item, "__dict__", {})
            for name in sorted(state):
                digest.add(name)
                take(state[name])

    take(item)
    return digest.hex()


def _written_by_user(item: Any) -> bool:
    try:
        return _is_users(str(inspect.getsourcefile(item)))
    except TypeError:
        return False


def _code_of(item: Any) -> str:
    """Identity of the code of a function or class; its bytecode where there is no source, as in a notebook that has gone on."""
    try:
        return code_digest(inspect.getsource(item))
    except (OSError, TypeError):
        code = getattr(item, "__code__", None)
        return short(b"" if code is None else code.co_code + repr(code.co_consts).encode())


OWN_PACKAGES = frozenset({"quantfix", "rewriter", "search"})


def call_factory(cfg: Config, key: str, name: str, args: Mapping[str, Any]) -> Any:
    """What a ``module:callable`` returns; the config file's folder is on the import path.

    Args:
        cfg: Whose folder it is.
        key: Section of the config, for messages.
        name: ``module:callable``.
        args: Keyword arguments.

    Raises:
        ConfigError: there is no such callable, the arguments do not fit, or it raises.
    """
    function = imported(cfg, key, name)
    subject = f"{key}: factory {name}"
    _check_arguments(subject, function, args)
    try:
        return function(**args)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{subject}: {blame(error, cfg.path.parent)}") from error


def imported(cfg: Config, key: str, name: str) -> Callable[..., Any]:
    """A ``module:callable`` itself; arguments and errors as for `call_factory`."""
    module_name, _, attribute = name.partition(":")
    subject, folder = f"{key}: factory {name}", cfg.path.parent
    try:
        module = _import_user_module(module_name, folder)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            fact = f"no module {error.name}, neither in {folder} nor installed"
            raise ConfigError(f"{subject}: {fact}") from error
        raise ConfigError(f"{subject}: {blame(error, folder)}") from error
    except ConfigError as error:
        raise ConfigError(f"{subject}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{subject}: {blame(error, folder)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        near = difflib.get_close_matches(attribute, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{subject}: {module_name} has no callable {attribute}{hint}")
    return function


def _import_user_module(name: str, folder: Path) -> ModuleType:
    top = name.partition(".")[0]
    own = [p for p in (folder / f"{top}.py", folder / top / "__init__.py") if p.is_file()]
    if own and top in OWN_PACKAGES and Path(__file__).parents[2] not in own[0].parents:
        raise ConfigError(f"{own[0].name}: the name {top} is quantfix's own; rename the file")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    loaded = sys.modules.get(top)
    if own and loaded is not None and top not in OWN_PACKAGES:
        # a module of this name, but of another config's folder, was imported before
        if Path(loaded.__file__ or "").absolute() != own[0].absolute():
            for other in [m for m in sys.modules if m == top or m.startswith(top + ".")]:
                del sys.modules[other]
        sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _check_arguments(subject: str, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # written in C: it says itself what does not fit
    try:
        signature.bind(**args)
    except TypeError as error:
        raise ConfigError(f"{subject}: args do not fit {signature}: {error}") from error
