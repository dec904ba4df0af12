"""What all requests share: settings, database, audit log, keys of patients, who may sign in."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request
from sqlalchemy import Engine

from dicomnode.audit import AuditLog
from dicomnode.config import Settings
from dicomnode.core.region import Region
from dicomnode.model import PatientKey
from dicomnode.web.database import Database
from dicomnode.web.patients import PatientKeys
from dicomnode.web.problem import Problem

if TYPE_CHECKING:
    from dicomnode.web.access import Doorkeeper


@dataclass(frozen=True, slots=True)
class Part:
    """The web part of a node, as its requests see it."""

    settings: Settings
    database: Database
    audit: AuditLog
    keys: PatientKeys
    doorkeeper: "Doorkeeper"
    regions: tuple[Region, ...]  # of the bundle that the node scores with

    @property
    def engine(self) -> Engine:
        """The engine of the database; raises StoreUnavailable while there is none."""
        return self.database.engine()

    def patient(self, key: str) -> PatientKey:
        """Return whose key it is.

        Raises
        ------
        Problem
            If it is nobody's.
        """
        found = self.keys.patient(key)
        if found is None:
            raise Problem(404, "this is the key of no patient")
        return found


def part_of(request: Request) -> Part:
    """Return the part of the application that a request was made to."""
    part = request.app.state.part
    assert isinstance(part, Part)
    return part
