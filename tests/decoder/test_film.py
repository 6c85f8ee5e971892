"""Films of recordings: every picture at its time, and what a stop or a kill leaves."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.fidelity import psnr
from decoder.catalogue import Catalogue
from decoder.recordings.film import Film, free_part, write_film
from decoder.recordings.playback import Place, Recording, RecordingError, Shot, find, segments_of
from encoder.packing import Packer
from encoder.sampling import Operator
from protos.segment import SegmentWriter
from tests.conftest import frame_of, hello_of
from tests.protos.segments import frames, written
from tests.waiting import wait_for


def told(*arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "decoder", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_a_film_has_every_picture_at_its_time(recorded: Path, tmp_path: Path, catalogue: Catalogue) -> None:
    code, output = told("export", recorded, tmp_path / "film.mp4", "--from", "1970-01-01T00:00:02")
    assert code == 0, output
    assert "7 veiled pictures" in output
    with av.open(str(tmp_path / "film.mp4")) as container:
        (stream,) = container.streams.video
        assert stream.codec_context.name == "h264"
        film = [(float(frame.time or 0), frame.to_ndarray(format="gray")) for frame in container.decode(stream)]
    assert [time for time, _ in film] == pytest.approx(range(7), abs=0.01)
    shots = list(Recording(segments_of(recorded), catalogue, "veiled").shots(2_000_000_000))
    assert all(psnr(np.asarray(seen, np.uint8), shot.pixels) > 33 for (_, seen), shot in zip(film, shots, strict=True))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere.vcseg", "film.mp4"], "nowhere.vcseg: No such file"),
        (["RECORDED", "film.avi"], "film.avi: expected a name that ends in .mp4"),
        (["RECORDED", "film.mp4", "--from", "1980-01-01"], "there are some from 1970-01-01T00:00:0"),
        (["RECORDED", "film.mp4", "--from", "1970-01-02", "--to", "1970-01-01"], "expected a time after --from"),
        (["RECORDED", "film.mp4", "--go-on", "1:x"], "--go-on '1:x', expected SEGMENT:SEQUENCE"),
        (["RECORDED", "nowhere/film.mp4"], "nowhere is no folder"),
        (["RECORDED", "THERE"], "is there already: another name, or --overwrite"),
        (["EMPTY", "film.mp4"], "no segments (*.vcseg) there"),
        (["RECORDED", "film.mp4", "--reconstructor", "EMPTY"], "no reconstructor (*.onnx) there"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(
    arguments: list[str], problem: str, recorded: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    there = tmp_path / "empty" / "there.mp4"
    there.write_bytes(b"another film")
    places = {"RECORDED": recorded, "EMPTY": tmp_path / "empty", "film.mp4": tmp_path / "film.mp4", "THERE": there}
    code, output = told("export", *(places.get(argument, argument) for argument in arguments))
    assert code == 2
    lines = [line for line in output.splitlines() if "ERROR" in line]
    assert len(lines) == 1
    assert problem in lines[0]
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert there.read_bytes() == b"another film"
    assert " ms" not in output, "no engine was measured"


@pytest.mark.parametrize("begin", ["1970-01-01T00:00:02Z", "1970-01-01T01:00:02+01:00", "1970-01-01 00:00:02.000"])
def test_times_are_as_iso_8601_has_them(begin: str, recorded: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(b"of before")
    code, output = told("export", recorded, film, "--from", begin, "--overwrite", "--engine", "onnxruntime")
    assert code == 0, output
    assert "7 veiled pictures" in output
    assert film.stat().st_size > 1000


def test_a_film_takes_the_segments_of_its_range_alone_and_looks_at_them_once(recorded: Path, tmp_path: Path) -> None:
    """One that a kill left empty is told once; one of an operator that isn't known here is in nobody's way."""
    folder = shutil.copytree(recorded, tmp_path / "camera")
    (folder / f"{0:020d}.vcseg").touch()
    written(folder / f"{1000:020d}.vcseg", frames(2))
    arguments = ["export", folder, tmp_path / "film.mp4", "--engine", "onnxruntime"]
    code, output = told(*arguments, "--from", "1970-01-01T00:00:01")
    assert code == 0, output
    assert "8 veiled pictures" in output
    assert output.count("left out") == 1
    code, output = told(*arguments, "--overwrite")
    assert code == 2
    assert "00001000.vcseg: no veiled reconstructor for operator 0000000000000000 here" in output


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, operator: Operator, photographs: list[NDArray[np.uint8]]) -> Path:
    """A hundred and twenty pictures, 30 a second, in a folder whose name a shell would take apart."""
    packer = Packer(operator, 0.1)
    path = tmp_path_factory.mktemp("it's long") / "1.vcseg"
    writer = SegmentWriter(path, hello_of(operator, photographs[0]))
    for number in range(120):
        time_ns = 10**9 + number * 33_333_333
        writer.append(packer.pack(frame_of(photographs[number // 15], time_ns), number + 1)[0], time_ns)
    writer.close()
    return path


def started(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "decoder", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pictures(film: Path) -> list[tuple[int, NDArray[np.uint8]]]:
    """Of a film: milliseconds since its first one, and pixels."""
    with av.open(str(film)) as container:
        frames = list(container.decode(video=0))
    return [
        (round(float(each.time or 0) * 1000), np.asarray(each.to_ndarray(format="gray"), np.uint8)) for each in frames
    ]


def midway(folder: Path) -> None:
    """Return while a film is being written into a folder."""
    wait_for(lambda: list(folder.glob("*.partial")), "the beginning of a film")


def test_a_film_that_is_stopped_again_from_its_beginning_is_another_part(long: Path, tmp_path: Path) -> None:
    written = b""
    for count in (1, 2):
        with started("export", long, tmp_path / "film.mp4", "--engine", "onnxruntime", "--threads", "1") as process:
            midway(tmp_path)
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            output = process.stderr.read()
        assert f"film.part{count}.mp4: " in output
        assert f"film.part{count + 1}.mp4 --go-on" in output
        written = written or (tmp_path / "film.part1.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.part1.mp4", "film.part2.mp4"]
    assert (tmp_path / "film.part1.mp4").read_bytes() == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_film_that_is_stopped_goes_on_with_the_command_that_is_told(
    number: signal.Signals, long: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    """Stopped twice: the three parts have every picture once, at its time, and no film is there that isn't whole."""
    options = ["--to", "1970-01-01T00:00:03.500000", "--engine", "onnxruntime", "--threads", "1"]
    arguments = ["export", str(long), str(tmp_path / "my film.mp4"), *options]
    parts = [tmp_path / f"my film.part{part}.mp4" for part in (1, 2, 3)]
    for count in (1, 2):
        with started(*arguments) as process:
            midway(tmp_path)
            process.send_signal(number)
            assert process.stderr is not None
            output = process.stderr.read()
        assert process.returncode == 1, output
        assert sorted(tmp_path.iterdir()) == parts[:count]
        (line,) = [line for line in output.splitlines() if "ERROR" in line]
        name, *arguments = shlex.split(line.partition("to go on: ")[2])
        assert (name, arguments[:4]) == ("veilcam-decode", ["export", str(long), str(parts[count]), "--go-on"])
        assert arguments[5:] == options
    code, output = told(*arguments)
    assert code == 0, output
    assert sorted(tmp_path.iterdir()) == parts
    films = [pictures(part) for part in parts]
    shots = list(Recording(segments_of(long), catalogue, "veiled").shots(0, 3_500_000_000))
    assert sum(map(len, films)) == len(shots) == 76
    rest = iter(shots)
    for film in films:
        of_film = [next(rest) for _ in film]
        for (time_ms, seen), shot in zip(film, of_film, strict=True):
            since_ns = shot.capture_time_ns - of_film[0].capture_time_ns
            assert time_ms == pytest.approx(since_ns / 1e6, abs=1.1)
            assert psnr(seen, shot.pixels) > 33


