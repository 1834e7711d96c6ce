"""URLs: the form without a password, and the broker URL of a Redis URL."""

import re
from typing import Final
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from dispatcher.errors import ConfigurationError

_PLAIN_URL: Final = re.compile(
    r"(?P<scheme>[\w+.-]+)://(?:[^/?#\[\]]*@)?(?P<place>(?:\[[\w:.%]*\]|[^@/?#:\[\]]*)(?::\d*)?(?:/[^@?#]*)?)(?:[?#][^@]*)?"
)


def broker_url_from_redis(redis_url: str) -> str:
    """The Celery broker URL for a redis-py URL: the same server, user and database, as kombu writes them.

    `unix:///path?db=1` becomes `redis+socket:///path?virtual_host=1`. Only user, password, database and the `ssl_*`
    options of the query are kept, because kombu refuses the others.
    """
    parts = urlsplit(redis_url)
    options = dict(parse_qsl(parts.query))
    user = parts.netloc.rpartition("@")[0]
    if not user and "password" in options:
        user = f"{quote(options.get('username', ''), safe='')}:{quote(options['password'], safe='')}"
    server = (f"{user}@" if user else "") + parts.netloc.rpartition("@")[2]
    if parts.scheme == "unix":
        return f"redis+socket://{server}{quote(unquote(parts.path))}?virtual_host={options.get('db', '0')}"
    path = f"/{options['db']}" if "db" in options else parts.path
    ssl_options = urlencode({name: value for name, value in options.items() if name.startswith("ssl_")})
    return f"{parts.scheme}://{server}{path}" + (f"?{ssl_options}" if ssl_options else "")


def without_password(url: str) -> str:
    """`url` as it may be logged: without user information and query.

    Gives only the scheme if the URL has an unquoted special character (such as "/", "?" or "#" in a password), because
    parsers disagree about where the password of such a URL ends.
    """
    plain = _PLAIN_URL.fullmatch(url)
    if plain is None:
        return f"{url.partition('://')[0] if '://' in url else ''}://..."
    return f"{plain['scheme']}://{plain['place']}"


def require_plain(url: str, what: str) -> str:
    """`url`, if all parsers split it in the same way; else raises `ConfigurationError`, which does not show the URL.

    If a password has an unquoted "/", "?", "#", "[", "]" or ";", some parser takes a part of it as host, port or
    database, and shows it in errors and logs. ";" separates the URLs of several brokers.
    """
    if not all(_PLAIN_URL.fullmatch(part) for part in url.split(";")):
        raise ConfigurationError(f"the {what} URL cannot be parsed: quote special characters, as in %2F for a /")
    return url
