"""Settings from the environment, and URLs that must work and must not be shown."""

import re
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.utils.url import url_to_parts
from pydantic import ValidationError
from redis.connection import parse_url

from dispatcher.embedded.state import embedded_directory
from dispatcher.settings import Settings
from dispatcher.urls import broker_url_from_redis, without_password

DEFAULTS = {
    "config": None,
    "database_url": None,
    "redis_url": None,
    "broker_url": None,
    "prefix": "dispatcher",
    "sweep_seconds": 60,
    "relay_seconds": 10,
    "lock_seconds": 30,
    "callback_seconds": 60,
    "lease_seconds": 20,
    "last_look_seconds": 0,
    "queued_seconds": 60,
    "sweep_fanout": 0,
    "max_backlog": 100_000,
    "chains_per_task": 1,
    "deliveries_per_task": 1,
    "retention_days": None,
    "dry_run": False,
    "clock": None,
    "connect_seconds": 5,
}

OTHERS = {
    "config": ("shop.chains:CONFIG", "shop.chains:CONFIG"),
    "database_url": ("sqlite:///a.db", "sqlite:///a.db"),
    "redis_url": ("redis://h/1", "redis://h/1"),
    "broker_url": ("redis://h/2", "redis://h/2"),
    "prefix": ("shop.eu-1", "shop.eu-1"),
    "sweep_seconds": ("0.5", 0.5),
    "relay_seconds": ("2", 2),
    "lock_seconds": ("45", 45),
    "callback_seconds": ("120", 120),
    "lease_seconds": ("30", 30),
    "last_look_seconds": ("300", 300),
    "queued_seconds": ("5", 5),
    "sweep_fanout": ("500", 500),
    "max_backlog": ("10", 10),
    "chains_per_task": ("50", 50),
    "deliveries_per_task": ("10", 10),
    "retention_days": ("90", 90),
    "dry_run": ("true", True),
    "clock": ("shop.clock:now", "shop.clock:now"),
    "connect_seconds": ("1", 1),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No variable and no `.env` of the machine reaches a test."""
    for name in DEFAULTS:
        monkeypatch.delenv(f"DISPATCHER_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


class TestSources:
    def test_with_nothing_set_the_defaults_are_the_documented_ones(self):
        assert Settings().model_dump() == DEFAULTS

    @pytest.mark.parametrize("name", OTHERS)
    def test_every_setting_is_read_from_its_variable(self, monkeypatch, name):
        text, value = OTHERS[name]
        monkeypatch.setenv(f"DISPATCHER_{name.upper()}", text)
        assert Settings().model_dump() == {**DEFAULTS, name: value}

    def test_no_setting_is_without_a_test(self):
        assert set(Settings.model_fields) == set(DEFAULTS) == set(OTHERS)

    def test_the_env_file_of_the_current_directory_is_read(self):
        Path(".env").write_text("DISPATCHER_PREFIX=shop\nSOMETHING_ELSE=1\n")
        assert Settings().prefix == "shop"

    def test_the_environment_goes_before_the_env_file(self, monkeypatch):
        Path(".env").write_text("DISPATCHER_PREFIX=shop\n")
        monkeypatch.setenv("DISPATCHER_PREFIX", "market")
        assert Settings().prefix == "market"

    def test_an_argument_goes_before_the_environment(self, monkeypatch):
        monkeypatch.setenv("DISPATCHER_PREFIX", "market")
        assert Settings(prefix="mine").prefix == "mine"

    def test_settings_do_not_change(self):
        with pytest.raises(ValidationError):
            Settings().prefix = "other"

    def test_a_task_of_attempts_has_time_before_the_call_for_it_and_after_it(self):
        settings = Settings(callback_seconds=120, lock_seconds=50)
        assert settings.attempt_seconds == 50 + 120 + 30
        assert settings.execute_seconds == 40

    def test_a_process_renews_twice_before_a_lapsed_lease_is_settled(self):
        settings = Settings(lease_seconds=20)
        assert settings.lapse_seconds > 20 / 4 + 3

    @pytest.mark.parametrize("seconds", [1, 30, 3600])
    def test_an_execution_ends_before_its_lock_whatever_its_length(self, seconds):
        assert 0 < Settings(lock_seconds=seconds).execute_seconds < seconds

    def test_the_embedded_default_lives_below_the_current_directory(self, tmp_path):
        assert embedded_directory() == tmp_path / ".dispatcher"
        assert not embedded_directory().exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("database_url", "hunter2"),
            ("redis_url", "hunter2:6379"),
            ("broker_url", "hunter2"),
            ("prefix", "hunter2 hunter2"),
            ("prefix", "hunter2:"),
            ("prefix", "hunter2\n"),
            ("prefix", "hunter2" * 20),
            ("sweep_seconds", "0"),
            ("sweep_seconds", "hunter2"),
            ("sweep_seconds", "nan"),
            ("sweep_seconds", "inf"),
            ("relay_seconds", "-1"),
            ("lock_seconds", "0.5"),
            ("callback_seconds", "0"),
            ("lease_seconds", "1"),
            ("last_look_seconds", "-1"),
            ("last_look_seconds", "inf"),
            ("last_look_seconds", "nan"),
            ("queued_seconds", "0"),
            ("sweep_fanout", "-1"),
            ("sweep_fanout", "10001"),
            ("max_backlog", "0"),
            ("max_backlog", "1.5"),
            ("chains_per_task", "0"),
            ("chains_per_task", "1001"),
            ("deliveries_per_task", "0"),
            ("deliveries_per_task", "1001"),
            ("retention_days", "0"),
            ("retention_days", "inf"),
            ("retention_days", "1e9"),
            ("dry_run", "hunter2"),
            ("connect_seconds", "0"),
            ("connect_seconds", "10"),
        ],
    )
    def test_a_bad_value_is_refused_by_name_and_not_shown(self, monkeypatch, name, value):
        monkeypatch.setenv(f"DISPATCHER_{name.upper()}", value)
        with pytest.raises(ValueError, match=name) as caught:
            Settings()
        assert "hunter2" not in str(caught.value) + repr(caught.value)

    def test_a_good_secret_is_not_shown_beside_a_bad_value(self, monkeypatch):
        monkeypatch.setenv("DISPATCHER_DATABASE_URL", "postgresql://u:hunter2@h/db")
        monkeypatch.setenv("DISPATCHER_BROKER_URL", "nonsense")
        with pytest.raises(ValueError, match="broker_url is not a URL") as caught:
            Settings()
        assert "hunter2" not in str(caught.value) + repr(caught.value)

    def test_the_text_of_settings_shows_no_url(self):
        settings = Settings(
            database_url="postgresql://u:hunter2@dbhost/db",
            redis_url="redis://:hunter2@redishost/0",
            broker_url="amqp://u:hunter2@brokerhost/v",
        )
        for text in (repr(settings), str(settings), f"{settings}"):
            assert not re.search("hunter2|dbhost|redishost|brokerhost|://", text)


WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
PASSWORDS = WORDS | st.sampled_from(["p@ss", "a/b", "a:b", "100%", "a?b#c", "%2F", "a+b", "a b", "[x]", "ключ"])


def quoted(word):
    return quote(word, safe="")


class TestBrokerUrl:
    @pytest.mark.parametrize(
        "url",
        [
            "redis://localhost",
            "redis://localhost:6379/0",
            "redis://:p%40ss%2Fword@host:6380/2",
            "rediss://user:p%3Aw@host:6380/2",
            "rediss://host:6380/2?ssl_cert_reqs=required",
            "redis://[::1]:6379/0",
        ],
    )
    def test_a_tcp_url_stays_as_it_is(self, url):
        assert broker_url_from_redis(url) == url

    @pytest.mark.parametrize(
        ("redis_url", "broker_url"),
        [
            ("unix:///run/v.sock", "redis+socket:///run/v.sock?virtual_host=0"),
            ("unix:///run/v.sock?db=3", "redis+socket:///run/v.sock?virtual_host=3"),
            ("unix:///run/v.sock?&db=3&x", "redis+socket:///run/v.sock?virtual_host=3"),
            ("unix://:p%40s%2Fs@/run/v.sock", "redis+socket://:p%40s%2Fs@/run/v.sock?virtual_host=0"),
            ("unix://me:pw@/run/v.sock?db=1", "redis+socket://me:pw@/run/v.sock?virtual_host=1"),
            ("unix:///run/v.sock?password=a%26b", "redis+socket://:a%26b@/run/v.sock?virtual_host=0"),
            ("unix:///run/v.sock?username=me&password=a%2Fb", "redis+socket://me:a%2Fb@/run/v.sock?virtual_host=0"),
            ("unix:///run/my%20dir/v.sock", "redis+socket:///run/my%20dir/v.sock?virtual_host=0"),
            ("unix:///run/my dir/v.sock", "redis+socket:///run/my%20dir/v.sock?virtual_host=0"),
        ],
    )
    def test_a_socket_url_is_written_as_kombu_wants_it(self, redis_url, broker_url):
        assert broker_url_from_redis(redis_url) == broker_url

    @pytest.mark.parametrize(
        ("redis_url", "broker_url"),
        [
            ("redis://h?db=3", "redis://h/3"),
            ("redis://h:1/?db=3&socket_timeout=2", "redis://h:1/3"),
            ("redis://h:1/2?password=a%26b", "redis://:a%26b@h:1/2"),
            ("rediss://h:1/2?health_check_interval=5&ssl_cert_reqs=none", "rediss://h:1/2?ssl_cert_reqs=none"),
            ("rediss://h/2?ssl_ca_certs=%2Fetc%2Fca.pem", "rediss://h/2?ssl_ca_certs=%2Fetc%2Fca.pem"),
        ],
    )
    def test_options_that_kombu_would_refuse_are_translated_or_left_out(self, redis_url, broker_url):
        assert broker_url_from_redis(redis_url) == broker_url

    @given(user=st.just("") | WORDS, password=PASSWORDS, path=WORDS, db=st.integers(min_value=0, max_value=15))
    @example(user="me", password="a/b@c:d%25", path="dir with/%20.sock", db=1)
    def test_redis_and_kombu_read_the_same_socket_user_password_and_database(self, user, password, path, db):
        url = f"unix://{quoted(user)}:{quoted(password)}@/run/{quote(path)}?db={db}"
        ours, theirs = parse_url(url), url_to_parts(broker_url_from_redis(url).removeprefix("redis+"))
        assert theirs.scheme == "socket"
        assert theirs.username == ours.get("username")
        assert theirs.password == ours["password"] == password
        assert f"/{theirs.path}" == ours["path"] == f"/run/{path}"
        assert int(theirs.query["virtual_host"]) == ours["db"] == db

    @given(user=st.just("") | WORDS, password=PASSWORDS, db=st.integers(min_value=0, max_value=15))
    def test_redis_and_kombu_read_the_same_tcp_url(self, user, password, db):
        url = f"rediss://{quoted(user)}:{quoted(password)}@host:6380?db={db}"
        theirs = url_to_parts(broker_url_from_redis(url))
        assert (theirs.scheme, theirs.hostname, theirs.port) == ("rediss", "host", 6380)
        assert (theirs.username or "", theirs.password, theirs.path) == (user, password, str(db))


class TestWithoutPassword:
    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://localhost:6379/0", "redis://localhost:6379/0"),
            ("redis://:hunter2@localhost:6379/0", "redis://localhost:6379/0"),
            ("rediss://user:hunter2@host/1?ssl_cert_reqs=none", "rediss://host/1"),
            ("redis://host/1?password=hunter2", "redis://host/1"),
            ("redis://:p@hunter2@host/0", "redis://host/0"),
            ("postgresql+psycopg://user:hunter2@host:5432/db", "postgresql+psycopg://host:5432/db"),
            ("postgresql://user:hunter2@[::1]:5432/db", "postgresql://[::1]:5432/db"),
            ("unix://:hunter2@/run/v.sock?db=1", "unix:///run/v.sock"),
            ("redis+socket://:hunter2@/run/v.sock?virtual_host=1", "redis+socket:///run/v.sock"),
            ("sqlite:////srv/app/chains.db", "sqlite:////srv/app/chains.db"),
            ("redis://h#hunter2", "redis://h"),
            ("memory://", "memory://"),
            ("", "://..."),
        ],
    )
    def test_the_place_is_shown_without_user_and_query(self, url, shown):
        assert without_password(url) == shown

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://:hunter2/hunter2@host:6379/0", "redis://..."),
            ("redis://:hunter2#hunter2@host:6379/0", "redis://..."),
            ("redis://:hunter2?hunter2@host:6379/0", "redis://..."),
            ("redis://:hunter2", "redis://..."),
            ("postgresql://u:hunter2@host:hunter2/db", "postgresql://..."),
            ("redis://host/0?password=x@hunter2", "redis://..."),
            ("sentinel://:hunter2@a:26379;sentinel://:hunter2@b:26379", "sentinel://..."),
            ("hunter2", "://..."),
        ],
    )
    def test_of_a_url_that_may_hide_a_secret_anywhere_only_the_scheme_is_shown(self, url, shown):
        assert without_password(url) == shown

    @given(user=st.text(max_size=8), password=st.text(max_size=20), path=st.sampled_from(["", "/0", "/db?x=1"]))
    @example(user="", password="a/b", path="/0")
    def test_no_part_of_a_password_is_ever_shown_quoted_or_not(self, user, password, path):
        secret = f"hunter2{password}hunter2"
        for written in (secret, quoted(secret)):
            shown = without_password(f"redis://{user}:{written}@host:6379{path}")
            assert "hunter2" not in unquote(shown)

    @given(st.text(max_size=40))
    def test_it_never_fails_whatever_it_is_given(self, text):
        assert without_password(text)


def test_the_example_of_an_env_file_names_every_setting():
    text = (Path(__file__).parents[2] / ".env.example").read_text()
    named = set(re.findall(r"\bDISPATCHER_([A-Z_]+)\b", text))
    assert named == {name.upper() for name in Settings.model_fields}