def test_a_film_whose_writing_was_killed_is_not_there_and_can_be_written_again(long: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    arguments = ("export", long, film, "--engine", "onnxruntime", "--to", "1970-01-01T00:00:03")
    with started(*arguments) as process:
        midway(tmp_path)
        process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4.partial"]
    code, output = told(*arguments)
    assert code == 0, output
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    assert len(pictures(film)) == 61


def test_a_film_that_is_interrupted_twice_leaves_nothing(long: Path, tmp_path: Path) -> None:
    with started("export", long, tmp_path / "film.mp4", "--engine", "onnxruntime") as process:
        midway(tmp_path)
        assert process.stderr is not None
        while list(tmp_path.glob("*.partial")):
            process.send_signal(signal.SIGINT)
            time.sleep(0.005)
        output = process.stderr.read()
    assert process.returncode == 1
    assert "interrupted; nothing was written" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "there", "expected"),
    [
        ("a.mp4", [], "a.part1.mp4"),
        ("a.mp4", ["a.mp4", "a.part1.mp4", "a.part2.mp4", "a.part4.mp4"], "a.part3.mp4"),
        ("a.part2.mp4", [], "a.part2.mp4"),
        ("a.part9.mp4", ["a.part9.mp4"], "a.part10.mp4"),
        (".part1.mp4", [".part1.part1.mp4"], ".part1.part2.mp4"),
    ],
)
def test_parts_are_counted_and_none_is_written_over(name: str, there: list[str], expected: str, tmp_path: Path) -> None:
    for each in there:
        (tmp_path / each).touch()
    assert free_part(tmp_path / name) == tmp_path / expected


