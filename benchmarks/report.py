"""Write ``docs/measured.md``, and the summary in the README, from raw results: ``python -m benchmarks.report``.

Raw results are ``benchmarks/results/*.json``, as ``--json`` wrote them, and the metadata of the shipped reconstructors.
No figure in either document is written by hand.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import headline
from decoder.catalogue import SHIPPED, Reconstructor, load_catalogue, read_forms
from decoder.engines import REFERENCE

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "measured.md"
README = ROOT / "README.md"
OURS, CSNET = ("plain-r10", "plain-r10-light"), "csnet-r10"
"""What is held against the paper's network, and that network, at r = 0.1."""
BEGIN, END = "<!-- measured: written by python -m benchmarks.report -->", "<!-- end of measured -->"


def document() -> str:
    """All tables, as Markdown."""
    parts = ["# Measured", "", "Written by `python -m benchmarks.report` from raw results. Don't edit.", ""]
    parts += quality_table(results("quality"))
    for veil in veils():
        parts += veil_tables(veil)
        parts += strength_table(veil, results(f"strength-{veil.name}"))
    parts += form_table()
    for kind, tables in SECTIONS.items():
        for result in results(kind):
            parts += tables(result)
    return "\n".join(parts).rstrip() + "\n"


def readme(text: str) -> str:
    """The README with its summary renewed."""
    head, rest = text.split(BEGIN, 1)
    return head + BEGIN + "\n" + "\n".join(summary()) + "\n" + END + rest.split(END, 1)[1]


def results(kind: str) -> list[dict[str, Any]]:
    """Raw results of a kind, in order of their file names, each with its ``file``, seen from the repository."""
    paths = [*RESULTS.glob(f"{kind}.json"), *sorted(RESULTS.glob(f"{kind}-*.json"))]
    return [json.loads(path.read_text()) | {"file": f"benchmarks/results/{path.name}"} for path in paths]


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
        told = veil.measured
        cells = [f"{_judged(told, 'plain', way)} → {_judged(told, 'veiled', way)} %" for way in ("as is", "JPEG 75")]
        lines.append(f"| {ratio:.2f} | {cost} | {cells[0]} | {cells[1]} |")
    for veil in veils():
        count, judges = veil.measured["pictures"], len(_judges(veil.measured))
        lines += [
            "",
            f"{veil.name}: {count} gray ImageNet pictures, mean of {judges} judges that no veil was trained against.",
        ]
    return lines


def _judges(measured: dict[str, Any]) -> list[str]:
    return [name for name in measured["recognition"] if name not in measured["trained_against"]]


def _judged(measured: dict[str, Any], rendition: str, way: str) -> str:
    read = [measured["recognition"][name][rendition][way] for name in _judges(measured)]
    return f"{sum(read) / len(read):.1f}"


