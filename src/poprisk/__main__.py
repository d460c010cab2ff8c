"""``python -m poprisk`` is the ``poprisk`` command."""

from poprisk.cli import main

if __name__ == "__main__":
    main()
