"""``python -m pipeline``: the command ``lsim`` where a launcher such as ``torchrun -m`` wants a module."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
