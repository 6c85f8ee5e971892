from pathlib import Path

import pytest

from train.settings import PlainRun, SettingsError, StepsRun, VeilRun, read_run

RUNS = Path(__file__).parent.parent.parent / "train" / "runs"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_run_files_that_ship_are_sound(path: Path) -> None:
    run = read_run(path)
    assert isinstance(run, PlainRun | VeilRun)
    assert not run.extends or (RUNS / f"{run.extends}.toml").exists()


def test_keys_and_defaults(tmp_path: Path) -> None:
    run = read_run(written(tmp_path, 'kind = "plain"\nratio = 0.25\nlearning_rate = 1\nextends = "other"'))
    assert run == PlainRun(ratio=0.25, learning_rate=1.0, extends="other")
    veil = read_run(written(tmp_path, 'kind = "veil"\nextends = "other"\nreaders = ["mobilenet_v2"]'))
    assert veil == VeilRun(extends="other", readers=("mobilenet_v2",))
    steps = read_run(written(tmp_path, 'kind = "steps"\nsurrogates = ["it"]\nthrough = ["median", "jpeg"]'))
    assert steps == StepsRun(surrogates=("it",), through=("median", "jpeg"))


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
        ('kind = "plain"\nblock = 10', "block = 10, expected a multiple of 4"),
        ('kind = "plain"\nblock = 20', "crop = 96, expected a multiple of block, 20"),
        ('kind = "veil"\nreaders = []', "readers: none, expected at least one"),
        ('kind = "ensemble"\nextends = "csnet"', "surrogates: none, expected at least one"),
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
