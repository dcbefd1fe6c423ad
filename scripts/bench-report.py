"""Turns the results of scripts/bench into a markdown table and an SVG chart.

usage: bench-report.py RESULTS.TSV OUT_DIR

Medians per row and target; ratios to the plain directory, else to the first target; what the disk was given, for a
byte or a transaction, in the order of the targets. Standard library only.
"""

import csv
import pathlib
import statistics
import sys

COLORS = {"plain": "#9aa0a6", "byokfs": "#1a73e8", "byokfs-dev": "#8ab4f8", "gocryptfs": "#f29900"}
TITLES = {
    "seq_write": "sequential write, 1 MiB",
    "seq_read": "sequential read, 1 MiB, cold",
    "rand_read": "random read, 16 KiB, O_DIRECT, depth 16",
    "rand_write": "random write, 16 KiB, O_DIRECT, depth 16",
    "mix": "70/30 mix, 16 KiB, O_DIRECT, 4 threads",
    "append_512": "append 512 B + fdatasync",
    "append_4k": "append 4 KiB + fdatasync",
    "append_512_16": "append 512 B + fdatasync, 16 threads, a file each",
    "append_4k_16": "append 4 KiB + fdatasync, 16 threads, a file each",
    "append_4k_shared": "append 4 KiB + fdatasync, 16 threads, one file",
    "overwrite": "random overwrite of 1 GiB, 16 KiB, O_DIRECT, 4 threads",
    "overwrite_worst": "its longest write (less is better)",
    "commit_beside": "append 4 KiB + fdatasync beside 4 threads that overwrite",
    "commit_beside_worst": "the longest of them (less is better)",
    "create": "create 4000 files",
    "stat": "stat 4000 files",
    "unlink": "unlink 4000 files",
    "create_sync": "create 400 files of 4 KiB, each with fsync",
    "oltp_read_write": "sysbench oltp_read_write, MariaDB",
    "oltp_write_only": "sysbench oltp_write_only, MariaDB",
    "oltp_write_safe": "sysbench oltp_write_only, doublewrite off on byokfs only",
    "oltp_write_safe_1": "the same by one thread",
    "recovery": "mount after kill -9 under random overwrite (less is better)",
    "peak_memory": "peak memory of the daemon",
}

# Only of some targets.
ONE_SIDED = ("peak_memory", "recovery")
LESS_IS_BETTER = (*ONE_SIDED, "overwrite_worst", "commit_beside_worst")


def load(path):
    values, units, targets = {}, {}, []
    with open(path, newline="") as file:
        for line in csv.DictReader(file, delimiter="\t"):
            row, target = line["row"], line["target"]
            units[row] = line["unit"]
            if target not in targets:
                targets.append(target)
            if line["value"] not in ("", "failed"):
                values.setdefault((row, target), []).append(float(line["value"]))
    medians = {key: statistics.median(found) for key, found in values.items()}
    rows = [row for row in TITLES if row in units]
    assert all(row.removesuffix(".written") in TITLES for row in units), "a row without a title"
    return rows, targets, units, medians


def number(value):
    if value is None:
        return "failed"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(rows, targets, units, medians):
    base = "plain" if "plain" in targets else targets[0]
    others = [target for target in targets if target != base]
    head = ["workload", "unit", *targets, *(f"{target} / {base}" for target in others), "given to the disk"]
    lines = ["| " + " | ".join(head) + " |", "|---|---" + "|---:" * (len(head) - 2) + "|"]
    for row in rows:
        cells = [TITLES[row], units[row]]
        for target in targets:
            absent = "" if row in ONE_SIDED else "failed"
            value = medians.get((row, target))
            cells.append(absent if value is None else number(value))
        for target in others:
            value, reference = medians.get((row, target)), medians.get((row, base))
            cells.append(f"{value / reference:.2f}" if value is not None and reference else "")
        given = [medians.get((f"{row}.written", target)) for target in targets]
        unit = units.get(f"{row}.written", "")
        shown = " / ".join("-" if value is None else f"{value:.1f}" for value in given)
        cells.append(f"{shown} {unit}" if any(value is not None for value in given) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(rows, targets, units, medians):
    # Where a longer bar is better.
    rows = [row for row in rows if row not in LESS_IS_BETTER]
    left, width, bar, gap, top = 300, 460, 13, 14, 46
    height = top + len(rows) * (bar * len(targets) + gap) + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 110}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    x = left
    for target in targets:
        out.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{COLORS.get(target, "#666")}"/>')
        out.append(f'<text x="{x + 17}" y="24">{target}</text>')
        x += 110
    y = top
    for row in rows:
        best = max((medians.get((row, target), 0) for target in targets), default=0) or 1
        middle = y + bar * len(targets) / 2 + 4
        out.append(f'<text x="{left - 8}" y="{middle}" text-anchor="end">{TITLES[row]}</text>')
        for target in targets:
            value = medians.get((row, target))
            length = width * (value or 0) / best
            out.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 2}" fill="{COLORS.get(target, "#666")}"/>'
            )
            out.append(
                f'<text x="{left + length + 5:.1f}" y="{y + bar - 4}" font-size="10">{number(value)} {units[row]}</text>'
            )
            y += bar
        y += gap
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    results, out = sys.argv[1], pathlib.Path(sys.argv[2])
    loaded = load(results)
    text = table(*loaded)
    print(text)
    (out / "table.md").write_text(text + "\n")
    (out / "chart.svg").write_text(chart(*loaded))


main()
