"""Entry point of `anchor-build` and `python -m anchor_build`."""

from anchor_build.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
