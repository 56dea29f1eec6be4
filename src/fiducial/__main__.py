"""`python -m fiducial` is the command `fiducial`."""

from fiducial.app.cli.main import main

if __name__ == "__main__":
    main()
