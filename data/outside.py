"""Import a Python file by its path: rewards and data sets of one's own may lie outside of this repository.

Left out: what the file must have in it (`data/__init__.py`, `rewards/__init__.py`).
"""

import importlib.util
import sys
import zlib
from pathlib import Path
from types import ModuleType


def import_file(place: str, option: str) -> ModuleType:
    """The module in a file. It is run once in a process, and may import the files beside it.

    Args:
      place: path of a .py file, seen from the directory in which the program was started.
      option: that names it, for the message.

    Raises:
      ValueError: there is no such file, or it cannot be imported.
    """
    path = Path(place).expanduser().resolve()
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{option}: there is no Python file {path}; was it moved, or another directory meant?")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[name]
        raise ValueError(f"{option}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    return module
