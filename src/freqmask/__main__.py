"""``python -m freqmask`` is ``freqmask``."""

from freqmask.cli import main

if __name__ == "__main__":
    main()
