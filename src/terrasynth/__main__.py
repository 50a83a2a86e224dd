"""`python -m terrasynth`, for launchers that start modules: `torchrun -m terrasynth train RECIPE`."""

from terrasynth.cli import main

if __name__ == "__main__":
    main()
