"""The file of users, and the commands that write it."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from decoder.access import AccessError
from decoder.access.keys import init
from decoder.access.people import People, Person, hash_password, hash_token, read_people, right_password, write_people
from decoder.access.roles import Role
from decoder.access.tls import Certificates
from decoder.private import changed_by_one
from decoder.settings import Settings
from protos.rules import CAMERA_NAME
from tests.conftest import StartService
from tests.decoder.guarded import PASSWORD, PEOPLE, Keys
from tests.waiting import wait_for


def users(file: Path, *arguments: str, given: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "decoder", "users", *arguments, "--users", str(file)]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)


def test_the_commands_write_what_the_service_reads(tmp_path: Path) -> None:
    file = tmp_path / "users.toml"
    done = users(file, "add", "anna", "--role", "viewer", "--camera", "porch", "--camera", "b.2", given=PASSWORD + "\n")
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    anna = read_people(file)["anna"]
    assert (anna.role, set(anna.cameras), dict(anna.tokens)) == (Role.VIEWER, {"porch", "b.2"}, {})
    assert PASSWORD not in file.read_text()
    token = users(file, "token", "anna", "--label", "phone").stdout.strip()
    assert re.fullmatch(r"vc_[\w-]{43}", token)
    assert token not in file.read_text()
    assert read_people(file)["anna"].tokens == {"phone": hash_token(token)}
    assert users(file, "add", "anna", "--role", "trusted", "--camera", "*").returncode == 0, (
        "no password is asked again"
    )
    changed = read_people(file)["anna"]
    assert (changed.role, changed.seen, changed.password) == (Role.TRUSTED, None, anna.password)
    assert users(file, "password", "anna", given="another password\n").returncode == 0
    assert read_people(file)["anna"].password != anna.password
    assert users(file, "add", "prometheus", "--role", "admin", "--no-password").returncode == 0
    told = users(file, "list").stdout
    assert told.splitlines() == [
        "anna: trusted; cameras *; password, token 'phone'",
        "prometheus: admin; cameras *; no password, no token",
    ]
    assert users(file, "token", "anna", "--label", "phone", "--revoke").returncode == 0
    assert users(file, "remove", "prometheus").returncode == 0
    assert list(read_people(file)) == ["anna"]
    assert read_people(file)["anna"].tokens == {}


def test_a_password_can_be_taken_away(tmp_path: Path) -> None:
    """Of someone who has tokens, and keeps them."""
    file = tmp_path / "users.toml"
    person = Person("nvr", Role.ADMIN, password=hash_password(PASSWORD), tokens={"phone": hash_token("vc_nvr")})
    write_people(file, {"nvr": person})
    assert users(file, "add", "nvr", "--role", "admin", "--no-password").returncode == 0
    read = read_people(file)["nvr"]
    assert not right_password(read, PASSWORD)
    assert read == replace(person, password=None)


@given(label=st.text(), camera=st.text(), name=st.from_regex(CAMERA_NAME, fullmatch=True))
@example(label='my "old" phone\\', camera="\x7f\x00\r\n", name="a.b")
@example(label="\N{MOBILE PHONE}", camera="\x85\u2028", name="a")
def test_what_is_written_reads_back_the_same(
    label: str, camera: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also what someone wrote by hand: a command that changes another line writes it again."""
    file = tmp_path_factory.mktemp("written") / "users.toml"
    person = Person(name, Role.VIEWER, frozenset({camera}), "$argon2id$" + label, {label: hash_token(label)})
    write_people(file, {name: person})
    assert read_people(file) == {name: person}


