"""A record as a page, report.md, and as a few lines for the terminal."""

from __future__ import annotations

from pathlib import Path

from bench.report import tables
from bench.report.record import MEMORY_WITHIN, SECONDS_WITHIN, Record
from bench.report.tables import TABLES, markdown, rates


def report(record: Record, results: Path, pictures: dict[str, str]) -> str:
    """Return report.md: what it was measured on, tables, pictures (name -> why it was left out), what is missing."""
    parts = [f"# Benchmarks: {tables.machine(record)}", _made_with(record, results)]
    known = {"train", "growth", *TABLES}
    others = [rates(group) for group in record.groups if group not in known]
    for table in (*TABLES.values(), *others):
        if lines := table.lines(record):
            parts.append(f"## {table.title}\n\n{markdown(table.head, lines)}")
            if table is TABLES["growth"]:
                parts.append(_judged(record))
    drawn = [f"![{name}]({name})" for name, why in pictures.items() if not why]
    parts += ["## Pictures", *drawn, *(f"{name} was not drawn: {why}" for name, why in pictures.items() if why)]
    if record.failed:
        parts.append("## Failed\n\n" + "\n".join(f"- {name}" for name in record.failed))
    if record.skipped:
        parts.append(
            "## Left out\n\n"
            + "\n".join(f"- {one['name']}: {' '.join(one['reason'].split())}" for one in record.skipped)
        )
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def summary(record: Record) -> str:
    """Return a line a group, the fastest of it, and what failed or was left out for time."""
    lines = []
    for group in record.groups:
        if group == "accuracy":
            lines += _timed(record)
            continue
        row = max(record.of(group), key=lambda row: float(row["extra_info"]["images_per_second"]))
        info = row["extra_info"]
        over = "".join(f"; {tables.ratio(ratio)} x {name}" for name, ratio in info["over"].items())
        lines.append(
            f"{group:9} {row['name']}: {tables.rate(info['images_per_second'])} images/s{over} (n = {row['n']})"
        )
        for name, ratio in info.get("steady_over", {}).items():
            lines.append(f"{'':9} from the second epoch on: {tables.ratio(ratio)} x {name}")
    if record.growth:
        lines.append(f"{'':9} {_judged(record)}")
    late = sum(one["reason"] == "out of time" for one in record.skipped)
    if late:
        lines.append(f"left out  {late} for time (report.md lists them; --budget gives more)")
    lines += [f"failed    {name}" for name in record.failed]
    return "\n".join(lines)


def _timed(record: Record) -> list[str]:
    table, lines = TABLES["accuracy"], []
    for cells in table.lines(record):
        shown = dict(zip(table.head, cells, strict=True))
        name, n = shown.pop("what"), shown.pop("n")
        del shown["photos"]
        lines += [f"{name} (n = {n})", *(f"  {head}: {cell}" for head, cell in shown.items() if cell != "-")]
    return lines


def _made_with(record: Record, results: Path) -> str:
    own = ", ".join(f"{name.partition('_')[0]} {value / 1e9:,.0f} G" for name, value in record.rates.items())
    facts = {
        "command": f"`{record.command}`",
        "date": f"{record.date} UTC, {record.seconds:,.0f} s in all",
        "commit": record.commit or "not known",
        "machine": tables.listed(record.hardware),
        "versions": tables.listed(record.versions),
        "the machine's own rates, a second": own.replace("copy ", "bytes copied "),
        "results": f"`{results.name}`",
    }
    shown = markdown(["made with", ""], [[name, value] for name, value in facts.items()])
    return (
        f"{shown}\nRates and seconds are medians of n rounds. Ratios are medians of rounds taken in turn with the "
        "baseline's (A B A B), with the lowest and the highest: seconds drift on a shared machine, ratios less."
    )


def _judged(record: Record) -> str:
    assert record.growth
    points = record.growth["points"]
    last = points[-1]
    within = {hold: "it is" if record.growth[hold] else "it is NOT" for hold in ("seconds_hold", "memory_holds")}
    return (
        f"A photo at {last['num_photos']:,} takes {last['over_fewest']:.2f} of the time that it takes at "
        f"{points[0]['num_photos']:,} ({within['seconds_hold']} within {SECONDS_WITHIN:.0%} at every size); "
        f"memory grows by {last['memory_over_sizes']:.2f} of the photos' sizes "
        f"({within['memory_holds']} within {MEMORY_WITHIN:.0%})."
    )
