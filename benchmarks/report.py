"""Write ``docs/measured.md``, and the summary in the README, from raw results: ``python -m benchmarks.report``.

Raw results are ``benchmarks/results/*.json``, as ``--json`` wrote them, and the metadata of the shipped reconstructors.
No figure in either document is written by hand.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import headline
from decoder.catalogue import SHIPPED, Reconstructor, load_catalogue

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "measured.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: written by python -m benchmarks.report -->", "<!-- end of measured -->"


def document() -> str:
    """All tables, as Markdown."""
    parts = ["# Measured", "", "Written by `python -m benchmarks.report` from raw results. Don't edit.", ""]
    parts += quality_table(results("quality"))
    for veil in veils():
        parts += veil_tables(veil)
    for result in results("latency"):
        parts += latency_table(result)
    for result in results("faults"):
        parts += faults_table(result)
    return "\n".join(parts).rstrip() + "\n"


def readme(text: str) -> str:
    """The README with its summary renewed."""
    head, rest = text.split(BEGIN, 1)
    return head + BEGIN + "\n" + "\n".join(summary()) + "\n" + END + rest.split(END, 1)[1]


def results(kind: str) -> list[dict[str, Any]]:
    """Raw results of a kind, in order of their file names, each with its ``file``."""
    paths = sorted(RESULTS.glob(f"{kind}-*.json"))
    return [json.loads(path.read_text()) | {"file": path.relative_to(ROOT).as_posix()} for path in paths]


def veils() -> list[Reconstructor]:
    """The shipped veiled reconstructors, fewest rows first."""
    found = [each for each in load_catalogue([SHIPPED], "onnxruntime", 1).reconstructors if each.rendition == "veiled"]
    return sorted(found, key=lambda each: each.engine.rows)


def summary() -> list[str]:
    """What the README says: each veil's cost, and what judges that it never saw still read."""
    lines = [
        "| sampling ratio | PSNR, plain → veiled | unseen judges read, plain → veiled | after JPEG 75 |",
        "|---|---|---|---|",
    ]
    for veil in veils():
        fidelity = veil.measured["psnr"]
        ratio = veil.engine.rows / veil.engine.block**2
        cost = f"{fidelity['plain']:.2f} → {fidelity['veiled']:.2f} dB"
        cells = [f"{_judged(veil, 'plain', way)} → {_judged(veil, 'veiled', way)} %" for way in ("as is", "JPEG 75")]
        lines.append(f"| {ratio:.2f} | {cost} | {cells[0]} | {cells[1]} |")
    for veil in veils():
        count, judges = veil.measured["pictures"], len(_judges(veil))
        lines += [
            "",
            f"{veil.name}: {count} gray ImageNet pictures, mean of {judges} judges that no veil was trained against.",
        ]
    return lines


def _judges(veil: Reconstructor) -> list[str]:
    return [name for name in veil.measured["recognition"] if name not in veil.measured["trained_against"]]


def _judged(veil: Reconstructor, rendition: str, way: str) -> str:
    read = [veil.measured["recognition"][name][rendition][way] for name in _judges(veil)]
    return f"{sum(read) / len(read):.1f}"


