"""`python -m fastcnn.cli`."""

from fastcnn.cli import main

if __name__ == "__main__":
    main()
