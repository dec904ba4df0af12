"""Keys of patients, tokens, allowances: without a server."""

import hmac
import os
import stat
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.config import Settings
from dicomnode.errors import ConfigError
from dicomnode.model import PatientKey
from dicomnode.web import health, limits
from dicomnode.web.limits import Allowance
from dicomnode.web.part import Part
from dicomnode.web.patients import SECRET_BYTES, PatientKeys
from dicomnode.web.tokens import Holder, Role, Tokens, add

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=64)
KEYS = PatientKeys(bytes(range(SECRET_BYTES)))


@given(TEXT, TEXT)
def test_a_key_stands_for_one_patient_and_tells_nothing(patient_id, issuer):
    patient = PatientKey(patient_id, issuer)
    key = KEYS.key(patient)
    if not patient_id:
        assert key is None
        return
    assert KEYS.patient(key) == patient
    assert KEYS.key(patient) == key
    assert PatientKeys(bytes(SECRET_BYTES)).key(patient) != key
    assert PatientKeys(bytes(SECRET_BYTES)).patient(key) is None
    assert key.replace("-", "").replace("_", "").isalnum()


def test_parts_of_a_patient_do_not_run_together():
    assert KEYS.key(PatientKey("bc", "a")) != KEYS.key(PatientKey("c", "ab"))
    assert len(KEYS.key(PatientKey("1", "H"))) == len(KEYS.key(PatientKey("1234567890", "HOSP")))


@given(st.text(max_size=100))
def test_what_is_no_key_is_nobodys(text):
    assert KEYS.patient(text) is None


def test_a_key_that_was_altered_is_nobodys():
    key = KEYS.key(PatientKey("P1", "H"))
    for i in range(len(key)):
        other = "A" if key[i] != "A" else "B"
        altered = key[:i] + other + key[i + 1 :]
        # The last character holds bits that are in no byte.
        assert KEYS.patient(altered) is None or i == len(key) - 1


def test_of_many_that_make_the_secret_at_once_one_does(tmp_path):
    path = tmp_path / "folder" / "web.key"
    found, start = [], threading.Barrier(8)

    def make() -> None:
        start.wait()
        found.append(PatientKeys.of(path).key(PatientKey("P1")))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["web.key"]


@pytest.mark.parametrize("text", ["", "ab", "zz" * 64, "é", "00" * 63])
def test_a_secret_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "web.key"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"web\.key_file.*openssl rand"):
        PatientKeys.of(path)


def test_a_token_is_known_until_its_line_is_gone(tmp_path):
    path = tmp_path / "tokens"
    ada, bob = add(path, Holder("ada", Role.ADMIN)), add(path, Holder("bob", Role.READ))
    tokens = Tokens(path, look_s=0.0)
    assert tokens.holder(ada) == Holder("ada", Role.ADMIN)
    assert tokens.holder(bob) == Holder("bob", Role.READ)
    assert tokens.holder(ada + "x") is None and tokens.holder("") is None
    kept = [line for line in path.read_text().splitlines() if "bob" in line]
    path.write_text("\n".join(["# who reads", "", *kept]))  # and no line end
    assert tokens.holder(ada) is None and tokens.holder(bob) is not None
    new = add(path, Holder("eve", Role.READ))
    assert tokens.holder(bob) and tokens.holder(new)


@pytest.mark.parametrize(
    "break_it", [os.remove, lambda p: p.chmod(0o666), lambda p: p.write_text("x")]
)
def test_a_file_that_went_bad_lets_nobody_in(tmp_path, break_it):
    path = tmp_path / "tokens"
    token = add(path, Holder("ada", Role.ADMIN))
    tokens = Tokens(path, look_s=0.0)
    assert tokens.holder(token)
    break_it(path)
    assert tokens.holder(token) is None


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\n", "é"])
def test_a_name_that_would_break_the_file_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="a name has"):
        add(tmp_path / "tokens", Holder(name, Role.READ))


def test_a_role_may_do_what_a_lesser_one_may():
    assert Role.ADMIN.includes(Role.READ) and Role.ADMIN.includes(Role.ADMIN)
    assert Role.READ.includes(Role.READ) and not Role.READ.includes(Role.ADMIN)


def test_an_allowance_is_used_up_and_comes_back(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    allowance = Allowance(3, 10.0)
    assert [allowance.take("a") for _ in range(5)] == [True] * 3 + [False] * 2
    assert allowance.take("b")
    now[0] += 9
    assert not allowance.take("a")
    now[0] += 2
    assert allowance.take("a") and not allowance.take("a")
    now[0] += 1000
    assert [allowance.take("a") for _ in range(5)] == [True] * 3 + [False] * 2


def test_an_allowance_forgets_those_not_heard_of_for_longest():
    allowance = Allowance(1, 3600.0, keys=2)
    assert allowance.take("a") and allowance.take("b")
    assert not allowance.take("a")  # which was heard of last now
    assert allowance.take("c")  # in the place of b
    assert not allowance.take("a") and allowance.take("b")


def test_a_wrong_token_takes_as_long_as_a_right_one_to_tell(tmp_path, monkeypatch):
    """Every digest is compared, wherever the right one stands."""
    path = tmp_path / "tokens"
    found = [add(path, Holder(f"n{k}", Role.READ)) for k in range(50)]
    tokens = Tokens(path)
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for token in (found[0], found[-1], "wrong"):
        compared.clear()
        tokens.holder(token)
        assert len(compared) == 50


def test_a_database_that_hangs_does_not_hold_those_who_ask_whether_it_is_there(
    monkeypatch, tmp_path
):
    asked, go_on = threading.Event(), threading.Event()

    def hangs(part: object) -> bool:
        asked.set()
        assert go_on.wait(20)
        return True

    monkeypatch.setattr(health, "_database", hangs)
    now = [100.0]
    monkeypatch.setattr(health.time, "monotonic", lambda: now[0])
    part = Part(Settings(spool={"path": tmp_path}), *[None] * 5)  # type: ignore[arg-type]  # unused
    checks = health.Checks()
    first = threading.Thread(target=checks.of, args=(part,))
    first.start()
    assert asked.wait(20)
    assert not checks.of(part).ready and checks.of(part).checks == {"database": False}
    go_on.set()
    first.join()
    assert checks.of(part).checks["database"] is True
    go_on.clear()
    asked.clear()
    now[0] += health.FRESH_S + 0.1
    second = threading.Thread(target=checks.of, args=(part,))
    second.start()
    assert asked.wait(20)
    assert checks.of(part).checks["database"] is True  # what was found last
    now[0] += health.STALE_S
    assert checks.of(part).checks["database"] is False
    go_on.set()
    second.join()
