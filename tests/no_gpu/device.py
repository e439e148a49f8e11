"""A CUDA device that is not there, as far as torch's own C++ asks for one. Call `declare` before torch is imported."""

import ctypes
import importlib.util
import subprocess
import tempfile
from pathlib import Path


def declare() -> None:
    """Compile and load `device.cpp`: torch asks once whether there is a device, when it is imported."""
    (torch_path,) = importlib.util.find_spec("torch").submodule_search_locations
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "device.so"
        paths = [f"-I{torch_path}/include", f"-L{torch_path}/lib", f"-Wl,-rpath,{torch_path}/lib"]
        source = str(Path(__file__).with_suffix(".cpp"))
        command = ["c++", "-std=c++20", "-shared", "-fPIC", source, "-o", str(library), *paths, "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library))
