"""`python -m fastcnn`: the command `fastcnn`."""

from fastcnn.cli import main

if __name__ == "__main__":
    main()
