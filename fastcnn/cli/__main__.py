"""`python -m fastcnn.cli`."""

from fastcnn.cli import command

if __name__ == "__main__":
    command()
