"""`python -m layerprobe` is the same as `layerprobe`."""

from layerprobe.cli.main import main

if __name__ == "__main__":
    main()