def quality_table(rows: list[dict[str, Any]]) -> list[str]:
    """Means of whole pictures."""
    lines = ["## Quality", "", "| pictures | ratio | rows | rendition | PSNR, dB | SSIM | bits per pixel | raw |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        name = f"{Path(row['folder']).name} ({len(row['pictures'])})"
        figures = f"{row['psnr']:.2f} | {row['ssim']:.4f} | {row['bpp']:.3f}"
        link = f"[json](../{row['file']})"
        lines.append(f"| {name} | {row['ratio']} | {row['rows']} | {row['rendition']} | {figures} | {link} |")
    if rows:
        lines += ["", f"Measured on {headline(rows[0]['machine'])}."]
    return [*lines, ""]


def veil_tables(veil: Reconstructor) -> list[str]:
    """One table a way to the readers."""
    measured = veil.measured
    readers = measured["recognition"]
    against = measured["trained_against"]
    lines = [f"## What readers read of {veil.name}", ""]
    lines += [
        f"Recognition in percent, {measured['pictures']} pictures. T0, trained against: {', '.join(against)}. "
        f"T1, never seen in training: {', '.join(_judges(veil))}. JPEG and notch are T2. Noise and blur lose as much "
        f"PSNR as the veil. Trained at commit {measured['trained']['commit']}, measured at "
        f"{measured['measured']['commit']} on {measured['measured']['processor']}. Reconstructor {veil.id}.",
        "",
    ]
    for way in next(iter(next(iter(readers.values())).values())):
        lines += [f"**{way}**", "", "| pictures | PSNR, dB | " + " | ".join(readers) + " |"]
        lines += ["|---|---|" + "---|" * len(readers)]
        for rendition, fidelity in measured["psnr"].items():
            cells = [f"{table[rendition][way]:.1f}" for table in readers.values()]
            shown = "" if rendition == "original" else f"{fidelity:.2f}"
            lines.append(f"| {rendition} | {shown} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def latency_table(result: dict[str, Any]) -> list[str]:
    """Stages of one source."""
    width, height = result["size"]
    lines = [f"## Latency of {Path(result['source']).name}, {width}×{height}, r = {result['ratio']}", ""]
    lines += ["| stage | median, ms | 95th percentile | 99th percentile |", "|---|---|---|---|"]
    for stage, times in result["stages_ms"].items():
        lines.append(f"| {stage} | {times['median']:.2f} | {times['p95']:.2f} | {times['p99']:.2f} |")
    frames = result["frames"]
    lines += [
        "",
        f"At its own pace {frames['shown']} of {frames['captured']} frames were shown, {result['paced_fps']} "
        f"frames/s; at full speed {result['full_speed_frames']['shown']} of {result['full_speed_frames']['captured']}, "
        f"{result['full_speed_fps']} frames/s. On the camera, sample + "
        f"quantise + pack took {result['camera_ms']} ms and {result['payload_bytes']} bytes a frame; OpenCV's JPEG of "
        f"the same frames {result['jpeg']['median']} ms and {result['jpeg']['bytes']} bytes. Measured on "
        f"{headline(result['machine'])}. "
        f"[json](../{result['file']})",
        "",
    ]
    return lines


def faults_table(result: dict[str, Any]) -> list[str]:
    """A camera and the service while things go wrong around them."""
    width, height = result["size"]
    lines = ["## While things go wrong", ""]
    lines += [
        f"One camera of {width}×{height} at {result['frame_rate']} frames/s and its viewer, all along; beside it "
        f"{result['damaged']} damaged messages, {result['connects']} connections that come and go, an engine that "
        "raises, and viewers that stop reading. Latency is from capture to the viewer; memory, threads and open files "
        "are the service's at the end of each row.",
        "",
        "| meanwhile | seconds | frames/s | longest gap, ms | median, ms | 99th percentile | MiB, most | threads |"
        " files | answers | without end |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        took, answers = row["latency_ms"], (f"{number} {answer}" for answer, number in row["answers"].items())
        cells = [row["phase"], row["seconds"], row["fps"], row["longest_gap_ms"], took["median"], took["p99"]]
        cells += [f"{row['memory_mb']}, {row['most_memory_mb']}", row["threads"], row["open_files"]]
        lines.append("| " + " | ".join(map(str, [*cells, "; ".join(answers), row["endless"]])) + " |")
    stop = result["stop"]
    lines += [
        "",
        f"Stopped within {stop['seconds']} s while viewers didn't read; exit code {stop['code']}. Measured on "
        f"{headline(result['machine'])}. [json](../{result['file']})",
        "",
    ]
    return lines


def stale() -> Iterator[Path]:
    """Documents that aren't what the raw results say."""
    if not DOCUMENT.exists() or DOCUMENT.read_text() != document():
        yield DOCUMENT
    if README.read_text() != readme(README.read_text()):
        yield README


def main() -> None:
    """Write both."""
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document())
    README.write_text(readme(README.read_text()))


if __name__ == "__main__":
    main()
