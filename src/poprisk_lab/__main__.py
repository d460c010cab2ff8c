"""``python -m poprisk_lab`` is the ``poprisk`` command."""

from poprisk_lab.cli import main

if __name__ == "__main__":
    main()
