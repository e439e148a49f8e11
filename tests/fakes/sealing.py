"""Where the sandbox is made for: Linux on x86_64 with seccomp. Whether it holds there is for the tests to show."""

import platform
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
HERE = sys.platform == "linux" and platform.machine() == "x86_64" and "\nSeccomp:" in STATUS.read_text()
only_here = pytest.mark.skipif(not HERE, reason="the sandbox needs Linux on x86_64 with seccomp")