def quality_table(rows: list[dict[str, Any]]) -> list[str]:
    """Means of whole pictures."""
    lines = ["## Quality", "", "| pictures | reconstructor | ratio | rows | PSNR, dB | SSIM | bits per pixel | raw |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        name = f"{Path(row['folder']).name} ({len(row['pictures'])})"
        figures = f"{row['psnr']:.2f} | {row['ssim']:.4f} | {row['bpp']:.3f}"
        link = f"[json](../{row['file']})"
        lines.append(f"| {name} | {row['name']} | {row['ratio']} | {row['rows']} | {figures} | {link} |")
    for measured_on in dict.fromkeys(headline(row["machine"]) for row in rows):
        names = [row["name"] for row in rows if headline(row["machine"]) == measured_on]
        lines += ["", f"{', '.join(dict.fromkeys(names))}: measured on {measured_on}."]
    return [*lines, ""]


def veil_tables(veil: Reconstructor) -> list[str]:
    """One table a way to the readers."""
    measured = veil.measured
    readers = measured["recognition"]
    against = measured["trained_against"]
    lines = [f"## What readers read of {veil.name}", ""]
    lines += [
        f"Recognition in percent, {measured['pictures']} pictures. T0, trained against: {', '.join(against)}. "
        f"T1, never seen in training: {', '.join(_judges(measured))}. JPEG and notch are T2. Noise and blur lose as "
        f"much PSNR as the veil. Trained at commit {measured['trained']['commit']}, measured at "
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


def strength_table(veil: Reconstructor, others: list[dict[str, Any]]) -> list[str]:
    """What a veil costs and leaves as it is, and made weaker and stronger.

    Args:
        others: what ``veilcam-train evaluate`` wrote of those.
    """
    if not others:
        return []
    rows = {0.0: veil.measured, 1.0: veil.measured} | {row["strength"]: row for row in others}
    readers, ways = list(veil.measured["recognition"]), list(next(iter(veil.measured["recognition"].values()))["plain"])
    heads = ["strength", "PSNR, dB", *readers, *(f"judges, {way}" for way in ways), "raw"]
    lines = [f"## {veil.name} made weaker and stronger", ""]
    lines += [
        "`veilcam-train strengthen` makes one of another that was trained, without training: 0 is the plain "
        "reconstruction, 1 the veil as it was trained and ships. Recognition in percent, "
        f"{veil.measured['pictures']} pictures, by each reader as is; "
        f"of the judges, {', '.join(_judges(veil.measured))}, the mean.",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|{'--:|' * (len(heads) - 2)}---|",
    ]
    for strength, row in sorted(rows.items()):
        rendition = "veiled" if strength else "plain"
        cells = [f"{row['recognition'][name][rendition]['as is']:.1f}" for name in readers]
        cells += [_judged(row, rendition, way) for way in ways]
        link = f"[json](../{row['file']})" if "file" in row else "shipped"
        lines.append(f"| {strength:g} | {row['psnr'][rendition]:.2f} | {' | '.join(cells)} | {link} |")
    measured_on = {f"commit {row['measured']['commit']} on {row['measured']['processor']}" for row in rows.values()}
    return [*lines, "", f"Measured at {'; '.join(sorted(measured_on))}.", ""]


def film_table(result: dict[str, Any]) -> list[str]:
    """What readers read of pictures as they are shown, and in a film of them."""
    readers = list(next(iter(result["recognition"].values())))
    lines = ["## What a film leaves of the veil", ""]
    lines += [
        f"{result['pictures']} photographs, r = {result['ratio']}, each a scene that moves: its middle picture as it "
        "is shown, and as it is in the film that `veilcam-decode export` makes (H.264). Recognition in percent.",
        "",
        "| pictures | PSNR, dB | bytes | " + " | ".join(readers) + " |",
        "|---|--:|--:|" + "--:|" * len(readers),
    ]
    for rendition, read in result["recognition"].items():
        for way, told in (("shown", "as shown"), ("film", "in a film")):
            cells = [f"{read[name][way]:.1f}" for name in readers]
            size = result["bytes_a_picture"][rendition] if way == "film" else "–"
            name, fidelity = result["names"][rendition], result["psnr"][rendition][way]
            lines.append(f"| {name}, {told} | {fidelity:.2f} | {size} | " + " | ".join(cells) + " |")
    return [*lines, "", _measured_on(result), ""]


def form_table() -> list[str]:
    """What integer forms lose, and what readers read through a veil's, as ``veilcam-train quantise`` measured it."""
    lines = ["## Integer forms of reconstructors", ""]
    lines += ["| form | PSNR of float32, dB | lost, dB | to float32, dB | readers, float32 → integers, % |"]
    lines += ["|---|--:|--:|--:|---|"]
    for forms in read_forms([SHIPPED]):
        for precision, model in sorted(forms.items()):
            if precision == "float32":
                continue
            told = json.loads(model.told["quantised"])
            read = [
                f"{name} {each['float32']} → {each[precision]}" for name, each in told.get("recognition", {}).items()
            ]
            figures = f"{told['psnr_float32']:.2f} | {told['lost_db']:.3f} | {told['agreement_db']:.1f}"
            plain = "plain" if model.told["rendition"] == "plain" else "not looked at"
            lines.append(f"| {model.path.stem} | {figures} | {', '.join(read) or plain} |")
    return [*lines, "", "PSNR on crops of photographs that weren't calibrated on; readers on whole labelled ones.", ""]


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
        f"the same frames {result['jpeg']['median']} ms and {result['jpeg']['bytes']} bytes. Reconstructed "
        f"by {result['engine']['name']}, {result['engine']['threads']} threads. {_measured_on(result)}",
        "",
    ]
    return lines


def engine_tables(result: dict[str, Any]) -> list[str]:
    """Milliseconds of each engine on each reconstructor, and of one reconstructor beside another."""
    lines = [f"## Engines: {', '.join(result['reconstructors'])}", ""]
    lines += [
        f"Median milliseconds for a picture, and in brackets how many times faster than {REFERENCE} in the same round; "
        f"{result['rounds']} rounds, {result['threads']} threads. {_measured_on(result)}",
        "",
    ]
    for name, engines in result["reconstructors"].items():
        sizes = list(engines[REFERENCE]["sizes"])
        lines += [f"| {name} | " + " | ".join(sizes) + " |", "|---|" + "--:|" * len(sizes)]
        for engine, row in engines.items():
            cells = [f"{each['median_ms']:.1f} ({each['times_faster']:.2f})" for each in row.get("sizes", {}).values()]
            if cells:
                lines.append(f"| {engine} | " + " | ".join(cells) + " |")
        left_out = [f"{engine} ({row['problem'].splitlines()[0]})" for engine, row in engines.items() if row["problem"]]
        lines += ["", *([f"Not run: {'; '.join(left_out)}.", ""] if left_out else [])]
    return lines + _against_csnet(result)


def _against_csnet(result: dict[str, Any]) -> list[str]:
    """What the paper's CSNet costs on the same engines in the same run, and what each gives on Set11."""
    theirs = result["reconstructors"].get(CSNET)
    measured = {name: result["reconstructors"][name] for name in OURS if name in result["reconstructors"]}
    if theirs is None or not measured:
        return []
    given = {row["name"]: row["psnr"] for row in results("quality") if Path(row["folder"]).name == "set11"}
    sizes = list(theirs[REFERENCE]["sizes"])
    lines = [f"| times faster than {CSNET}, {given[CSNET]:.2f} dB on Set11 | " + " | ".join(sizes) + " |"]
    lines += ["|---|" + "--:|" * len(sizes)]
    for name, engines in measured.items():
        for engine, row in engines.items():
            ours, other = (each.get("sizes") for each in (row, theirs[engine]))
            if ours and other:
                cells = [f"{other[size]['median_ms'] / ours[size]['median_ms']:.1f}" for size in sizes]
                # What an integer form gives on Set11 wasn't measured.
                fidelity = [] if "int8" in engine else [f"{given[name]:.2f} dB"]
                lines.append(f"| {', '.join((name, *fidelity, engine))} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def serve_table(result: dict[str, Any]) -> list[str]:
    """A service as cameras and viewers grow."""
    lines = [f"## A service under load, {result['size']} at {result['frame_rate']:g} frames/s", ""]
    head = ["cameras", "viewers of each", "due", "received", "made", "dropped", "frames/s of each", "median, ms"]
    head += ["p99, ms", "frames a batch", "server CPU, ms a frame received", "ms a picture made", "server, MiB"]
    lines += ["| " + " | ".join(head) + " |", "|" + "--:|" * len(head)]
    for row in result["rows"]:
        took = row["latency_ms"]
        due = round(row["cameras"] * result["frame_rate"] * result["seconds"])
        cells = [row["cameras"], row["viewers"], due, *(row[name] for name in ("received", "made", "dropped", "fps"))]
        by_made = row["server_cpu_ms_per_frame"] * row["received"] / row["made"] if row["made"] else None
        cells += [took["median"], took["p99"], row["batch"], row["server_cpu_ms_per_frame"]]
        cells += [None if by_made is None else round(by_made, 2), row["memory_mb"]]
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    return [
        *lines,
        "",
        f"{result['seconds']:g} s each; latency from capture until the first viewer of a camera has the JPEG. What is "
        "due and wasn't received, cameras held back: they send less to a service that can't keep up. Cameras and "
        f"viewers are processes on the same machine. {_measured_on(result)}",
        "",
    ]


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
        f"Stopped within {stop['seconds']} s while viewers didn't read; exit code {stop['code']}. "
        + _measured_on(result),
        "",
    ]
    return lines


def kills_table(result: dict[str, Any]) -> list[str]:
    """What became of every frame while camera and server were killed."""
    kills, took, dropped = result["kills"], result["first_picture_s"], result["dropped"]
    rows = {
        "kills of the camera": kills["camera"],
        "kills of the server": kills["server"],
        "frames recorded": result["recorded"],
        "frames still in the camera's spool": result["spooled"],
        "frames that the camera said it dropped": ", ".join(f"{dropped[why]} {why}" for why in dropped) or 0,
        "frames **lost**": result["lost"],
        "frames **recorded twice**": result["duplicated"],
        "frames **out of order**": result["out_of_order"],
    }
    if took:
        rows["first picture after a server's start, s"] = f"median {took['median']}, worst {took['worst']}"
    return [
        "## Killed again and again",
        "",
        f"A camera ({result['source']}) with a spool, and a server that records. At random one of them ends by SIGKILL "
        "and is started again at once; then every frame is looked for.",
        "",
        *("| | |", "|---|--:|", *(f"| {name} | {number} |" for name, number in rows.items())),
        "",
        _measured_on(result),
        "",
    ]


def soak_table(result: dict[str, Any]) -> list[str]:
    """Start against end of each process, and of what its viewer sees of the sound camera."""
    (width, height), counts = result["size"], result["counts"]
    names = {"memory_mb": "memory, MiB", "threads": "threads", "open_files": "open files"}
    names |= {"median": "median, ms", "p99": "99th percentile, ms"}
    rows = []
    for process, figures in result["start"].items():
        of = "latency of the sound camera" if process == "latency_ms" else _PROCESSES.get(process, process)
        for figure, before in figures.items():
            (times, more), after = result["bounds"][figure], result["end"].get(process, {}).get(figure)
            shown = "gone" if after is None else f"{after:.0f}"
            rows.append(f"| {of}: {names[figure]} | {before:.0f} | {shown} | {before * times + more:.0f} |")
    disk = f" (but no full disk, since {result['small_disk']})" if result["small_disk"] else ""
    came, recorded, lost = (counts[f"veilcam_{name}_total"] for name in COUNTED)
    return [
        f"## {result['minutes']:g} minutes at speed, with much that is wrong",
        "",
        f"Three cameras of {width}×{height} at {result['frame_rate']} frames/s and a server that records them. Wrong "
        "on purpose: one camera's viewer is slow, one camera's source hangs again and again, and the recordings' disk "
        f"is always full{disk}. Medians of the first and of the last fifth of {len(result['samples'])} samples.",
        "",
        *("| | at the start | at the end | may be at most |", "|---|--:|--:|--:|", *rows),
        "",
        f"{came:.0f} frames came, {recorded:.0f} were recorded and {lost:.0f} not. "
        f"Grown or out of order: {'; '.join(result['problems']) or 'nothing'}. {_measured_on(result)}",
        "",
    ]


COUNTED = ("frames_received", "recorded_frames", "unrecorded_frames")
"""What a soak's frames came to, by the names of the service's metrics."""
_PROCESSES = {"sound": "sound camera", "slowly watched": "camera whose viewer is slow", "stuck": "camera that hangs"}
"""As readers know them."""


def network_table(result: dict[str, Any]) -> list[str]:
    """How each stream came back, and what its camera said."""
    lines = ["## Bad networks", ""]
    lines += [
        "A camera for each row, all at the same time, on a network of its own that is made bad and then good again. "
        "Median latency from capture to a viewer, and frames/s: before, meanwhile (– if nothing came), after.",
        "",
        "| what happened | frames flowed again after, s | as before after, s | latency, ms | frames/s |"
        " dropped at the camera | it said |",
        "|---|--:|--:|---|---|---|---|",
    ]
    for row in result["rows"]:
        latency, rate = (
            ", ".join(str(row[when].get(name, "–")) for when in ("before", "during", "after"))
            for name in ("latency_ms", "fps")
        )
        dropped = re.search(r"dropped here: ([^;]*)", row["summary"])
        said = "<br>".join(line.replace("|", "\\|") for line in row["said"])
        again = ("never" if row[name] is None else row[name] for name in ("flows_again_s", "as_before_s"))
        cells = [row["fault"], *again, latency, rate]
        lines.append("| " + " | ".join(map(str, [*cells, dropped[1] if dropped else "–", said or "nothing"])) + " |")
    left_out = "; ".join(f"{name} ({why})" for name, why in result["left_out"].items())
    before, after = (f"{each['memory_mb']} MiB and {each['threads']} threads" for each in result["server"])
    return [
        *lines,
        "",
        f"Not as it should be: {'; '.join(result['problems']) or 'nothing'}. The server held {before} before, {after} "
        f"after. {f'Left out: {left_out}. ' if left_out else ''}{_measured_on(result)}",
        "",
    ]


def fuzz_table(result: dict[str, Any]) -> list[str]:
    """Inputs and findings of each reader."""
    lines = ["## Any bytes", ""]
    lines += [
        "Inputs guided by coverage, for every reader of files and messages. A finding is whatever isn't the reader's "
        "own one-line error: another exception, a warning, an end of the process, too much time or memory.",
        "",
        *("| reader | inputs | findings | of them mended |", "|---|--:|--:|--:|"),
    ]
    found = {name: told["findings"] for name, told in result["targets"].items()}
    mended = {name: sum(finding["mended"] for finding in each) for name, each in found.items()}
    for name, told in result["targets"].items():
        lines.append(f"| {name} | {told['inputs']} | {len(found[name])} | {mended[name]} |")
    total = f"| all | {result['inputs']} | {sum(map(len, found.values()))} | {sum(mended.values())} |"
    return [*lines, total, "", _measured_on(result), ""]


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "film": film_table,
    "latency": latency_table,
    "engines": engine_tables,
    "serve": serve_table,
    "faults": faults_table,
    "kills": kills_table,
    "network": network_table,
    "soak": soak_table,
    "fuzz": fuzz_table,
}
"""Kind of a raw result → what is said of it."""


def _measured_on(result: dict[str, Any]) -> str:
    return f"Measured on {headline(result['machine'])}. [json](../{result['file']})"


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
