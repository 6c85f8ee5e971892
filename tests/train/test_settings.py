from pathlib import Path

import pytest

from train.settings import PlainRun, SettingsError, StepsRun, VeilRun, read_run

RUNS = Path(__file__).parent.parent.parent / "train" / "runs"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["plain-r10", "plain-r25", "veil-r10"])
def test_the_run_files_that_ship_are_sound(name: str) -> None:
    run = read_run(RUNS / f"{name}.toml")
    assert isinstance(run, PlainRun | VeilRun)
    assert not run.extends or (RUNS / f"{run.extends}.toml").exists()


def test_keys_and_defaults(tmp_path: Path) -> None:
    run = read_run(written(tmp_path, 'kind = "plain"\nratio = 0.25\nlearning_rate = 1\nextends = "other"'))
    assert run == PlainRun(ratio=0.25, learning_rate=1.0, extends="other")
    veil = read_run(written(tmp_path, 'kind = "veil"\nextends = "other"\nreaders = ["mobilenet_v2"]'))
    assert veil == VeilRun(extends="other", readers=("mobilenet_v2",))
    steps = read_run(written(tmp_path, 'kind = "steps"\nthrough = ["median", "jpeg"]'))
    assert steps == StepsRun(through=("median", "jpeg"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "kind = None, expected one of plain, veil"),
        ('kind = "sharp"', "kind = 'sharp'"),
        ('kind = "plain"\nration = 0.1', "unknown key 'ration', a plain run has iterations, batch"),
        ('kind = "plain"\nratio = 1.5', r"ratio = 1\.5, expected 0\.004 to 1\.0"),
        ('kind = "plain"\nratio = "much"', "ratio = 'much', expected float"),
        ('kind = "plain"\nbatch = 2.5', r"batch = 2\.5, expected int"),
        ('kind = "plain"\nbatch = true', "batch = True, expected int"),
        ('kind = "veil"\nreaders = [1]', r"readers = \[1\], expected a list of str"),
        ('kind = "steps"\nthrough = []', r"through = \[\], expected a list of 'as is', 'jpeg', 'blur', 'median'"),
        (
            'kind = "steps"\nthrough = ["jpeg", "zoom"]',
            r"through = \['jpeg', 'zoom'\], expected a list of 'as is'",
        ),
        ("kind = ", "not a run file"),
    ],
)
def test_a_run_file_that_is_wrong_says_where(tmp_path: Path, text: str, problem: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingsError, match=problem) as error:
        read_run(path)
    assert str(path) in str(error.value)


def test_a_run_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such run file"):
        read_run(tmp_path / "absent.toml")
