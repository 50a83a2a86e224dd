"""`python -m terrasynth` is the `terrasynth` command."""

from terrasynth.cli import main

if __name__ == "__main__":
    main()
