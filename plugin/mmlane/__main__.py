"""`python -m mmlane`: the command `mmlane`, for an environment whose scripts are not on PATH."""

from mmlane.cli import main

if __name__ == "__main__":
    main()
