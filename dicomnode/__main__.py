"""`python -m dicomnode` is `dicomnode`."""

from dicomnode.cli import main

if __name__ == "__main__":
    main()
