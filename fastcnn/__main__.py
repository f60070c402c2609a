"""`python -m fastcnn`: the command `fastcnn`."""

from fastcnn.cli import command

if __name__ == "__main__":
    command()
