"""The settings, database and audit log that a command works with."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicomnode import config as configuration
from dicomnode.audit import Act, AuditLog, user
from dicomnode.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import Engine


DEFAULT_CONFIG = Path("node.toml")


def config_path(path: Path | None) -> Path | None:
    """Return the settings file that is meant: node.toml of this folder where none is named."""
    return path or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)


def opened(config: Path | None, *, checked: bool = True) -> "AbstractContextManager[Engine]":
    """Return the database of the settings, opened; `checked`: of this version's schema alone."""
    from dicomnode import store

    settings = configuration.load(config_path(config))
    return store.opened(settings.database.url, checked=checked)


def write_audit(config: Path | None, act: Act, **data: Any) -> None:
    """Write a line about this user to the audit log."""
    log_ = AuditLog(configuration.load(config_path(config)).audit_log)
    log_.write(act, user=user(), **data)
    log_.close()


@contextlib.contextmanager
def schema_errors() -> Iterator[None]:
    """Turn what is wrong with the schema into a message about the setting."""
    from db import migrate
    from dicomnode import store

    try:
        with store.available():
            yield
    except migrate.SchemaError as exc:
        raise ConfigError(f"database.url: {exc}") from exc