@pytest.fixture
def as_service() -> Callable[[], AbstractContextManager[None]]:
    """Be the user of a service, who isn't root."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")

    @contextmanager
    def being() -> Iterator[None]:
        os.seteuid(SERVICE)
        try:
            yield
        finally:
            os.seteuid(0)

    return being


SERVICE = 65534


def test_what_root_changes_the_services_user_can_still_read(
    as_service: Callable[[], AbstractContextManager[None]],
) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own are root's alone
    try:
        os.chown(folder, SERVICE, SERVICE)
        file = folder / "users.toml"
        write_people(file, PEOPLE)
        init(folder / "keys", cameras=["porch"])
        for path in (file, folder / "keys", *(folder / "keys").rglob("*")):
            os.chown(path, SERVICE, SERVICE)
        (folder / "keys" / "server.pem").chmod(0o640)
        with as_service():
            people, certificates = People(file), Certificates(Keys(folder / "keys").settings())
            before = certificates.look().certificate
        assert users(file, "remove", "vera").returncode == 0
        command = [sys.executable, "-m", "decoder", "keys", "renew", str(folder / "keys")]
        assert subprocess.run(command, timeout=60).returncode == 0
        for path, mode in ((file, 0o600), (folder / "keys" / "server.pem", 0o640)):
            told = path.stat()
            assert (told.st_uid, told.st_gid, told.st_mode & 0o777) == (SERVICE, SERVICE, mode)
        with as_service():
            assert people.get("vera") is None
            assert people.get("tom") is not None
            assert certificates.look().certificate != before
    finally:
        shutil.rmtree(folder)


def test_who_may_not_give_a_file_to_its_owner_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "users.toml"
    write_people(file, PEOPLE)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("decoder.private.os.fchown", refused)
    owned, real = file.stat(), Path.stat
    others = os.stat_result((*owned[:4], owned.st_uid + 1, *owned[5:]))
    monkeypatch.setattr(Path, "stat", lambda path, **how: others if path == file else real(path, **how))
    with pytest.raises(
        AccessError, match=r"users\.toml: can't be written \(it belongs to user \d+, group \d+: do this as"
    ):
        write_people(file, {})
    monkeypatch.undo()
    assert set(read_people(file)) == set(PEOPLE)
    assert list(tmp_path.iterdir()) == [file], "nothing is left behind"


def waits_for_a_lock(pid: int) -> bool:
    waiting = (line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line)
    return str(pid) in (words[5] for words in waiting)


def test_commands_that_run_at_one_time_lose_nothing_of_each_other(tmp_path: Path) -> None:
    """One waits while another has read the file and hasn't written it yet."""
    file = tmp_path / "users.toml"
    write_people(file, PEOPLE)
    command = [sys.executable, "-m", "decoder", "users", "remove", "vera", "--users", str(file)]
    with changed_by_one(tmp_path):
        people = read_people(file)
        removing = subprocess.Popen(command)
        wait_for(lambda: waits_for_a_lock(removing.pid), "the second command, which waits for the first")
        write_people(file, {name: each for name, each in people.items() if name != "tom"})
    assert removing.wait(60) == 0
    assert set(read_people(file)) == {"ada", "nvr"}


@pytest.mark.parametrize(
    ("arguments", "given", "told"),
    [
        (("add", "x", "--role", "king"), "", "--role 'king': expected one of viewer, trusted, admin"),
        (("add", "x", "--role", "camera"), "", "veilcam-decode keys camera"),
        (("add", "a b", "--role", "admin"), "", "NAME 'a b'"),
        (("add", "x", "--role", "viewer"), "", "--camera: a viewer sees those cameras that are given"),
        (("add", "x", "--role", "viewer", "--camera", 'a"b'), "", "--camera 'a\"b'"),
        (("add", "x", "--role", "admin"), "short\n", "password: expected 10 to 512 characters"),
        (("token", "x"), "", "can't be read"),
        (("remove", "x"), "", "veilcam-decode users add makes it"),
    ],
)
def test_what_the_commands_can_not_do(tmp_path: Path, arguments: tuple[str, ...], given: str, told: str) -> None:
    done = users(tmp_path / "users.toml", *arguments, given=given)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert told in done.stderr
    assert not (tmp_path / "users.toml").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("users = 3", "users: "),
        ('[users.x]\nrole = "camera"', "users.x.role"),
        ('[users.x]\nrole = "viewer"\npassword = "plain text"', "users.x.password"),
        ('[users.x]\nrole = "viewer"\nroll = 1', "users.x.roll"),
        ('[users."a b"]\nrole = "viewer"', "users.a b"),
        ("[users", "not TOML"),
    ],
)
def test_a_file_of_users_that_can_not_be(start_service: StartService, tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "users.toml"
    file.write_text(text)
    with pytest.raises(AccessError, match="others may read"):
        start_service(Settings(port=0, http=0, users=file))
    file.chmod(0o600)
    with pytest.raises(AccessError) as error:
        start_service(Settings(port=0, http=0, users=file))
    assert str(file) in str(error.value)
    assert told in str(error.value)
    assert "plain text" not in str(error.value), "what may be a secret isn't told"
