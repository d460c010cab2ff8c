"""``python -m poprisk`` is the ``poprisk`` command, of the laboratory where it is installed."""

import runpy

if __name__ == "__main__":
    runpy.run_module("poprisk_lab", run_name="__main__", alter_sys=True)