def test_a_camera_that_changes_its_size_is_told_with_the_time_to_part_the_film_at(tmp_path: Path) -> None:
    shots = [
        Shot(1_000_000_000, np.zeros((32, 48), np.uint8)),
        Shot(61_500_000_999, np.zeros((48, 32), np.uint8)),
    ]
    when = "1970-01-01T00:01:01.500000"
    with pytest.raises(
        RecordingError, match=f"from 48×32 to 32×48 at {when}; export a film --to {when}, and one --from"
    ):
        write_film(shots, tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file or directory"):
        write_film(shots[:1], tmp_path / "nowhere" / "film.mp4")


@pytest.fixture(scope="module")
def set_back(
    tmp_path_factory: pytest.TempPathFactory, operator: Operator, photographs: list[NDArray[np.uint8]]
) -> Path:
    """Seven seconds, whose last pictures fall a little, and then the clock is set back by four."""
    folder, packer = tmp_path_factory.mktemp("camera"), Packer(operator, 0.1)
    sequence = 0
    for seconds in ((0, 1, 2, 3, 4, 5, 4.5, 5.5, 7), (3, 4, 5, 6, 8)):
        times_ns = [10**12 + int(each * 10**9) for each in seconds]
        writer = SegmentWriter(folder / f"{times_ns[0]:020d}.vcseg", hello_of(operator, photographs[0]))
        for number, time_ns in enumerate(times_ns):
            sequence += 1
            frame = packer.pack(frame_of(photographs[number % 2], sequence), sequence, key=number in (0, 5))[0]
            frame.capture_time_ns = time_ns
            writer.append(frame, 1)
        writer.close()
    return folder


def stopped(played: Recording, path: Path, count: int) -> Film:
    """A film that is stopped after so many pictures."""
    done = list[None]()
    return write_film(played.shots(), path, lambda: done.append(None), lambda: len(done) == count)


def test_wherever_a_film_is_stopped_and_goes_on_every_picture_is_there_once(
    set_back: Path, tmp_path: Path, catalogue: Catalogue
) -> None:
    played = Recording(segments_of(set_back), catalogue, "veiled")
    whole = [shot.place for shot in played.shots()]
    assert len(set(whole)) == 14
    for count in range(1, 14):
        part = stopped(played, tmp_path / "film.mp4", count)
        assert part.pictures == count
        assert part.rest is not None
        assert Place.read(str(part.rest)) == part.rest
        assert [shot.place for shot in played.shots(begin=part.rest)] == whole[count:]
        assert len(find(set_back, begin=part.rest)[1]) == 14 - count
    code, output = told("export", set_back, tmp_path / "rest.mp4", "--go-on", str(whole[5]), "--engine", "onnxruntime")
    assert code == 0, output
    assert "9 veiled pictures" in output


def test_a_film_up_to_a_time_and_one_from_then_on_have_every_picture_once(set_back: Path, catalogue: Catalogue) -> None:
    played = Recording(segments_of(set_back), catalogue, "veiled")
    whole = [shot.place for shot in played.shots()]
    for time_ns in find(set_back)[1]:
        before, after = list(played.shots(0, time_ns)), list(played.shots(time_ns))
        assert sorted(shot.place for shot in before + after) == whole
        assert all(shot.capture_time_ns < time_ns for shot in before)
        assert all(shot.capture_time_ns >= time_ns for shot in after)
