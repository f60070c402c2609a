"""Write the tables of README.md and docs/*.md from the files in bench/results/published; none is typed by hand.

    python scripts/readme_tables.py            # write
    python scripts/readme_tables.py --check    # exit with 1 where a table differs

A table stands between <!-- table: NAME --> and <!-- end -->; its NAME is a key of bench.report.tables.TABLES.
The tables of docs/scale.md come from a model: python -m bench.scale --write makes them.
"""

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.report import tables  # noqa: E402
from bench.report.record import Record, read  # noqa: E402

PUBLISHED = ROOT / "bench" / "results" / "published"
# Tables of CPU benchmarks, which need no row saying that no GPU was measured.
ON_CPU = {"infer", "decode", "recipes"}


def main(arguments: list[str]) -> int:
    """Write the tables, or compare them; return the exit code."""
    if arguments not in ([], ["--check"]):
        print(f"readme_tables: error: expected --check or nothing, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    records, code = published(PUBLISHED), 0
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = filled(before, records)
        if before == after:
            continue
        if arguments:
            name = path.relative_to(ROOT)
            print(f"{name} differs from the published results: run python scripts/readme_tables.py", file=sys.stderr)
            code = 1
        else:
            path.write_text(after, encoding="utf-8")
    return code


def documents() -> list[Path]:
    """Return the files whose marked tables come from results files."""
    return [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "scale.md")]


def published(folder: Path) -> list[Record]:
    """Return the records of a folder's results files, by file name."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def filled(text: str, records: list[Record]) -> str:
    """Return a text with every marked table filled in. Raises ValueError for an unknown table."""

    def make(name: str) -> str:
        if name not in tables.TABLES:
            raise ValueError(f"no table {name}: expected one of {', '.join(tables.TABLES)}")
        return table(name, records)

    return tables.fill(text, make)


def table(name: str, records: list[Record]) -> str:
    """Return a table of all records that have rows for it, and below it each machine's command, date and versions."""
    wanted = tables.TABLES[name]
    found = [(record, lines) for record in records if (lines := wanted.lines(record))]
    rows = [[tables.machine(record), *line] for record, lines in found for line in lines]
    if name not in ON_CPU and not any("gpu" in record.hardware for record, _ in found):
        rows.append(["an NVIDIA GPU", "not measured", *[""] * (len(wanted.head) - 1)])
    made_with = "".join(f"\n{_made_with(record)}\n" for record, _ in found)
    return f"\n{tables.markdown(['machine', *wanted.head], rows)}{made_with}\n"


def _made_with(record: Record) -> str:
    what = f"{tables.machine(record)}: `{record.command}`, {record.date[:10]}; {tables.listed(record.versions)}."
    if record.settings.get("scale") == "smoke":
        what += " The smoke form shows that the parts work; its figures mean nothing."
    return textwrap.fill(what, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
