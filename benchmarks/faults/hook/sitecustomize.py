"""Installs the hook in a process that was started with LINGSHU_FAULT=FOLDER:N:SIGNAL."""

import os
from pathlib import Path

if "LINGSHU_FAULT" in os.environ:
    from fault_hook import install

    _folder, _at, _signal = os.environ["LINGSHU_FAULT"].rsplit(":", 2)
    install(Path(_folder), int(_at), int(_signal))
